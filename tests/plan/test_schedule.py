"""Schedules against a dictionary model of the arena that carries them out, step after step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from angelptm.errors import CapacityError
from angelptm.plan import Budgets, Plan, Schedule, SsdBudget, Trace, Window, make_plan, make_schedule
from angelptm.plan.moves import residents_of
from angelptm.plan.residence import Residents, frames_needed, gaps_of, packings, retained, use_masks

from .cases import FREE, PAGE, Case, blocks, frames_of, layout_of, models, planned, trained

SETTINGS = settings(max_examples=200, deadline=None)


class Arena:
    """Frames and who is in them; carries out a schedule and notices every move that is too early or missing."""

    def __init__(self, plan: Plan, trace: Trace, schedule: Schedule) -> None:
        self.plan, self.trace, self.schedule = plan, trace, schedule
        self.owner: dict[int, int] = {}
        self.version: dict[int, int] = {}
        self.submitted = dict.fromkeys(trained(trace), 0)
        self.home_device = [
            all(h == "device" for h in [*(s.param_home for s in u.spans), *u.frozen_homes]) for u in plan.units
        ]
        self.loads = 0

    def frames(self, unit: int) -> range:
        return frames_of(self.plan, self.schedule.offsets, unit)

    def load(self, unit: int, slot: int, step: int) -> None:
        for frame in self.frames(unit):
            other = self.owner.get(frame)
            if other is not None and other != unit:
                opened = [w for w in self.trace.windows()[other] if w.start < slot <= w.end]
                assert not opened, f"unit {other} is in use when unit {unit} takes its frames"
            if other == unit:
                assert not [w for w in self.trace.windows()[unit] if w.start < slot <= w.end], "it is in use"
        for frame in self.frames(unit):
            if (other := self.owner.get(frame)) is not None:
                self.drop(other)
        for frame in self.frames(unit):
            self.owner[frame] = unit
        self.version[unit] = step
        self.loads += 1

    def drop(self, unit: int) -> None:
        self.owner = {frame: owner for frame, owner in self.owner.items() if owner != unit}

    def issue(self, slot: int, step: int) -> None:
        period = self.schedule.use_count + 1
        for fetch in self.schedule.fetches:
            if fetch.trigger % period != slot:
                continue
            target = step + (fetch.trigger < 0)
            if fetch.unit in self.submitted:
                assert self.submitted[fetch.unit] >= target, "fetched before its update was asked for"
            self.load(fetch.unit, slot, target)

    def run(self, steps: int) -> None:
        count = self.schedule.use_count
        for unit, there in enumerate(self.home_device):
            if there:
                for frame in self.frames(unit):
                    assert frame not in self.owner
                    self.owner[frame] = unit
        for step in range(steps):
            for slot in range(count):
                self.issue(slot, step)
                for unit in self.trace.uses[slot].units:
                    there = all(self.owner.get(frame) == unit for frame in self.frames(unit))
                    current = unit not in self.submitted or self.version.get(unit) == step
                    if step > 0 and not self.home_device[unit]:
                        assert there, f"unit {unit} is not there at use {slot}"
                        assert current, f"unit {unit} is outdated at use {slot}"
                    elif not self.home_device[unit] and not (there and current):
                        self.load(unit, slot, step)  # the first step begins with an empty arena
                self.end_use(slot)
            for unit in self.submitted:
                if self.is_late(unit):
                    self.update(unit)
            self.issue(count, step)

    def is_late(self, unit: int) -> bool:
        return self.schedule.updates == "forward" or self.plan.units[unit].waits_for_step

    def end_use(self, slot: int) -> None:
        for unit, done in trained(self.trace).items():
            if not self.is_late(unit) and max(done.use, *(w.end for w in self.trace.windows()[unit])) == slot:
                self.update(unit)

    def update(self, unit: int) -> None:
        self.submitted[unit] += 1
        if not self.home_device[unit]:
            self.drop(unit)


@SETTINGS
@given(
    planned(),
    st.sampled_from([None, 0, 1, 3]),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
    st.sampled_from(["backward", "forward"]),
)
def test_every_use_finds_its_units_and_no_move_takes_frames_in_use(
    case: tuple[Case, Trace, Plan], lead: int | None, room: int, retain: bool, updates: str
) -> None:
    _, trace, plan = case
    schedule = make_schedule(plan, trace, lead=lead, room=room, retain=retain, updates=updates)
    arena = Arena(plan, trace, schedule)
    arena.run(3)
    assert max(frames_of(plan, schedule.offsets, u).stop for u in range(len(plan.units))) == schedule.peak_frames
    assert schedule.lower_bound_frames <= schedule.peak_frames <= plan.device_frames
    for fetch in schedule.fetches:
        assert -len(trace.uses) - 1 <= fetch.read_ahead_trigger <= fetch.trigger <= fetch.use
        assert lead is None or fetch.use - fetch.trigger <= lead


@SETTINGS
@given(planned(), st.sampled_from(["backward", "forward"]))
def test_fetches_are_issued_as_early_as_memory_permits(case: tuple[Case, Trace, Plan], updates: str) -> None:
    _, trace, plan = case
    schedule = make_schedule(plan, trace, updates=updates)
    for place, fetch in enumerate(schedule.fetches):
        earlier = fetch.trigger - 1
        if earlier <= -len(trace.uses) - 1:
            continue
        fetches = list(schedule.fetches)
        fetches[place] = type(fetch)(**{**vars(fetch), "trigger": earlier, "read_ahead_trigger": earlier})
        bold = type(schedule)(**{**vars(schedule), "fetches": tuple(fetches)})
        own_end = max((w.end for w in trace.windows()[fetch.unit] if w.end < fetch.use), default=None)
        if own_end is not None and earlier <= own_end:
            continue  # the unit is still there
        if fetch.trigger < 0 and fetch.unit not in trained(trace):
            continue
        with pytest.raises(AssertionError):
            Arena(plan, trace, bold).run(3)


@SETTINGS
@given(planned())
def test_pages_read_ahead_never_exceed_the_staging_frames(case: tuple[Case, Trace, Plan]) -> None:
    _, trace, plan = case
    schedule = make_schedule(plan, trace)
    period = len(trace.uses) + 1
    held = [0] * period
    for fetch in schedule.fetches:
        if fetch.read_ahead_trigger < fetch.trigger:
            for slot in range(fetch.read_ahead_trigger, fetch.trigger):
                held[slot % period] += min(fetch.ssd_pages, schedule.read_ahead_frames)
    assert max(held) <= schedule.read_ahead_frames


@settings(max_examples=60, deadline=None)
@given(models(), st.sampled_from(["auto", "host", "ssd"]))
def test_a_larger_arena_never_means_more_traffic(case: Case, param: str) -> None:
    trace = case.trace()
    former: int | None = None
    total = sum(-(-layout.trainable_elements * case.itemsize // PAGE) for layout in case.layouts)
    total += sum(-(-layout.frozen_elements * case.itemsize // PAGE) for layout in case.layouts)
    for device in range(1, total + 2):
        try:
            plan = case.plan(device, 300, param=param)
        except CapacityError:
            assert former is None
            continue
        moved = make_schedule(plan, trace).traffic_bytes
        assert former is None or moved <= former
        former = moved
    assert former is not None


@settings(max_examples=60, deadline=None)
@given(models(), st.integers(2, 16))
def test_a_larger_host_pool_never_means_more_traffic(case: Case, device: int) -> None:
    trace = case.trace()
    former: int | None = None
    for host in range(8, 160):
        try:
            plan = case.plan(device, host)
        except CapacityError:
            continue
        moved = make_schedule(plan, trace).traffic_bytes
        assert former is None or moved <= former
        former = moved
    assume(former is not None)


windows = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=3)


@SETTINGS
@given(st.lists(windows, min_size=1, max_size=5), st.integers(0, 6))
def test_no_choice_keeps_more_units_of_one_size_than_farthest_next_use_out(
    drawn: list[list[tuple[int, int]]], spare: int
) -> None:
    own = tuple(tuple(Window(start, start + length) for start, length in unit) for unit in drawn)
    count = len(own)
    residents = Residents((1,) * count, (1,) * count, own, (True,) * count, (-1,) * count, 12)
    needed = frames_needed(residents, use_masks(residents, 0))
    capacity = max(needed) + spare
    inner = [index for index, gap in enumerate(gaps_of(residents)) if gap.may_keep]

    def fits(kept: tuple[int, ...]) -> bool:
        gaps = [gaps_of(residents)[index] for index in kept]
        return all(
            live + sum(gap.start <= slot <= gap.end for gap in gaps) <= capacity for slot, live in enumerate(needed)
        )

    chosen = tuple(sorted(retained(residents, needed, capacity)))
    assert fits(chosen)
    most = max(len(kept) for n in range(len(inner) + 1) for kept in itertools.combinations(inner, n) if fits(kept))
    assert len(chosen) == most


@pytest.mark.parametrize("count", [2, 5, 12])
@pytest.mark.parametrize("updates", ["backward", "forward"])
def test_blocks_nearest_the_turn_stay(count: int, updates: str) -> None:
    case = blocks(count)
    trace = case.trace()
    for held in range(1, count):
        schedule = make_schedule(case.plan(2 * held, 400, param="host"), trace, updates=updates)
        # Every block is fetched for forward; for backward those that did not stay over the turn.
        again = [fetch.unit for fetch in schedule.fetches if fetch.use >= count]
        assert again == list(range(count - held - 1, -1, -1))
        assert len(schedule.fetches) == 2 * count - held
    everything = make_schedule(case.plan(2 * count, 400, param="host"), trace, updates=updates)
    assert len(everything.fetches) == count


def test_frozen_units_that_fit_are_never_fetched_again() -> None:
    layouts = [*blocks(2).layouts]
    layouts.append(layout_of(2, 0, PAGE // 4))
    case = Case(tuple(layouts), (((0,), 0), ((1,), 0), ((2,), 0)))
    schedule = make_schedule(case.plan(5, 400, param="host"), case.trace())
    assert [fetch.unit for fetch in schedule.fetches] == [0, 1]


def test_traffic_counts_whole_contents_and_ssd_blocks() -> None:
    # 1200 fp32 elements, 4800 bytes of gradient. Pages hold 1280, a whole multiple of 128: 5120 bytes of content, two
    # blocks on the SSD, where everything lives.
    case = Case((layout_of(0, 1200),), (((0,), 0),))
    budgets = Budgets(PAGE, PAGE, 20 * PAGE, (SsdBudget("a", None, FREE),), param="ssd", grad="ssd", states="ssd")
    plan = make_plan(case.layouts, case.sites, budgets, param_itemsize=4, grad_itemsize=4, moment_count=2)
    traffic = make_schedule(plan, case.trace()).traffic
    zero = {"ssd_read": 0, "ssd_written": 0, "host_to_device": 0, "device_to_host": 0, "published": 0}
    both = {"ssd_read": 8192, "ssd_written": 8192}
    assert traffic["PARAM"] == {**zero, **both, "host_to_device": 5120, "published": 5120}
    assert traffic["GRAD"] == {**zero, **both, "device_to_host": 4800}
    for kind in ("MASTER", "EXP_AVG", "EXP_AVG_SQ"):
        assert traffic[kind] == {**zero, **both}


def test_orders_follow_need_and_completion() -> None:
    case = blocks(4)
    schedule = make_schedule(case.plan(4, 60), case.trace())
    assert schedule.update_order == (0, 1, 2, 3)
    assert schedule.read_ahead_order == (3, 2, 1, 0)
    assert [move.unit for move in schedule.copy_outs] == [3, 2, 1, 0]
    late = make_schedule(case.plan(4, 60), case.trace(), updates="forward")
    assert late.read_ahead_order == (0, 1, 2, 3)
    assert make_schedule(case.plan(4, 60), case.trace(), read_states_ahead=False).read_ahead_order == ()


def test_arena_too_small_for_the_trace_is_refused_with_what_is_enough() -> None:
    case = blocks(3)
    plan = case.plan(2, 100, param="host")
    trace = case.trace()
    together = replace(trace, uses=(replace(trace.uses[0], last=2), *trace.uses[1:]))
    with pytest.raises(CapacityError) as refused:
        make_schedule(plan, together)
    assert refused.value.needed_bytes == 4 * PAGE
    make_schedule(case.plan(4, 100, param="host"), together)


def test_packings_do_not_depend_on_the_arena() -> None:
    case = blocks(5)
    small, large = (residents_of(case.plan(device, 100, param="host"), case.trace(), "backward") for device in (4, 8))
    assert packings(small, 0, True) == packings(large, 0, True)
