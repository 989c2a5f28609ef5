"""Packing of units into the device arena, against brute force over events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from angelptm.plan import Window, place_units, windows_of
from angelptm.plan.arena import needed_frames

SETTINGS = settings(max_examples=150, deadline=None)


@st.composite
def unit_windows(draw: st.DrawFn) -> tuple[list[int], list[list[Window]]]:
    """Sizes, and windows in any position: harder than what a training step gives."""
    count = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    window = st.tuples(st.integers(0, 12), st.integers(0, 4)).map(lambda pair: Window(pair[0], sum(pair)))
    return sizes, [draw(st.lists(window, min_size=1, max_size=3)) for _ in range(count)]


def live_at(windows: list[list[Window]], time: int) -> list[int]:
    return [unit for unit, own in enumerate(windows) if any(w.start <= time <= w.end for w in own)]


def events(windows: list[list[Window]]) -> range:
    return range(min(w.start for own in windows for w in own), max(w.end for own in windows for w in own) + 1)


def peak_live(sizes: list[int], windows: list[list[Window]]) -> int:
    return max(sum(sizes[unit] for unit in live_at(windows, time)) for time in events(windows))


@SETTINGS
@given(unit_windows(), st.integers(0, 40))
def test_units_in_use_at_the_same_time_share_no_frame(case: tuple[list[int], list[list[Window]]], frames: int) -> None:
    sizes, windows = case
    placement = place_units(sizes, windows, frames)
    if placement is None:
        return
    for time in events(windows):
        taken: set[int] = set()
        for unit in live_at(windows, time):
            run = set(range(placement.offsets[unit], placement.offsets[unit] + sizes[unit]))
            assert not taken & run
            taken |= run
    ends = [offset + size for offset, size in zip(placement.offsets, sizes, strict=True)]
    assert min(placement.offsets) >= 0
    assert placement.peak_frames == max(ends) <= frames
    assert placement.peak_frames >= placement.lower_bound_frames == peak_live(sizes, windows)


@SETTINGS
@given(unit_windows(), st.integers(0, 40))
def test_prefetch_lead_keeps_units_apart_too(case: tuple[list[int], list[list[Window]]], frames: int) -> None:
    sizes, windows = case
    placement = place_units(sizes, windows, frames)
    if placement is None:
        return
    ahead = [[Window(w.start - placement.lead, w.end) for w in own] for own in windows]
    for one in range(len(sizes)):
        for two in range(one):
            if any(a.meets(b) for a in ahead[one] for b in ahead[two]):
                low, high = sorted((one, two), key=lambda unit: placement.offsets[unit])
                assert placement.offsets[low] + sizes[low] <= placement.offsets[high]


@SETTINGS
@given(unit_windows())
def test_needed_frames_pack_and_so_does_every_larger_arena(case: tuple[list[int], list[list[Window]]]) -> None:
    sizes, windows = case
    needed = needed_frames(sizes, windows)
    assert peak_live(sizes, windows) <= needed <= sum(sizes)
    for frames in range(needed, sum(sizes) + 2):
        assert place_units(sizes, windows, frames) is not None


@SETTINGS
@given(unit_windows())
def test_one_frame_less_than_the_lower_bound_never_packs(case: tuple[list[int], list[list[Window]]]) -> None:
    sizes, windows = case
    assert place_units(sizes, windows, peak_live(sizes, windows) - 1) is None


@pytest.mark.parametrize("blocks", [1, 2, 5, 24])
def test_equal_blocks_used_one_after_another_need_one_block(blocks: int) -> None:
    windows = windows_of([((unit,), 0) for unit in range(blocks)], blocks)
    assert needed_frames([7] * blocks, windows) == 7


def test_units_keep_frames_of_their_own_where_there_is_room() -> None:
    windows = windows_of([((unit,), 0) for unit in range(4)], 4)
    placement = place_units([3, 2, 3, 1], windows, 9)
    assert placement is not None
    assert placement.offsets == (0, 3, 5, 8)
    assert placement.peak_frames == 9


def test_outer_site_is_in_use_while_inner_ones_compute() -> None:
    # A model that owns a parameter itself (unit 0) around two blocks: sites (units, depth) in order of entry.
    windows = windows_of([((0,), 0), ((1,), 1), ((2,), 1)], 3)
    assert windows == [[Window(0, 2), Window(3, 5)], [Window(1, 1), Window(4, 4)], [Window(2, 2), Window(3, 3)]]


def test_unit_tied_to_a_later_site_is_in_use_at_both() -> None:
    windows = windows_of([((0,), 0), ((1,), 0), ((2, 0), 0)], 3)
    assert windows[0] == [Window(0, 0), Window(5, 5), Window(2, 2), Window(3, 3)]
    # The head is in use beside the tied unit, the block between takes their frames: max(4 + 1, 3).
    assert needed_frames([4, 3, 1], windows) == 5
