"""How long units stay in the arena, and where: retention and packing over one cyclic step.

Time is a row of slots: slot ``k`` is the entry and computing of use ``k``, the last slot is the end of the step. Sets
of slots are the bits of whole numbers, so that whether two units meet is one ``&``.

Without retention a unit is in the arena during its windows only. Retention lets it stay over the gap between two of
them. When more would stay than the arena holds, the one goes whose next use is farthest (Belady), which for units of
one size keeps as many gaps as any choice can; for a forward pass and its backward these are the units nearest the turn.

Packings are made for a row of capacities that does not depend on the arena, and the best that fits is taken: so a
larger arena never means more traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from angelptm.plan.arena import Window

Windows = tuple[tuple[Window, ...], ...]
_MOST_CAPACITIES = 48
_ROOMS = (1, 2)


@dataclass(frozen=True)
class Gap:
    """The slots ``start`` .. ``end``, both included, between two windows of a unit. One that ``wraps`` leads into the
    next step, and its ``end`` may be beyond this one. ``may_keep``: the content stays current meanwhile."""

    unit: int
    start: int
    end: int
    wraps: bool
    may_keep: bool

    @property
    def next_use(self) -> int:
        return self.end + 1


@dataclass(frozen=True)
class Packing:
    """``offsets[u]`` is the first frame of unit ``u``. ``fetched_bytes`` are moved to the device in one step."""

    offsets: tuple[int, ...]
    peak_frames: int
    fetched_bytes: int
    freedom: float  # how far fetches can run ahead, summed: 1/2 for one use, 3/4 for two, and so on


@dataclass(frozen=True)
class Residents:
    """What packing is about. ``expires[u]``: the content that a unit leaves behind in one step is outdated in the next.
    ``earliest[u]`` is the first slot of the former step (negative) at which a fetch can have the new content."""

    sizes: tuple[int, ...]  # frames; 0 for units that are never fetched
    fetch_bytes: tuple[int, ...]
    windows: Windows
    expires: tuple[bool, ...]
    earliest: tuple[int, ...]
    use_count: int

    @property
    def period(self) -> int:
        return self.use_count + 1


def mask(start: int, end: int, period: int) -> int:
    """The slots start .. end, taken modulo the period."""
    if end < start:
        return 0
    if end - start + 1 >= period:
        return (1 << period) - 1
    first, length = start % period, end - start + 1
    bits = ((1 << length) - 1) << first
    return (bits | bits >> period) & ((1 << period) - 1)


def merged(windows: Sequence[Window]) -> list[Window]:
    """Windows that meet or follow one another without a slot between them as one, in order."""
    result: list[Window] = []
    for window in sorted(windows, key=lambda window: (window.start, window.end)):
        if result and window.start <= result[-1].end + 1:
            result[-1] = Window(result[-1].start, max(result[-1].end, window.end))
        else:
            result.append(window)
    return result


def gaps_of(residents: Residents) -> list[Gap]:
    """Every gap of every unit; the one that leads into the next step last of its unit."""
    gaps = []
    for unit, own in enumerate(residents.windows):
        if residents.sizes[unit] == 0 or not own:
            continue
        joined = merged(own)
        gaps += [Gap(unit, one.end + 1, two.start - 1, False, True) for one, two in pairwise(joined)]
        end = joined[0].start + residents.period - 1
        gaps.append(Gap(unit, joined[-1].end + 1, end, True, not residents.expires[unit]))
    return gaps


def retained(residents: Residents, needed: Sequence[int], capacity: int, ahead: int = 0) -> frozenset[int]:
    """Indices into ``gaps_of`` of the gaps that units stay over when ``capacity`` frames are in use at most.

    ``needed[t]`` frames are in use at slot ``t`` in any case, with those of fetches ``ahead`` slots before each use.
    Farthest next use goes first.
    """
    gaps = gaps_of(residents)
    period = residents.period
    starting: list[list[int]] = [[] for _ in range(period)]
    ending: list[list[int]] = [[] for _ in range(period)]
    live = 0
    active: set[int] = set()
    kept = {index for index, gap in enumerate(gaps) if gap.may_keep}
    for index in kept:
        gap, end = gaps[index], gaps[index].end - ahead
        if end < gap.start:
            continue  # nothing that is not needed anyway
        starting[gap.start].append(index)
        ending[end % period].append(index)
        if end >= period:  # it is under way when the step begins
            active.add(index)
            live += residents.sizes[gap.unit]
    for slot in range(period):
        for index in starting[slot]:
            if index in kept:
                active.add(index)
                live += residents.sizes[gaps[index].unit]
        while active and needed[slot] + live > capacity:
            # Next use as seen from this slot: a gap that began in the former step ends in this one.
            def distance(index: int, slot: int = slot) -> tuple[int, int]:
                return (gaps[index].next_use - slot - 1) % period, index

            farthest = max(active, key=distance)
            active.remove(farthest)
            kept.remove(farthest)
            live -= residents.sizes[gaps[farthest].unit]
        for index in ending[slot]:
            if index in active:
                active.remove(index)
                live -= residents.sizes[gaps[index].unit]
    return frozenset(kept)


def frames_needed(residents: Residents, masks: Sequence[int]) -> list[int]:
    """Frames in use at each slot."""
    needed = [0] * residents.period
    for size, bits in zip(residents.sizes, masks):
        slot = 0
        while size and bits >> slot:
            if bits >> slot & 1:
                needed[slot] += size
            slot += 1
    return needed


def use_masks(residents: Residents, ahead: int) -> list[int]:
    """Slots at which each unit is in the arena without retention: its windows, each from ``ahead`` slots before it."""
    period = residents.period
    masks = []
    for unit, own in enumerate(residents.windows):
        bits = 0
        for window in own:
            # Not before the end of the unit's own former use: until then it is there anyway, or outdated.
            start = max(window.start - ahead, residents.earliest[unit]) if ahead else window.start
            bits |= mask(start, window.end, period)
        masks.append(bits if residents.sizes[unit] else 0)
    return masks


def first_fit(sizes: Sequence[int], masks: Sequence[int], order: Sequence[int]) -> list[int]:
    """Offsets: each unit of ``order`` at the lowest one free of every unit it meets."""
    offsets = [0] * len(sizes)
    placed: list[tuple[int, int, int]] = []  # (first frame, end, slots), by first frame
    for unit in order:
        own, size = masks[unit], sizes[unit]
        start = 0
        for low, high, bits in placed:
            if low >= start + size:
                break
            if high > start and bits & own:
                start = high
        offsets[unit] = start
        position = 0
        while position < len(placed) and placed[position][0] <= start:
            position += 1
        placed.insert(position, (start, start + size, own))
    return offsets


def neighbours_of(sizes: Sequence[int], offsets: Sequence[int]) -> list[list[int]]:
    """Of each unit, the units that share frames with it."""
    found: list[list[int]] = [[] for _ in sizes]
    by_offset = sorted((unit for unit, size in enumerate(sizes) if size), key=lambda unit: offsets[unit])
    for place, unit in enumerate(by_offset):
        for other in by_offset[place + 1 :]:
            if offsets[other] >= offsets[unit] + sizes[unit]:
                break
            found[unit].append(other)
            found[other].append(unit)
    return found


def fetch_slots(residents: Residents, offsets: Sequence[int]) -> list[tuple[int, int, int]]:
    """(unit, use, earliest slot) of every fetch of a step with units at ``offsets``; an earliest slot below 0 is in the
    former step. At the earliest slot no unit that shares its frames is in use any more, nor will be before the use."""
    windows = use_masks(residents, 0)
    others = [0] * len(offsets)
    for unit, sharing in enumerate(neighbours_of(residents.sizes, offsets)):
        for other in sharing:
            others[unit] |= windows[other]
    period = residents.period
    fetches = []
    for gap in gaps_of(residents):
        shared = others[gap.unit] & mask(gap.start, gap.end, period)
        if not shared and gap.may_keep:
            continue
        base = period if gap.wraps else 0
        end = gap.end
        earliest = gap.start
        if shared:
            # The last slot of the gap in which a neighbour is in use, looking back from the gap's end.
            while not shared >> (end % period) & 1:
                end -= 1
            earliest = end + 1
        earliest -= base
        if gap.wraps and residents.expires[gap.unit]:
            earliest = max(earliest, residents.earliest[gap.unit])
        fetches.append((gap.unit, gap.next_use - base, earliest))
    return sorted(fetches, key=lambda fetch: (fetch[1], fetch[0]))


@lru_cache(maxsize=64)
def packings(residents: Residents, ahead: int, retain: bool) -> tuple[Packing, ...]:
    """Packings to choose from, whatever the arena's size."""
    base = use_masks(residents, ahead)
    needed = frames_needed(residents, base)
    least, most = max(needed, default=0), sum(residents.sizes)
    steps = max(1, min(_MOST_CAPACITIES, most - least))
    capacities = sorted({least + (most - least) * step // steps for step in range(steps + 1)})
    gaps = gaps_of(residents)
    made: dict[tuple[int, ...], Packing] = {}
    choices = {retained(residents, needed, capacity, ahead): None for capacity in capacities if retain}
    for kept in [frozenset[int](), *choices]:
        masks = list(base)
        for index in kept:
            masks[gaps[index].unit] |= mask(gaps[index].start, gaps[index].end, residents.period)
        for order in _orders(residents.sizes, masks):
            offsets = tuple(first_fit(residents.sizes, masks, order))
            if offsets not in made:
                made[offsets] = packing_at(residents, offsets)
    if retain:
        ends = [sum(residents.sizes[:unit]) for unit in range(len(residents.sizes))]
        made.setdefault(tuple(ends), packing_at(residents, tuple(ends)))
    return tuple(made.values())


def _orders(sizes: Sequence[int], masks: Sequence[int]) -> list[list[int]]:
    """Largest first; first used first, which is best among equal sizes; longest in the arena first."""
    units = [unit for unit, size in enumerate(sizes) if size]
    first = {unit: (masks[unit] & -masks[unit]).bit_length() for unit in units}
    held = {unit: bin(masks[unit]).count("1") for unit in units}
    return [
        sorted(units, key=lambda unit: (-sizes[unit], unit)),
        sorted(units, key=lambda unit: (-sizes[unit], first[unit], unit)),
        sorted(units, key=lambda unit: (first[unit], -sizes[unit], unit)),
        sorted(units, key=lambda unit: (-held[unit], -sizes[unit], unit)),
    ]


def packing_at(residents: Residents, offsets: tuple[int, ...]) -> Packing:
    fetches = fetch_slots(residents, offsets)
    return Packing(
        offsets,
        max((offset + size for offset, size in zip(offsets, residents.sizes) if size), default=0),
        sum(residents.fetch_bytes[unit] for unit, _, _ in fetches),
        sum(1 - 0.5 ** min(use - slot, 16) for _, use, slot in fetches),
    )


def keeps_apart(residents: Residents, offsets: Sequence[int]) -> bool:
    """Whether no two units that are in use at the same time share frames."""
    masks = use_masks(residents, 0)
    return not any(
        masks[unit] & masks[other]
        for unit, sharing in enumerate(neighbours_of(residents.sizes, offsets))
        for other in sharing
    )


def best_packing(residents: Residents, frames: int, room: int, retain: bool) -> Packing | None:
    """The packing that fits ``frames`` with the least traffic, of these the one whose fetches can run ahead farthest.

    Frames for fetches ``room`` slots before each use are kept free where that fits, else for as many slots as does.
    None if not even use on demand fits.
    """
    for least in range(room, -1, -1):
        fitting = [
            one
            for ahead in sorted({least, *(more for more in _ROOMS if more > least)})
            for one in packings(residents, ahead, retain)
            if one.peak_frames <= frames
        ]
        if fitting:
            return min(fitting, key=lambda one: (one.fetched_bytes, -one.freedom, one.peak_frames, one.offsets))
    return None
