"""Interval packing of units into the device arena, as a register allocator would do it.

A unit needs a run of consecutive frames during its windows of use. Two units whose windows are disjoint may share
frames. Each unit keeps its place for the life of the process, so its address never changes and the arena cannot
fragment: what packing costs is known here, ahead of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Event times [start, end], both included, during which a unit must be on the device."""

    start: int
    end: int

    def meets(self, other: Window) -> bool:
        return self.start <= other.end and other.start <= self.end


@dataclass(frozen=True)
class ArenaPlacement:
    """``offsets[u]`` is the first frame of unit ``u``.

    ``peak_frames`` is the end of the highest unit; ``lower_bound_frames`` the largest number of frames in use at once,
    which no packing can undercut; ``lead`` the number of events by which fetches may run ahead of uses.
    """

    offsets: tuple[int, ...]
    peak_frames: int
    lower_bound_frames: int
    lead: int


def windows_of(sites: Sequence[tuple[Sequence[int], int]], unit_count: int) -> list[list[Window]]:
    """Windows of each unit over one step in which ``sites``, (units, depth) in order of entry, run forward, then back.

    A site is open from its entry until the next site that is not inside it is entered. Forward takes the events
    0 .. n-1, backward mirrors it in n .. 2n-1.
    """
    count = len(sites)
    windows: list[list[Window]] = [[] for _ in range(unit_count)]
    for entry, (units, depth) in enumerate(sites):
        last = entry
        while last + 1 < count and sites[last + 1][1] > depth:
            last += 1
        for unit in units:
            windows[unit].append(Window(entry, last))
            windows[unit].append(Window(2 * count - 1 - last, 2 * count - 1 - entry))
    return windows


def _lead(windows: Sequence[Window], lead: int) -> list[Window]:
    return [Window(window.start - lead, window.end) for window in windows]


def _first_fit(
    sizes: Sequence[int], windows: Sequence[Sequence[Window]], frames: int, order: Sequence[int], spread: bool
) -> list[int] | None:
    """Places units in ``order``, each at the lowest offset that is free of conflicts.

    With ``spread`` it takes the one that shares fewest frames with any other unit instead, so that units stay cached
    when there is room.
    """
    offsets = [-1] * len(sizes)
    placed: list[int] = []
    for unit in order:
        conflicts = [
            (offsets[other], offsets[other] + sizes[other])
            for other in placed
            if any(a.meets(b) for a in windows[unit] for b in windows[other])
        ]
        runs = [(offsets[other], offsets[other] + sizes[other]) for other in placed]
        best: tuple[int, int] | None = None
        for start in sorted({0, *(end for _, end in runs)}):
            end = start + sizes[unit]
            if end > frames or any(start < high and low < end for low, high in conflicts):
                continue
            shared = sum(max(0, min(end, high) - max(start, low)) for low, high in runs) if spread else 0
            if best is None or (shared, start) < best:
                best = (shared, start)
            if shared == 0:
                break
        if best is None:
            return None
        offsets[unit] = best[1]
        placed.append(unit)
    return offsets


def _by_size(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit))


def _tightest(sizes: Sequence[int], windows: Sequence[Sequence[Window]]) -> list[int]:
    """The lowest packing of two orders: largest first, and first used first, which is best among equal sizes."""
    by_start = sorted(range(len(sizes)), key=lambda unit: min((w.start for w in windows[unit]), default=0))
    packings = []
    for order in (_by_size(sizes), by_start):
        packed = _first_fit(sizes, windows, sum(sizes), order, spread=False)
        assert packed is not None, "an arena that holds all units side by side packs"
        packings.append(packed)
    return min(packings, key=lambda packed: _peak(packed, sizes))


def _peak(offsets: Sequence[int], sizes: Sequence[int]) -> int:
    return max((offset + size for offset, size in zip(offsets, sizes)), default=0)


def _peak_live(sizes: Sequence[int], windows: Sequence[Sequence[Window]]) -> int:
    changes: dict[int, int] = {}
    for size, unit_windows in zip(sizes, windows):
        for start, end in _merge(unit_windows):
            changes[start] = changes.get(start, 0) + size
            changes[end + 1] = changes.get(end + 1, 0) - size
    live = peak = 0
    for time in sorted(changes):
        live += changes[time]
        peak = max(peak, live)
    return peak


def _merge(windows: Sequence[Window]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for window in sorted(windows, key=lambda window: window.start):
        if merged and window.start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], window.end))
        else:
            merged.append((window.start, window.end))
    return merged


def place_units(
    sizes: Sequence[int], windows: Sequence[Sequence[Window]], frames: int, max_lead: int = 4
) -> ArenaPlacement | None:
    """Places runs of ``sizes[u]`` frames in an arena of ``frames``; None when even use on demand does not fit.

    All units side by side if they fit; else the largest lead of fetches over uses, up to ``max_lead``, that packs.
    """
    bound = _peak_live(sizes, windows)
    if sum(sizes) <= frames:
        offsets, position = [], 0
        for size in sizes:
            offsets.append(position)
            position += size
        return ArenaPlacement(tuple(offsets), position, bound, max_lead)
    for lead in range(max_lead, -1, -1):
        ahead = [_lead(unit_windows, lead) for unit_windows in windows]
        packed = _first_fit(sizes, ahead, frames, _by_size(sizes), spread=True)
        if packed is not None:
            return ArenaPlacement(tuple(packed), _peak(packed, sizes), bound, lead)
    tightest = _tightest(sizes, windows)
    peak = _peak(tightest, sizes)
    return ArenaPlacement(tuple(tightest), peak, bound, 0) if peak <= frames else None


def needed_frames(sizes: Sequence[int], windows: Sequence[Sequence[Window]]) -> int:
    """Frames with which, and with any more, use on demand packs: what a refusal asks for."""
    return _peak(_tightest(sizes, windows), sizes)
