"""Which pages live where: decided from sizes and budgets, before anything is allocated.

The order of preference follows the traffic that a byte causes in one step when it lives on the SSD: a parameter is read
for forward, read for backward and written after the update (3), a gradient is written and read (2), a state is read and
written (2). So parameters take what room the host has first, then gradients, then states, page by page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from angelptm.errors import CapacityError
from angelptm.plan.arena import ArenaPlacement, needed_frames, place_units, windows_of
from angelptm.plan.budgets import Budgets
from angelptm.plan.placed import PEER, Plan, SpanPlan, UnitPlan
from angelptm.plan.pool import AUTO_RING_DEPTH, kept_frames, readout_frames, saver_frames, spare_frames, split_host
from angelptm.plan.shape import Shape, param_pages, shape_of, states_on_device
from angelptm.plan.slots import commit_slots_of, slots_in_flight, spread_slots
from angelptm.sizes import format_bytes, mib
from angelptm.states.layout import state_kinds
from angelptm.units.layout import UnitLayout


class _Placer:
    """Deals pages of one kind to the host until its allowance is used up; the rest goes to the SSD."""

    def __init__(self, host_pages: int) -> None:
        self.left = host_pages

    def home(self, pages: int = 1) -> str:
        if pages <= self.left:
            self.left -= pages
            return "host"
        self.left = 0
        return "ssd"


def _place_arena(
    shape: Shape, sites: Sequence[tuple[Sequence[int], int]], budgets: Budgets
) -> tuple[ArenaPlacement, list[int]]:
    layouts = shape.layouts
    sizes = [param_pages(layout, shape.page_elements) for layout in layouts]
    frames = budgets.device_bytes // budgets.page_bytes
    windows = windows_of(sites, len(layouts))
    placement = place_units(sizes, windows, frames)
    if placement is None:
        needed = needed_frames(sizes, windows) * budgets.page_bytes
        largest = max(range(len(sizes)), key=lambda unit: sizes[unit])
        raise CapacityError(
            "device",
            needed,
            frames * budgets.page_bytes,
            f"the units in use at the same time (the largest is {layouts[largest].name}, "
            f"{format_bytes(sizes[largest] * budgets.page_bytes)})",
            f"Raise tiers.device to {mib(needed)}, or name smaller units in units.classes.",
        )
    return placement, sizes


def _all_on_device_error(
    shape: Shape, sites: Sequence[tuple[Sequence[int], int]], budgets: Budgets, all_pages: int
) -> CapacityError:
    page, frames = budgets.page_bytes, budgets.device_bytes // budgets.page_bytes
    sizes = [param_pages(layout, shape.page_elements) for layout in shape.layouts]
    least = needed_frames(sizes, windows_of(sites, len(sizes)))
    too = f" and raise tiers.device to {mib(least * page)}" if least > frames else ""
    return CapacityError(
        "device",
        all_pages * page,
        frames * page,
        "keeping all parameters on the device (placement.param: device)",
        f"Raise tiers.device to {mib(all_pages * page)}, or set placement.param to auto{too}.",
    )


def make_plan(
    layouts: Sequence[UnitLayout],
    sites: Sequence[tuple[Sequence[int], int]],
    budgets: Budgets,
    *,
    param_itemsize: int,
    grad_itemsize: int,
    moment_count: int,
) -> Plan:
    """The plan of a model under budgets.

    ``sites`` are (units, depth) in the order in which a forward pass enters them. Raises CapacityError naming the tier,
    the bytes needed and available, and what would help; nothing has been allocated then.
    """
    page_bytes = budgets.page_bytes
    shape = shape_of(layouts, page_bytes, param_itemsize, grad_itemsize, moment_count, budgets.share)
    demand = shape.demand
    device_frames = budgets.device_bytes // page_bytes
    fits_device = shape.all_param_pages <= device_frames
    param_on_device = budgets.param == "device" or (budgets.param == "auto" and fits_device)
    stay = budgets.sweep is not None and fits_device
    if budgets.param == "device" and not fits_device:
        raise _all_on_device_error(shape, sites, budgets, shape.all_param_pages)
    if (budgets.device_is_apart or not budgets.share.is_whole) and param_on_device:
        param_on_device = False
        if budgets.param == "device":
            budgets = replace(budgets, param="host")
    if budgets.sweep is not None:
        param_on_device = False
        demand = replace(demand, grad_pages=demand.grad_pages * budgets.sweep.grad_sets)
    arena, sizes = _place_arena(shape, sites, budgets)
    spans_on_device = 0
    if budgets.states_on_device and param_on_device and budgets.states == "auto":
        room = device_frames - arena.peak_frames
        spans_on_device, demand = states_on_device(shape, demand, room)
    split = split_host(budgets, demand, param_on_device, spare_frames(budgets, demand, stay))
    params, grads, states = _Placer(split.param), _Placer(split.grad), _Placer(split.states)
    next_frame = arena.peak_frames

    units = []
    for index, layout in enumerate(layouts):
        spans = []
        owners = shape.owners[index]
        for page, (elements, grad_pages, own_states) in enumerate(shape.spans[index]):
            if not shape.is_mine(index, page):
                spans.append(SpanPlan(elements, own_states, PEER, (PEER,) * grad_pages, PEER, owner=owners[page]))
                continue
            state_pages = len(own_states.pages)
            state_frame = None
            if spans_on_device > 0:
                spans_on_device -= 1
                state_frame, next_frame = next_frame, next_frame + state_pages
            spans.append(
                SpanPlan(
                    elements,
                    own_states,
                    states.home(state_pages) if state_frame is None else "device",
                    tuple(grads.home() for _ in range(grad_pages)),
                    "device" if param_on_device else params.home(),
                    state_frame,
                    owners[page],
                )
            )
        frozen_homes = tuple(
            "device" if param_on_device else params.home() if shape.is_mine(index, page) else PEER
            for page in range(len(spans), len(owners))
        )
        units.append(UnitPlan(layout, arena.offsets[index], sizes[index], tuple(spans), frozen_homes, owners))

    grad_sets = budgets.sweep.grad_sets if budgets.sweep is not None else 1
    kind_bytes = _kind_bytes(units, page_bytes, state_kinds(moment_count, shape.compact), grad_sets)
    live = sum(tiers["ssd"] for tiers in kind_bytes.values()) // page_bytes
    commit_slots, slots_of_one = commit_slots_of(budgets, units, kind_bytes)
    slots = (live + slots_in_flight(budgets, demand) if live else 0) + commit_slots
    home_frames = sum(tiers["host"] for tiers in kind_bytes.values()) // page_bytes
    host_frames = budgets.host_bytes // page_bytes
    plan = Plan(
        page_bytes=page_bytes,
        param_itemsize=param_itemsize,
        grad_itemsize=grad_itemsize,
        moment_count=moment_count,
        page_elements=shape.page_elements,
        units=tuple(units),
        arena=arena,
        device_frames=device_frames,
        host_frames=host_frames,
        update_threads=split.threads,
        ring_depth=split.depth,
        write_depth=min(split.depth, budgets.ring_depth or AUTO_RING_DEPTH),
        ring_frames=split.ring_frames,
        home_frames=home_frames,
        staging_frames=host_frames - split.ring_frames - home_frames - kept_frames(budgets) - split.spare,
        saver_frames=saver_frames(budgets),
        readout_frames=readout_frames(budgets),
        ssd_slots=slots,
        commit_slots=commit_slots,
        ssd_slots_by_path=spread_slots(budgets, slots, commit_slots, slots_of_one),
        kind_bytes=kind_bytes,
        grad_sets=grad_sets,
        spare_frames=split.spare,
        params_stay=stay,
        share=budgets.share,
    )
    needed = plan.ring_frames + plan.home_frames + kept_frames(budgets) + plan.spare_frames + budgets.queue_depth
    if live == 0 and host_frames > needed:
        # Nothing moves to the SSD: the pool needs no more than its pages, so it takes no more.
        plan = replace(plan, host_frames=needed, staging_frames=budgets.queue_depth)
    return plan


def _kind_bytes(
    units: Sequence[UnitPlan], page_bytes: int, kinds: Sequence[str], grad_sets: int
) -> dict[str, dict[str, int]]:
    pages = {kind: {"device": 0, "host": 0, "ssd": 0} for kind in ("PARAM", "GRAD", *kinds)}
    for unit in units:
        for span in unit.spans:
            if not span.is_mine:
                continue
            pages["PARAM"][span.param_home] += page_bytes
            for home in span.grad_homes:
                pages["GRAD"][home] += page_bytes * grad_sets
            for page in span.states.pages:
                pages[page.kind][span.states_home] += page_bytes
        for home in unit.frozen_homes:
            if home != PEER:
                pages["PARAM"][home] += page_bytes
    return pages
