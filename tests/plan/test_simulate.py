"""The simulator: hand-computed steps, channels on their own, and what must hold of any step."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from angelptm.plan import (
    GradientDone,
    Plan,
    Prediction,
    Rates,
    Settings,
    Trace,
    Use,
    choose,
    make_schedule,
    simulate,
)
from angelptm.plan.channels import Cores, Machine, Ssd

from .cases import PAGE, RATES, Case, blocks, layout_of, planned

SETTINGS = settings(max_examples=100, deadline=None)
ELEMENTS = PAGE // 4  # of a page of fp32
# A page of parameters takes a second to the device; a page of elements a second to update; three pages of states a
# second to read, and two to write.
UNIT_RATES = Rates(
    ssd_read_bytes_per_s=3 * PAGE,
    ssd_write_bytes_per_s=1.5 * PAGE,
    ssd_mixed_bytes_per_s=2 * PAGE,
    ssd_latency_seconds=0.0,
    host_to_device_bytes_per_s=PAGE,
    device_to_host_bytes_per_s=PAGE,
    update_elements_per_s=ELEMENTS,
    gradient_bytes_per_s=PAGE,
    cores=1,
    compute_uses_cores=False,
)


def pages_in_turn(count: int, forward: float, backward: float, copy: float) -> tuple[Case, Trace]:
    """``count`` units of one page, each used for ``forward`` and ``backward`` seconds."""
    case = Case(tuple(layout_of(u, ELEMENTS) for u in range(count)), tuple(((u,), 0) for u in range(count)))
    uses = [Use(u, (u,), "forward", forward, u) for u in range(count)]
    uses += [Use(u, (u,), "backward", backward, 2 * count - 1 - u) for u in reversed(range(count))]
    gradients = tuple(GradientDone(u, 2 * count - 1 - u, PAGE, copy) for u in reversed(range(count)))
    return case, replace(case.trace(), uses=tuple(uses), gradients=gradients)


def run(plan: Plan, trace: Trace, rates: Rates, settings: Settings | None = None, **more: object) -> Prediction:
    settings = settings or Settings()
    return simulate(plan, trace, make_schedule(plan, trace, updates=settings.updates, **more), rates, settings)


def test_one_unit_in_memory_computes_copies_updates_and_comes_back() -> None:
    case, trace = pages_in_turn(1, forward=2, backward=3, copy=0.5)
    plan = case.plan(1, 20, param="host", update_threads=1, ring_depth=1)
    step = run(plan, trace, UNIT_RATES)
    # Forward 2, backward 3, gradients 0.5; then update 1 and fetch 1, which nothing hides.
    assert step.step_seconds == pytest.approx(7.5)
    assert step.stall_seconds == pytest.approx({"update of unit0": 1, "fetch of unit0": 1})
    assert step.busy_seconds["compute"] == pytest.approx(5)
    assert step.busy_seconds["gradient copy"] == pytest.approx(0.5)
    assert step.busy_seconds["host_to_device"] == pytest.approx(1)
    assert step.busy_seconds["updater"] == pytest.approx(1)
    assert step.busy_seconds["ssd"] == 0
    assert (step.bottleneck, step.second_bottleneck) == ("compute", "host_to_device")


@pytest.mark.parametrize(("updates", "seconds"), [("backward", 6), ("forward", 6)])
def test_second_unit_is_updated_and_fetched_under_the_first(updates: str, seconds: float) -> None:
    case, trace = pages_in_turn(2, forward=1, backward=1, copy=1e-9)
    plan = case.plan(2, 20, param="host", update_threads=1, ring_depth=1)
    # From the end of backward on. Backward: unit 1 was updated under unit 0's backward and is fetched 0-1, unit 0 is
    # updated 0-1 and fetched 1-2. Forward: unit 0 is updated 0-1 and fetched 1-2, unit 1 updated 1-2 and fetched 2-3,
    # when unit 0 computes.
    step = run(plan, trace, UNIT_RATES, Settings(updates=updates))
    assert step.step_seconds == pytest.approx(seconds)
    assert step.stall_seconds == pytest.approx({"update of unit0": 1, "fetch of unit0": 1})


@pytest.mark.parametrize(
    ("mode", "seconds"),
    [
        # Forward 4, backward 4, then read 1, kernel 1, write 2, fetch 1, one after another.
        ("serial", 13),
        # The write goes on under the fetch and the next forward.
        ("demand", 11),
        # So does the read: the states are there before the gradients.
        ("planned", 10),
    ],
)
def test_states_on_the_ssd_cost_what_no_mode_hides(mode: str, seconds: float) -> None:
    case, trace = pages_in_turn(1, forward=4, backward=4, copy=1e-9)
    plan = case.plan(1, 20, param="host", grad="host", states="ssd", update_threads=1, ring_depth=1)
    assert run(plan, trace, UNIT_RATES, Settings(mode)).step_seconds == pytest.approx(seconds)


def test_parameters_on_the_ssd_are_handed_to_the_fetch_that_waits() -> None:
    case, trace = pages_in_turn(1, forward=4, backward=4, copy=1e-9)
    plan = case.plan(1, 20, param="ssd", grad="host", states="host", update_threads=1, ring_depth=1)
    step = run(plan, trace, UNIT_RATES)
    # Kernel 1 and fetch 1; nothing is read from the SSD, and the write goes on under the forward.
    assert step.step_seconds == pytest.approx(10)
    assert step.handed_over_bytes == PAGE
    assert step.traffic["PARAM"]["ssd_read"] == 0
    # In series nobody waits for it, and it stays in a staging frame: kernel 1, then the write of 2/3 and the copy.
    serial = run(plan, trace, UNIT_RATES, Settings("serial"))
    assert serial.step_seconds == pytest.approx(10 + 2 / 3)
    assert serial.handed_over_bytes == PAGE


def test_gradients_on_the_ssd_are_written_before_the_update_reads_them() -> None:
    case, trace = pages_in_turn(1, forward=4, backward=4, copy=1e-9)
    plan = case.plan(1, 20, param="host", grad="ssd", states="host", update_threads=1, ring_depth=1)
    # Write 2/3, read 1/3, kernel 1, fetch 1.
    assert run(plan, trace, UNIT_RATES).step_seconds == pytest.approx(8 + 2 / 3 + 1 / 3 + 2)


def test_next_update_of_a_span_waits_until_the_last_is_written() -> None:
    case, trace = pages_in_turn(1, forward=0.5, backward=0.5, copy=1e-9)
    plan = case.plan(1, 20, param="host", grad="host", states="ssd", update_threads=1, ring_depth=3)
    # Read 1, kernel 1, write 2 of one span after another; computing and fetching go on under the write.
    for mode in ("planned", "demand"):
        assert run(plan, trace, UNIT_RATES, Settings(mode)).step_seconds == pytest.approx(4)


def test_latency_is_paid_once_a_transfer() -> None:
    case, trace = pages_in_turn(1, forward=4, backward=4, copy=1e-9)
    plan = case.plan(1, 20, param="host", grad="host", states="ssd", update_threads=1, ring_depth=1)
    slow = replace(UNIT_RATES, ssd_latency_seconds=0.25)
    assert run(plan, trace, slow, Settings("serial")).step_seconds == pytest.approx(13.5)


def test_reads_and_writes_of_the_ssd_share_the_mixed_rate() -> None:
    machine = Machine(Ssd(100, 50, 60), Cores(1))
    ended: dict[str, float] = {}
    machine.transfer(write=False, size=100, latency=0, done=lambda: ended.update(read=machine.now))
    machine.transfer(write=True, size=50, latency=0, done=lambda: ended.update(write=machine.now))
    while machine.step():
        pass
    # 30 bytes a second each until the write is done; then the read's last 50 at 100 a second.
    assert ended == pytest.approx({"write": 50 / 30, "read": 50 / 30 + 0.5})
    assert machine.ssd.busy_seconds == pytest.approx(50 / 30 + 0.5)


def test_two_reads_get_half_the_rate_each() -> None:
    machine = Machine(Ssd(100, 50, 60), Cores(1))
    ended: list[float] = []
    for size in (50, 100):
        machine.transfer(write=False, size=size, latency=0, done=lambda: ended.append(machine.now))
    while machine.step():
        pass
    assert ended == pytest.approx([1, 1.5])


def test_computing_takes_all_cores_and_shares_them_with_an_update() -> None:
    machine = Machine(Ssd(1, 1, 1), Cores(2))
    ended: dict[str, float] = {}
    machine.compute_on_cores(2, lambda: ended.update(compute=machine.now))
    machine.run_on_core(1, lambda: ended.update(update=machine.now))
    while machine.step():
        pass
    # Three threads on two cores: 2/3 of the speed until the update is done.
    assert ended == pytest.approx({"update": 1.5, "compute": 2.5})
    assert machine.cores.busy_seconds == pytest.approx(2.5)


def test_computing_is_slower_while_the_drive_is_busy() -> None:
    machine = Machine(Ssd(10, 10, 10), Cores(2, compute_beside_drive=0.5))
    ended: dict[str, float] = {}
    machine.compute_on_cores(2, lambda: ended.update(compute=machine.now))
    machine.transfer(write=False, size=10, latency=1, done=lambda: ended.update(read=machine.now))
    while machine.step():
        pass
    # A second alone, a second at half the speed while the read is under way, and what is left alone.
    assert ended == pytest.approx({"read": 2, "compute": 2.5})


def test_measured_shares_of_the_cores_take_the_place_of_even_ones() -> None:
    machine = Machine(Ssd(1, 1, 1), Cores(2, 2, 0.8, 0.4))
    ended: dict[str, float] = {}
    machine.compute_on_cores(2, lambda: ended.update(compute=machine.now))
    for work in (0.6, 0.9):
        machine.run_on_core(work, lambda work=work: ended.update({f"update {work}": machine.now}))
    while machine.step():
        pass
    # Beside two threads each has 3/4 of what it has beside one. 2 s: 0.6 of each update, 1.2 of computing; then 0.8 at
    # 0.8 while the other update gets 0.4: its 0.3 take 0.75 s, in which computing does 0.6; its last 0.2 are alone.
    assert ended == pytest.approx({"update 0.6": 2, "update 0.9": 2.75, "compute": 2.95})


@SETTINGS
@given(
    planned(),
    st.sampled_from(["planned", "planned", "demand", "serial"]),
    st.sampled_from(["backward", "forward"]),
    st.fixed_dictionaries(
        {
            "lead": st.sampled_from([None, 0, 1, 3]),
            "room": st.sampled_from([0, 1, 3]),
            "read_ahead_frames": st.sampled_from([None, 0, 1, 4]),
            "read_states_ahead": st.booleans(),
        }
    ),
)
def test_a_step_is_computing_copying_and_waiting_and_no_channel_is_busy_longer(
    case: tuple[Case, Trace, Plan], mode: str, updates: str, options: dict[str, object]
) -> None:
    _, trace, plan = case
    for rates in (RATES, replace(RATES, compute_uses_cores=False, cores=1), UNIT_RATES):
        step = run(plan, trace, rates, Settings(mode, updates), **options)
        whole = step.busy_seconds["compute"] + step.busy_seconds["gradient copy"] + sum(step.stall_seconds.values())
        assert step.step_seconds == pytest.approx(whole)
        for channel, seconds in step.busy_seconds.items():
            assert seconds <= step.step_seconds * (1 + 1e-6), channel
        assert step.peak_bytes["device"] <= plan.device_frames * PAGE
        assert step.peak_bytes["host"] <= plan.host_frames * PAGE
        # The events are those of the last step, whose length is the step's where all are alike.
        computed = max(event.end for event in step.events if event.lane == "compute")
        assert computed <= step.step_seconds * (1 + 1e-6) or not step.steady
        for event in step.events:
            assert event.start <= event.end <= computed * (1 + 1e-6)


@SETTINGS
@given(planned(), st.sampled_from(["planned", "demand", "serial"]), st.sampled_from(["backward", "forward"]))
def test_bytes_moved_are_those_of_the_schedule_less_what_was_handed_over(
    case: tuple[Case, Trace, Plan], mode: str, updates: str
) -> None:
    _, trace, plan = case
    schedule = make_schedule(plan, trace, updates=updates)
    step = simulate(plan, trace, schedule, RATES, Settings(mode, updates))
    handed = schedule.traffic["PARAM"]["ssd_read"] - step.traffic["PARAM"]["ssd_read"]
    pages = sum(fetch.ssd_pages for fetch in schedule.fetches)
    if not step.steady:  # spans lie across its ends: as many as there are ring slots
        slots = plan.update_threads * plan.ring_depth
        for kind in ("GRAD", "MASTER", "EXP_AVG", "EXP_AVG_SQ"):
            for link in ("ssd_read", "ssd_written"):
                assert abs(step.traffic[kind][link] - schedule.traffic[kind][link]) <= 2 * PAGE * slots
        return
    assert step.handed_over_bytes <= handed <= step.handed_over_bytes + 4096 * pages
    assert (step.handed_over_bytes == 0) == (handed == 0)
    step.traffic["PARAM"]["ssd_read"] += handed
    assert step.traffic == schedule.traffic


def test_steps_of_equal_blocks_become_steady() -> None:
    case = blocks(8, 3)
    trace = case.trace()
    steady = [
        run(case.plan(device, host), trace, RATES, Settings(mode)).steady
        for device in (3, 9, 15, 30)
        for host in (40, 80, 160)
        for mode in ("planned", "demand", "serial")
    ]
    assert sum(steady) >= len(steady) - 2


@SETTINGS
@given(planned(), st.sampled_from(["backward", "forward"]))
def test_simulation_is_deterministic(case: tuple[Case, Trace, Plan], updates: str) -> None:
    _, trace, plan = case
    assert run(plan, trace, RATES, Settings(updates=updates)) == run(plan, trace, RATES, Settings(updates=updates))


@settings(max_examples=60, deadline=None)
@given(planned(), st.sampled_from(["backward", "forward"]), st.sampled_from([1e-10, 1e-9, 1e-8]))
def test_chosen_is_no_slower_than_on_demand_and_that_no_slower_than_serial(
    case: tuple[Case, Trace, Plan], updates: str, seconds_per_element: float
) -> None:
    model, _, plan = case
    trace = replace(model, seconds_per_element=seconds_per_element).trace()
    _, chosen = choose(plan, trace, RATES, Settings(updates=updates))
    demand = run(plan, trace, RATES, Settings("demand", updates))
    serial = run(plan, trace, RATES, Settings("serial", updates))
    assert chosen.step_seconds <= demand.step_seconds * 1.002
    # An update that begins early can be the wrong one: that of the unit needed last, and no other may interrupt it.
    assert demand.step_seconds <= serial.step_seconds * (1.25 if updates == "backward" else 1.002)


def test_choice_is_the_fastest_and_of_equally_fast_ones_the_one_with_least_traffic() -> None:
    case = blocks(10, 4)
    trace = case.trace()
    # Copying to the device is the bottleneck: retention is worth more than running ahead, and nothing else matters.
    slow = replace(RATES, host_to_device_bytes_per_s=2e8, compute_uses_cores=False)
    plan = case.plan(16, 800, param="host")
    schedule, prediction = choose(plan, trace, slow)
    for room in (0, 1, 2):
        for lead in (None, 0, 1, 2):
            other = run(plan, trace, slow, room=room, lead=lead)
            assert prediction.step_seconds <= other.step_seconds * 1.002
    least = min(make_schedule(plan, trace, room=room).traffic_bytes for room in (0, 1, 2, 4))
    assert schedule.traffic_bytes == least
    # Computing is the bottleneck: many candidates are as fast, and the one with least traffic is taken.
    fast = replace(RATES, host_to_device_bytes_per_s=1e12, compute_uses_cores=False)
    assert choose(plan, trace, fast)[0].traffic_bytes == least


def test_large_model_is_simulated_in_less_than_two_seconds() -> None:
    case = blocks(200, 25)
    plan = case.plan(500, 8000)
    assert sum(len(unit.spans) for unit in plan.units) == 5000
    trace = case.trace()
    schedule = make_schedule(plan, trace)
    took = []
    for _ in range(3):
        start = time.process_time()
        simulate(plan, trace, schedule, RATES)
        took.append(time.process_time() - start)
    assert min(took) < 2  # about 0.4 on a fast core
