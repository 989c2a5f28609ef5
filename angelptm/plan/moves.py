"""Makes the schedule of a step: packs the arena, finds the fetches, and says when each of them may begin."""

from __future__ import annotations

from collections.abc import Sequence

from angelptm.errors import CapacityError
from angelptm.plan.placed import Plan
from angelptm.plan.residence import (
    Residents,
    best_packing,
    fetch_slots,
    frames_needed,
    keeps_apart,
    packing_at,
    packings,
    use_masks,
)
from angelptm.plan.schedule import LINKS, UPDATES, CopyOut, Fetch, Schedule, Traffic, WriteBack
from angelptm.plan.trace import Trace
from angelptm.plan.transfers import UnitTransfers, transfers_of


def residents_of(plan: Plan, trace: Trace, updates: str) -> Residents:
    """What the packing of a plan's units under a trace is about."""
    transfers = transfers_of(plan)
    count = len(trace.uses)
    done = {one.unit: one.use for one in trace.gradients}
    earliest = []
    for unit, windows in enumerate(trace.windows()):
        ended = max((window.end for window in windows), default=-1)
        changed = done.get(unit)
        if changed is None:
            earliest.append(ended + 1 - count - 1)
        else:
            late = updates == "forward" or plan.units[unit].waits_for_step
            earliest.append(-1 if late else max(ended, changed) + 1 - count - 1)
    return Residents(
        sizes=tuple(0 if own.always_there else unit.frame_count for own, unit in zip(transfers, plan.units)),
        fetch_bytes=tuple(own.fetch_bytes for own in transfers),
        windows=tuple(tuple(windows) for windows in trace.windows()),
        expires=tuple(unit in done for unit in range(len(plan.units))),
        earliest=tuple(earliest),
        use_count=count,
    )


def planned_offsets(plan: Plan, trace: Trace) -> tuple[int, ...] | None:
    """Where the plan itself has its units in the arena; None where units that the trace has in use at the same time
    share frames there."""
    offsets = tuple(unit.frame_offset for unit in plan.units)
    return offsets if keeps_apart(residents_of(plan, trace, "forward"), offsets) else None


def make_schedule(
    plan: Plan,
    trace: Trace,
    *,
    lead: int | None = None,
    room: int = 0,
    retain: bool = True,
    updates: str = "backward",
    read_ahead_frames: int | None = None,
    read_states_ahead: bool = True,
) -> Schedule:
    """The moves of a step.

    ``lead`` bounds by how many uses fetches run ahead; without it they run as early as memory permits. ``room`` keeps
    arena frames free for fetches that many uses ahead before retention takes what is left: more overlap for more
    traffic. ``retain`` False keeps nothing between uses on purpose. ``read_ahead_frames`` of the plan's staging frames
    may hold pages read before their fetch; at most, and by default, all but one for the fetch that is being served,
    which would else wait for ever, and one for gradients that go to the SSD. Raises CapacityError when the units that
    the trace has in use at the same time exceed the arena.
    """
    assert updates in UPDATES, updates
    transfers = transfers_of(plan)
    residents = residents_of(plan, trace, updates)
    needed = frames_needed(residents, use_masks(residents, 0))
    offsets: tuple[int, ...] = tuple(unit.frame_offset for unit in plan.units)
    peak = plan.arena.peak_frames
    if any(residents.sizes):
        packing = best_packing(residents, plan.device_frames, room, retain)
        if packing is None and keeps_apart(residents, offsets):
            packing = packing_at(residents, offsets)
        if packing is None:
            page = plan.page_bytes
            tight = min(packings(residents, 0, False), key=lambda one: one.peak_frames)
            raise CapacityError(
                "device",
                tight.peak_frames * page,
                plan.device_frames * page,
                "the units that the traced step has in use at the same time",
                f"Raise tiers.device to {-(-tight.peak_frames * page // 2**20)}MiB.",
            )
        offsets, peak = packing.offsets, packing.peak_frames
    grads_on_ssd = any(home == "ssd" for unit in plan.units for span in unit.spans for home in span.grad_homes)
    spare = max(0, plan.staging_frames - 1 - grads_on_ssd)
    read_ahead_frames = spare if read_ahead_frames is None else min(read_ahead_frames, spare)
    fetches = _fetches(residents, transfers, offsets, lead, read_ahead_frames)
    first_use: dict[int, int] = {}
    for index, use in enumerate(trace.uses):
        for unit in use.units:
            first_use.setdefault(unit, index)
    completed = sorted(trace.gradients, key=lambda done: (done.use, first_use.get(done.unit, 0), done.unit))
    trained = [done.unit for done in completed]
    update_order = tuple(sorted(trained, key=lambda unit: (first_use.get(unit, len(trace.uses)), unit)))
    ahead_order = tuple(trained) if updates == "backward" else update_order
    copy_outs = tuple(
        CopyOut(done.unit, done.use, done.bytes, sum(span.grad_ssd_bytes for span in transfers[done.unit].spans))
        for done in completed
    )
    return Schedule(
        updates=updates,
        use_count=len(trace.uses),
        lead=lead,
        offsets=offsets,
        peak_frames=peak,
        lower_bound_frames=max(
            max(needed, default=0), sum(u.frame_count for u, t in zip(plan.units, transfers) if t.always_there)
        ),
        fetches=fetches,
        update_order=update_order,
        read_ahead_order=ahead_order if read_states_ahead else (),
        read_ahead_frames=read_ahead_frames,
        copy_outs=copy_outs,
        write_backs=tuple(_write_back(unit, transfers[unit], len(plan.state_kinds)) for unit in update_order),
        traffic=_traffic(transfers, fetches, copy_outs, update_order, plan.state_kinds),
    )


def _write_back(unit: int, transfers: UnitTransfers, state_kinds: int) -> WriteBack:
    states = state_kinds * sum(span.state_ssd_bytes for span in transfers.spans)
    grads = sum(span.grad_ssd_bytes for span in transfers.spans)
    return WriteBack(unit, states + grads, states, sum(span.param_ssd_bytes for span in transfers.spans))


def _fetches(
    residents: Residents,
    transfers: Sequence[UnitTransfers],
    offsets: Sequence[int],
    lead: int | None,
    read_ahead_frames: int,
) -> tuple[Fetch, ...]:
    slots = fetch_slots(residents, offsets)
    triggers = [slot if lead is None else max(slot, use - lead) for _, use, slot in slots]
    content = [
        max(residents.earliest[unit], -residents.period + 1)
        if _wraps(residents, unit, use)
        else _former_end(residents, unit, use)
        for unit, use, _ in slots
    ]
    pages = [transfers[unit].fetch_ssd_pages for unit, _, _ in slots]
    ahead = _read_ahead([use for _, use, _ in slots], triggers, content, pages, residents.period, read_ahead_frames)
    fetches = []
    for (unit, use, _), trigger, reading in zip(slots, triggers, ahead):
        own = transfers[unit]
        fetches.append(Fetch(unit, use, trigger, reading, own.fetch_bytes, own.fetch_ssd_bytes, own.fetch_ssd_pages))
    return tuple(fetches)


def _wraps(residents: Residents, unit: int, use: int) -> bool:
    return use == min(window.start for window in residents.windows[unit])


def _former_end(residents: Residents, unit: int, use: int) -> int:
    """The first slot after the unit's last window before ``use``: no earlier is it gone."""
    return max(window.end for window in residents.windows[unit] if window.end < use) + 1


def _read_ahead(
    uses: Sequence[int],
    triggers: Sequence[int],
    earliest: Sequence[int],
    pages: Sequence[int],
    period: int,
    frames: int,
) -> list[int]:
    """When each fetch's pages may be read from the SSD: in order of need, each as early as staging frames are free.

    A fetch holds its frames from there until it is on the device, which is at its use, or one slot later when its own
    trigger is no earlier. One with more pages than there are frames takes all of them.
    """
    held = [0] * period
    result = []
    for use, trigger, bound, count in zip(uses, triggers, earliest, pages):
        wanted = min(count, frames)
        slot = trigger
        if wanted:
            until = use if trigger == use else use - 1
            for taken in range(trigger, until + 1):
                held[taken % period] += wanted
            while slot - 1 >= max(bound, until - period + 1) and held[(slot - 1) % period] + wanted <= frames:
                slot -= 1
                held[slot % period] += wanted
        result.append(slot)
    return result


def _traffic(
    transfers: Sequence[UnitTransfers],
    fetches: Sequence[Fetch],
    copy_outs: Sequence[CopyOut],
    updated: Sequence[int],
    state_kinds: Sequence[str],
) -> Traffic:
    """Bytes of a step by kind and link, if no new parameters are handed from the updater to a waiting fetch."""
    spans = [span for unit in updated for span in transfers[unit].spans]
    states = sum(span.state_ssd_bytes for span in spans)
    grads = sum(move.ssd_bytes for move in copy_outs)
    traffic = {kind: dict.fromkeys(LINKS, 0) for kind in ("PARAM", "GRAD", *state_kinds)}
    traffic["PARAM"].update(
        ssd_read=sum(fetch.ssd_bytes for fetch in fetches) + sum(span.old_param_ssd_bytes for span in spans),
        ssd_written=sum(span.param_ssd_bytes for span in spans),
        host_to_device=sum(fetch.bytes for fetch in fetches),
        published=sum(span.param_content_bytes for span in spans),
    )
    traffic["GRAD"].update(ssd_read=grads, ssd_written=grads, device_to_host=sum(move.bytes for move in copy_outs))
    for kind in state_kinds:
        traffic[kind].update(ssd_read=states, ssd_written=states)
    return traffic
