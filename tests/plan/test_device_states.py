"""Optimizer states in device memory that parameters leave over."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from angelptm.errors import CapacityError
from angelptm.plan import CommitBudget, Plan, SsdBudget, make_schedule, plan_summary, simulate

from .cases import FREE, PAGE, RATES, Case, blocks, frames_of, models

SETTINGS = settings(max_examples=100, deadline=None)


def plan_or_assume(case: Case, device: int, host: int, **more: object) -> Plan:
    try:
        return case.plan(device, host, **more)
    except CapacityError:
        assume(False)
        raise


@SETTINGS
@given(models(), st.integers(1, 120), st.integers(8, 120))
def test_states_take_frames_behind_the_parameters_that_no_one_else_has(case: Case, device: int, host: int) -> None:
    plan = plan_or_assume(case, device, host, states_on_device=True)
    taken: set[int] = set()
    for unit in range(len(plan.units)):
        taken |= set(frames_of(plan, plan.arena.offsets, unit))
    assert len(taken) == plan.arena.peak_frames or plan.kind_bytes["PARAM"]["device"] == 0
    frames = 0
    for unit_plan in plan.units:
        for span in unit_plan.spans:
            assert (span.states_home == "device") == (span.state_frame is not None)
            if span.state_frame is not None:
                assert span.param_home == "device"
                size = 3 * -(-span.elements * 4 // PAGE)
                run = set(range(span.state_frame, span.state_frame + size))
                assert not run & taken
                taken |= run
                frames += size
    assert max(taken, default=-1) < plan.device_frames
    assert frames == plan.device_state_frames
    assert sum(plan.kind_bytes[kind]["device"] for kind in ("MASTER", "EXP_AVG", "EXP_AVG_SQ")) == frames * PAGE


@SETTINGS
@given(models(), st.integers(1, 120), st.integers(8, 120))
def test_without_leave_nothing_changes(case: Case, device: int, host: int) -> None:
    plan = plan_or_assume(case, device, host)
    assert all(span.states_home != "device" and span.state_frame is None for u in plan.units for span in u.spans)
    for states in ("host", "ssd", 0.5):  # asked for by name
        forced = case.budgets(device, host, states_on_device=True, states=states)
        assert forced.states == states
        try:
            asked = case.plan(device, host, states_on_device=True, states=states)
        except CapacityError:
            continue
        assert asked == case.plan(device, host, states=states)


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(10, 60))
def test_more_device_memory_never_means_more_states_elsewhere_or_more_traffic(case: Case, host: int) -> None:
    trace = case.trace()
    former: tuple[int, int] | None = None
    for device in range(1, 140):
        try:
            plan = case.plan(device, host, states_on_device=True)
        except CapacityError:
            assert former is None
            continue
        elsewhere = sum(size for tiers in plan.kind_bytes.values() for tier, size in tiers.items() if tier == "ssd")
        now = (elsewhere, make_schedule(plan, trace).traffic_bytes)
        assert former is None or (now[0] <= former[0] and now[1] <= former[1])
        former = now
    assume(former is not None)


def test_states_that_fit_the_device_need_no_ssd_and_are_counted_there() -> None:
    case = blocks(4, 2)  # 8 pages of parameters, 24 of states
    plan = case.plan(8 + 24, 12, states_on_device=True)
    assert plan.ssd_slots == 0
    assert plan.device_state_frames == 24
    device = plan_summary(plan)["device"]
    assert isinstance(device, dict)
    assert device["peak_bytes"] == 32 * PAGE
    trace = case.trace()
    step = simulate(plan, trace, make_schedule(plan, trace), RATES)
    assert step.peak_bytes["device"] == 32 * PAGE
    assert step.busy_seconds["ssd"] == 0
    one_less = case.plan(8 + 23, 12, states_on_device=True)
    assert one_less.device_state_frames == 21


def test_commits_copy_states_of_the_device_as_those_of_the_host() -> None:
    case = blocks(4, 2)
    commits = CommitBudget(2, SsdBudget("commits", None, FREE))
    on_device = case.plan(32, 400, states_on_device=True, commits=commits)
    on_host = case.plan(32, 400, commits=commits)
    assert on_device.commit_slots == on_host.commit_slots
    assert replace(on_device, kind_bytes=on_host.kind_bytes).commit_slots == on_host.commit_slots
