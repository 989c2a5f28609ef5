"""Which pages live where: decided from sizes and budgets, before anything is allocated.

The order of preference follows the traffic that a byte causes in one step when it lives on the SSD: a parameter is read
for forward, read for backward and written after the update (3), a gradient is written and read (2), a state is read and
written (2). So parameters take what room the host has first, then gradients, then states, page by page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from angelptm.errors import CapacityError
from angelptm.plan.arena import ArenaPlacement, needed_frames, place_units, windows_of
from angelptm.sizes import format_bytes
from angelptm.states.layout import (
    SpanStates,
    UnitFormats,
    are_records,
    choose_page_elements,
    elements_on_page,
    splits_masters,
    state_kinds,
    states_of,
)
from angelptm.units.layout import UnitLayout

_MIN_STAGING = 2
_MOST_READOUT_FRAMES = 16
_AUTO_RING_DEPTH = 3
_DEEPEST_AUTO_RING = 16


@dataclass(frozen=True)
class SsdBudget:
    """One folder of the SSD tier, bytes. ``size_bytes`` is None where the plan decides."""

    path: str
    size_bytes: int | None
    free_bytes: int
    weight: float = 1.0


@dataclass(frozen=True)
class CommitBudget:
    """Commits to keep, and the folder whose disk takes them where there is no SSD tier. ``other_bytes``: content that
    is no page of the plan and goes into each commit (the model's buffers)."""

    keep: int
    folder: SsdBudget
    other_bytes: int = 0


@dataclass(frozen=True)
class SweepBudget:
    """For updates that nobody waits for. ``grad_sets``: 2 where a step's gradient must not be added to what waits
    before all of it is known (clipping), 1 where it may."""

    grad_sets: int


@dataclass(frozen=True)
class Budgets:
    """What the user allows, and how pages shall be placed; the ``placement`` fields mean what the config's mean."""

    page_bytes: int
    device_bytes: int
    host_bytes: int
    ssd: tuple[SsdBudget, ...] = ()
    param: str = "auto"
    grad: str = "auto"
    states: str | float = "auto"
    update_threads: int | None = None
    ring_depth: int | None = None
    queue_depth: int = 16
    cores: int = 2
    commits: CommitBudget | None = None
    states_on_device: bool = False
    """Whether states may take device memory that parameters, all of them living there, leave over."""
    sweep: SweepBudget | None = None
    """Parameters and gradients live on the host then, whatever ``param`` and ``grad`` say."""
    device_is_apart: bool = False
    """Whether pages cannot live on the device, being of memory that updating threads do not reach: parameters that
    would live there live on the host, from where each step brings them anew. Gradients come by way of host frames."""


@dataclass(frozen=True)
class SpanPlan:
    """A span of a unit: the elements of one PARAM page. ``states_home`` is "device", "host" or "ssd"; on the device the
    states take consecutive frames from ``state_frame`` on, page after page."""

    elements: int
    states: SpanStates
    states_home: str
    grad_homes: tuple[str, ...]
    param_home: str
    state_frame: int | None = None


@dataclass(frozen=True)
class UnitPlan:
    """A unit's frames in the arena, its spans, and the homes of its frozen PARAM pages."""

    layout: UnitLayout
    frame_offset: int
    frame_count: int
    spans: tuple[SpanPlan, ...]
    frozen_homes: tuple[str, ...]

    @property
    def waits_for_step(self) -> bool:
        """Whether the unit is updated at the end of the step at the earliest: its frozen parameters may be needed after
        its last gradient, and gradients on the SSD are all written first."""
        grads_on_ssd = any(home == "ssd" for span in self.spans for home in span.grad_homes)
        return grads_on_ssd or self.layout.frozen_elements > 0


@dataclass(frozen=True)
class Plan:
    """Where every page lives. ``staging_frames`` are what is left of the host pool for pages on the move."""

    page_bytes: int
    param_itemsize: int
    grad_itemsize: int
    moment_count: int
    page_elements: int  # of a PARAM page, and so of a span: all that fit, or less where states are records
    units: tuple[UnitPlan, ...]
    arena: ArenaPlacement
    device_frames: int
    host_frames: int
    update_threads: int
    ring_depth: int
    write_depth: int  # spans of each thread's ring that may be written at once: there are slots for so many
    ring_frames: int
    home_frames: int
    staging_frames: int
    saver_frames: int  # kept by the thread that makes commits
    readout_frames: int  # through which gradients come from a device that is apart
    ssd_slots: int
    commit_slots: int  # of them: what commits hold beyond what is current
    ssd_slots_by_path: tuple[tuple[str, int, float], ...]
    kind_bytes: dict[str, dict[str, int]]  # kind → tier → bytes of whole pages
    grad_sets: int = 1  # of GRAD pages: what waits for its update, and beside it, with 2, a step's own
    spare_frames: int = 0  # for former parameters that are still read while new ones are published
    params_stay: bool = False  # of updates that nobody waits for: each unit has arena frames of its own

    @property
    def fetch_frames(self) -> int:
        """Of the staging frames: what pages on their way to the device may hold. The rest is for gradients that go to
        the SSD, and for whoever reads or writes whole parameters."""
        grads_on_ssd = any(home == "ssd" for unit in self.units for span in unit.spans for home in span.grad_homes)
        others = self.staging_frames // 2 if grads_on_ssd else min(2, self.staging_frames // 2)
        return max(1, self.staging_frames - others)

    @property
    def moving_frames(self) -> int:
        """Host frames that neither live there nor belong to the updater: for what is on its way, to commits too."""
        return self.staging_frames + self.saver_frames + self.readout_frames

    @property
    def update_slots(self) -> int:
        """SSD slots that updates may take at once for what they write, beyond one for each page that lives there."""
        written = [
            (len(span.states.pages) if span.states_home == "ssd" else 0) + (span.param_home == "ssd")
            for unit in self.units
            for span in unit.spans
        ]
        return self.update_threads * self.write_depth * max(written, default=0)

    @property
    def sweeps(self) -> bool:
        """Whether updating threads exchange the frames of parameters and gradients."""
        return self.spare_frames > 0

    @property
    def grad_page_elements(self) -> int:
        return elements_on_page(self.page_elements, self.grad_itemsize, self.page_bytes)

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """Kinds of state pages: those of separate states, or that of records."""
        return tuple(kind for kind in self.kind_bytes if kind not in ("PARAM", "GRAD"))

    @property
    def splits_masters(self) -> bool:
        """Whether a master is a trainable parameter and a remainder, so that neither is anything without the other."""
        return splits_masters([unit.layout for unit in self.units])

    def param_offset(self, unit: int, index: int) -> int:
        """Bytes from the start of the arena to the unit's PARAM page of that index, where the arena is as it was laid
        out at first: a unit's parameters follow one another there without a gap."""
        return self.units[unit].frame_offset * self.page_bytes + index * self.page_elements * self.param_itemsize

    @property
    def device_state_frames(self) -> int:
        """Frames behind those of parameters that hold states."""
        states = [tiers["device"] for kind, tiers in self.kind_bytes.items() if kind not in ("PARAM", "GRAD")]
        return sum(states) // self.page_bytes


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


@dataclass(frozen=True)
class _Demand:
    """Page counts of a model: what the placement is decided from."""

    param_pages: int
    grad_pages: int
    state_pages: int
    span_state_pages: int  # of the largest span, all kinds of state together
    span_grad_pages: int


def _param_pages(layout: UnitLayout, page_elements: int) -> int:
    return math.ceil(layout.trainable_elements / page_elements) + math.ceil(layout.frozen_elements / page_elements)


@dataclass(frozen=True)
class _Shape:
    """A model in pages, before they have homes: each unit's spans as (elements, pages of gradients, states)."""

    layouts: Sequence[UnitLayout]
    page_bytes: int
    page_elements: int
    compact: bool
    spans: list[list[tuple[int, int, SpanStates]]]

    @property
    def demand(self) -> _Demand:
        spans = [span for unit in self.spans for span in unit]
        return _Demand(
            param_pages=sum(_param_pages(layout, self.page_elements) for layout in self.layouts),
            grad_pages=sum(grads for _, grads, _ in spans),
            state_pages=sum(self.state_pages),
            span_state_pages=max(self.state_pages, default=0),
            span_grad_pages=max((grads for _, grads, _ in spans), default=0),
        )

    @property
    def state_pages(self) -> list[int]:
        """Pages of all kinds of state of each span."""
        return [len(states.pages) for unit in self.spans for _, _, states in unit]


def _shape(
    layouts: Sequence[UnitLayout], page_bytes: int, param_itemsize: int, grad_itemsize: int, moment_count: int
) -> _Shape:
    params = [(param.numel, param.states) for layout in layouts for param in layout.params if param.trainable]
    page_elements = choose_page_elements(
        params,
        page_bytes=page_bytes,
        param_itemsize=param_itemsize,
        grad_itemsize=grad_itemsize,
        moment_count=moment_count,
    )
    compact = are_records([(count, formats.of_rule(moment_count)) for count, formats in params])
    grad_step = elements_on_page(page_elements, grad_itemsize, page_bytes)
    spans = []
    for layout in layouts:
        formats = UnitFormats(layout, moment_count)
        own = []
        for first in range(0, layout.trainable_elements, page_elements):
            elements = min(page_elements, layout.trainable_elements - first)
            states = states_of(
                formats, first, elements, page_bytes=page_bytes, page_elements=page_elements, compact=compact
            )
            own.append((elements, math.ceil(elements / grad_step), states))
        spans.append(own)
    return _Shape(layouts, page_bytes, page_elements, compact, spans)


def _states_on_device(shape: _Shape, demand: _Demand, room: int) -> tuple[int, _Demand]:
    """How many spans, from the first on, have their states in ``room`` frames, and the demand that is left."""
    states = shape.state_pages
    count = 0
    while count < len(states) and states[count] <= room:
        room -= states[count]
        count += 1
    left = states[count:]
    return count, replace(demand, state_pages=sum(left), span_state_pages=max(left, default=0))


def _place_arena(
    shape: _Shape, sites: Sequence[tuple[Sequence[int], int]], budgets: Budgets
) -> tuple[ArenaPlacement, list[int]]:
    layouts = shape.layouts
    sizes = [_param_pages(layout, shape.page_elements) for layout in layouts]
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
            f"Raise tiers.device to {_mib(needed)}, or name smaller units in units.classes.",
        )
    return placement, sizes


def _mib(count: int) -> str:
    return f"{math.ceil(count / 2**20)}MiB"


@dataclass(frozen=True)
class _Split:
    """Host allowance in pages of each kind, and what of the pool serves moving pages."""

    param: int
    grad: int
    states: int
    threads: int
    depth: int
    slot_frames: int
    staging: int
    spare: int = 0

    @property
    def ring_frames(self) -> int:
        return self.threads * self.depth * self.slot_frames

    @property
    def home_frames(self) -> int:
        return self.param + self.grad + self.states

    @property
    def needed_frames(self) -> int:
        return self.home_frames + self.ring_frames + self.staging + self.spare


@dataclass(frozen=True)
class _Wishes:
    """Host pages that are fixed by placement.*, None where the plan decides; and the pages that there are."""

    fixed: tuple[int | None, int | None, int | None]  # param, grad, states
    total: tuple[int, int, int]

    @property
    def fixed_sum(self) -> int:
        return sum(pages or 0 for pages in self.fixed)

    def with_room(self, room: int) -> tuple[int, int, int]:
        """Host pages of each kind when ``room`` frames are to spare for the kinds that the plan places."""
        chosen = []
        for fixed, total in zip(self.fixed, self.total):
            pages = min(total, room) if fixed is None else fixed
            room -= pages if fixed is None else 0
            chosen.append(pages)
        return chosen[0], chosen[1], chosen[2]


def _wishes(budgets: Budgets, demand: _Demand, param_on_device: bool) -> _Wishes:
    total = (0 if param_on_device else demand.param_pages, demand.grad_pages, demand.state_pages)
    if budgets.sweep is not None:
        budgets = replace(budgets, param="host", grad="host")
    fixed: list[int | None] = [
        {"host": pages, "ssd": 0, "device": 0}.get(str(placement))
        for placement, pages in zip((budgets.param, budgets.grad, budgets.states), total)
    ]
    if isinstance(budgets.states, float):
        fixed[2] = math.floor(demand.state_pages * budgets.states)
    return _Wishes((fixed[0], fixed[1], fixed[2]), total)


def _split_host(budgets: Budgets, demand: _Demand, param_on_device: bool, spare: int) -> _Split:
    """Homes and ring. What fits stays in memory, if need be with a narrow ring; else homes and moving pages share.

    More host frames never mean fewer homes: pages on the move get half of what is not fixed, at least what one span in
    flight needs, at most what the full ring needs, and so homes get what grows with the pool.
    """
    frames = budgets.host_bytes // budgets.page_bytes
    wishes = _wishes(budgets, demand, param_on_device)
    threads = budgets.update_threads or max(1, min(2, budgets.cores))
    depth = budgets.ring_depth or _AUTO_RING_DEPTH
    least_threads, least_depth = budgets.update_threads or 1, budgets.ring_depth or 1

    def split(homes: tuple[int, int, int], ring_room: int) -> _Split:
        """With the widest ring that ``ring_room`` frames hold, less what is kept for staging."""
        on_ssd = [pages < total for pages, total in zip(homes, wishes.total)]
        # A span that straddles the border of its kind counts as one on the SSD.
        taken = on_ssd[1] or budgets.sweep is not None
        slot = (0 if param_on_device else 1) + (demand.span_grad_pages if taken else 0)
        slot += demand.span_state_pages if on_ssd[2] else 0
        staging = (_MIN_STAGING if any(on_ssd) or wishes.total[0] else 0) + _kept_frames(budgets)
        n, d = threads, depth
        while d > least_depth and n * d * slot + staging + spare > ring_room:
            d -= 1
        while n > least_threads and n * d * slot + staging + spare > ring_room:
            n -= 1
        return _Split(*homes, n, d, slot, staging, spare)

    in_memory = wishes.with_room(sum(wishes.total))
    everything = split(in_memory, frames - sum(in_memory))
    if everything.needed_frames <= frames:
        return _deepened(budgets, demand, everything, frames)
    least = split(wishes.with_room(0), 0)
    if budgets.ssd and least.needed_frames <= frames:
        slot = (0 if param_on_device else 1) + demand.span_state_pages + demand.span_grad_pages
        full = threads * depth * slot + max(_MIN_STAGING, budgets.queue_depth) + _kept_frames(budgets) + spare
        shared = frames - wishes.fixed_sum
        moving = max(least.needed_frames - wishes.fixed_sum, min(full, shared // 2))
        return _deepened(budgets, demand, split(wishes.with_room(shared - moving), moving), frames)
    needed = min(everything, least, key=lambda one: one.needed_frames) if budgets.ssd else everything
    raise _host_error(budgets, needed, frames)


def _deepened(budgets: Budgets, demand: _Demand, split: _Split, frames: int) -> _Split:
    """A deeper ring where frames are left over, in which the updater reads states before their gradients come: at most
    one that holds all of them that live on the SSD."""
    spans = math.ceil((demand.state_pages - split.states) / max(1, demand.span_state_pages))
    if budgets.ring_depth is not None or split.depth < _AUTO_RING_DEPTH:
        return split
    deeper = replace(split, depth=split.depth + 1)
    while (
        deeper.depth <= min(_DEEPEST_AUTO_RING, math.ceil(spans / split.threads))
        and deeper.needed_frames + budgets.queue_depth <= frames
    ):
        split, deeper = deeper, replace(deeper, depth=deeper.depth + 1)
    return split


def _host_error(budgets: Budgets, split: _Split, frames: int) -> CapacityError:
    page = budgets.page_bytes
    forced = [f"placement.{name}" for name in ("param", "grad", "states") if getattr(budgets, name) == "host"]
    remedy = f"Raise tiers.host to {_mib(split.needed_frames * page)}"
    if not budgets.ssd:
        remedy += ", or add tiers.ssd: [{path: FOLDER}] to keep what does not fit on the SSD"
    elif forced:
        remedy += f", or set {' and '.join(forced)} to auto or ssd"
    else:
        remedy += f", or lower page_size (now {format_bytes(page)})"
    return CapacityError(
        "host",
        split.needed_frames * page,
        frames * page,
        f"pages that live there ({format_bytes(split.home_frames * page)}) and frames for pages on the move "
        f"({format_bytes((split.ring_frames + split.staging + split.spare) * page)})",
        remedy + ".",
    )


def _spare_frames(budgets: Budgets, demand: _Demand, stay: bool) -> int:
    """For former parameters: a step computes with one version of a unit from its forward to its backward. Where the
    unit stays in the arena meanwhile, the former content is read only until it has been copied there."""
    if budgets.sweep is None:
        return 0
    threads = budgets.update_threads or max(1, min(2, budgets.cores))
    return min(demand.param_pages, threads + 1) if stay else demand.param_pages


def _saver_frames(budgets: Budgets) -> int:
    """What the thread that makes commits keeps for itself."""
    return 1 if budgets.commits is not None else 0


def _readout_frames(budgets: Budgets) -> int:
    """More of them for a larger pool: what is being copied is what hides the link's latency."""
    if not budgets.device_is_apart:
        return 0
    return max(2, min(_MOST_READOUT_FRAMES, budgets.host_bytes // budgets.page_bytes // 32))


def _kept_frames(budgets: Budgets) -> int:
    return _saver_frames(budgets) + _readout_frames(budgets)


def _spread_slots(budgets: Budgets, slots: int, commit_slots: int) -> tuple[tuple[str, int, float], ...]:
    """Slots for each folder: by weight where the user gave no size, else what fits the size. Checks the free space."""
    if slots == 0:
        return ()
    page = budgets.page_bytes
    ssd = budgets.ssd
    if not ssd and budgets.commits is not None and slots == commit_slots:
        ssd = (budgets.commits.folder,)  # no SSD tier: copies of what is in memory
    room = [(folder.size_bytes if folder.size_bytes is not None else folder.free_bytes) // page for folder in ssd]
    for folder in ssd:
        if folder.size_bytes is not None and folder.size_bytes > folder.free_bytes:
            raise CapacityError(
                "ssd",
                folder.size_bytes,
                folder.free_bytes,
                f"the size given for {folder.path}",
                "Free disk space, or lower tiers.ssd[].size.",
            )
    if sum(room) < slots:
        if not ssd:
            remedy = "Add tiers.ssd: [{path: FOLDER}], or set what is ssd in placement to auto or host."
        elif all(folder.size_bytes is not None for folder in ssd):
            remedy = f"Raise tiers.ssd[].size to {_mib(slots * page)} in sum."
        else:
            remedy = "Free disk space, add a folder to tiers.ssd, or raise tiers.host to keep more in memory."
        if commit_slots and budgets.commits is not None and budgets.commits.keep > 1:
            remedy += f" Or lower checkpoint.keep (now {budgets.commits.keep})."
        folders = ", in " + ", ".join(folder.path for folder in ssd) + "," if ssd else ""
        commits = f", {format_bytes(commit_slots * page)} of it for commits" if commit_slots else ""
        raise CapacityError("ssd", slots * page, sum(room) * page, f"what lives on the SSD{folders}{commits}", remedy)
    total = sum(folder.weight for folder in ssd)
    counts = [min(pages, math.floor(slots * folder.weight / total)) for folder, pages in zip(ssd, room)]
    for index, pages in enumerate(room):
        counts[index] += min(pages - counts[index], max(0, slots - sum(counts)))
    return tuple((folder.path, count, folder.weight) for folder, count in zip(ssd, counts) if count)


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
    shape = _shape(layouts, page_bytes, param_itemsize, grad_itemsize, moment_count)
    demand = shape.demand
    device_frames = budgets.device_bytes // page_bytes
    fits_device = demand.param_pages <= device_frames
    param_on_device = budgets.param == "device" or (budgets.param == "auto" and fits_device)
    stay = budgets.sweep is not None and fits_device
    if budgets.param == "device" and demand.param_pages > device_frames:
        raise CapacityError(
            "device",
            demand.param_pages * page_bytes,
            device_frames * page_bytes,
            "keeping all parameters on the device (placement.param: device)",
            f"Raise tiers.device to {_mib(demand.param_pages * page_bytes)}, or set placement.param to auto.",
        )
    if budgets.device_is_apart and param_on_device:
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
        spans_on_device, demand = _states_on_device(shape, demand, room)
    split = _split_host(budgets, demand, param_on_device, _spare_frames(budgets, demand, stay))
    params, grads, states = _Placer(split.param), _Placer(split.grad), _Placer(split.states)
    next_frame = arena.peak_frames

    units = []
    for index, layout in enumerate(layouts):
        spans = []
        for elements, grad_pages, own_states in shape.spans[index]:
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
                )
            )
        frozen = math.ceil(layout.frozen_elements / shape.page_elements)
        frozen_homes = tuple("device" if param_on_device else params.home() for _ in range(frozen))
        units.append(UnitPlan(layout, arena.offsets[index], sizes[index], tuple(spans), frozen_homes))

    grad_sets = budgets.sweep.grad_sets if budgets.sweep is not None else 1
    kind_bytes = _kind_bytes(units, page_bytes, state_kinds(moment_count, shape.compact), grad_sets)
    live = sum(tiers["ssd"] for tiers in kind_bytes.values()) // page_bytes
    commit_slots = _commit_slots(budgets, units, kind_bytes)
    slots = (live + _slots_in_flight(budgets, demand) if live else 0) + commit_slots
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
        write_depth=min(split.depth, budgets.ring_depth or _AUTO_RING_DEPTH),
        ring_frames=split.ring_frames,
        home_frames=home_frames,
        staging_frames=host_frames - split.ring_frames - home_frames - _kept_frames(budgets) - split.spare,
        saver_frames=_saver_frames(budgets),
        readout_frames=_readout_frames(budgets),
        ssd_slots=slots,
        commit_slots=commit_slots,
        ssd_slots_by_path=_spread_slots(budgets, slots, commit_slots),
        kind_bytes=kind_bytes,
        grad_sets=grad_sets,
        spare_frames=split.spare,
        params_stay=stay,
    )
    needed = plan.ring_frames + plan.home_frames + _kept_frames(budgets) + plan.spare_frames + budgets.queue_depth
    if live == 0 and host_frames > needed:
        # Nothing moves to the SSD: the pool needs no more than its pages, so it takes no more.
        plan = replace(plan, host_frames=needed, staging_frames=budgets.queue_depth)
    return plan


def _commit_slots(budgets: Budgets, units: Sequence[UnitPlan], kind_bytes: dict[str, dict[str, int]]) -> int:
    """Slots that commits hold beyond what is current.

    Trainable parameters are in no commit, being their masters rounded, unless these are split. A page that lives on the
    SSD is current in one slot and in one more for each commit kept; the commit that is being made shares the current
    one. One that lives in memory has a copy in each commit kept and in the one being made; where that one fails, its
    copies stay until those of the next replace them, some at a time. Frozen parameters never change: one copy.
    """
    if budgets.commits is None:
        return 0
    keep = budgets.commits.keep
    states = [tiers for kind, tiers in kind_bytes.items() if kind not in ("PARAM", "GRAD")]
    on_ssd = sum(tiers["ssd"] for tiers in states) // budgets.page_bytes
    on_host = sum(tiers["host"] + tiers["device"] for tiers in states) // budgets.page_bytes
    if splits_masters([unit.layout for unit in units]):
        homes = [span.param_home for unit in units for span in unit.spans]
        on_ssd += homes.count("ssd")
        on_host += len(homes) - homes.count("ssd")
    frozen = sum(home != "ssd" for unit in units for home in unit.frozen_homes)
    other = math.ceil(budgets.commits.other_bytes / budgets.page_bytes)
    return keep * on_ssd + (keep + 1) * (on_host + other) + min(on_host, budgets.queue_depth) + frozen


def _slots_in_flight(budgets: Budgets, demand: _Demand) -> int:
    """Nothing is overwritten in place, so every write in flight needs a slot of its own: those of the full ring, and
    those of the pages written behind. The same for every host budget, so that a larger one never needs more disk."""
    threads = budgets.update_threads or max(1, min(2, budgets.cores))
    depth = budgets.ring_depth or _AUTO_RING_DEPTH
    return threads * depth * (1 + demand.span_state_pages + demand.span_grad_pages) + budgets.queue_depth + 1


def _kind_bytes(
    units: Sequence[UnitPlan], page_bytes: int, kinds: Sequence[str], grad_sets: int
) -> dict[str, dict[str, int]]:
    pages = {kind: {"device": 0, "host": 0, "ssd": 0} for kind in ("PARAM", "GRAD", *kinds)}
    for unit in units:
        for span in unit.spans:
            pages["PARAM"][span.param_home] += page_bytes
            for home in span.grad_homes:
                pages["GRAD"][home] += page_bytes * grad_sets
            for page in span.states.pages:
                pages[page.kind][span.states_home] += page_bytes
        for home in unit.frozen_homes:
            pages["PARAM"][home] += page_bytes
    return pages
