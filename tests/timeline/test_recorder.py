"""The recorder keeps what it is told within its bounds, and puts the native threads' events on the same clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from angelptm_native import Timeline as Native

from angelptm.timeline import load
from angelptm.timeline.recorder import Recorder

WHAT = {name: index for index, name in enumerate(Native.what_names())}


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    made = Recorder(capacity=100, native_capacity=100)
    made.start()
    yield made
    made.stop()


def native_events(thread_name: str, events: list[tuple[str, int, int, int]]) -> None:
    """(what, start, end, id), times in ns of perf_counter."""

    def work() -> None:
        Native.name_lane(thread_name)
        for what, start, end, index in events:
            Native.record(WHAT[what], start, end, index, 10)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_nothing_is_kept_while_off() -> None:
    made = Recorder()
    made.event("engine", "forward", 0, 1)
    made.stall("waits", 0, 1)
    made.counter("host", 3)
    made.step(1, 0, 1)
    found = made.timeline()
    assert (found.events, found.counters, found.steps) == ([], [], [])


def test_events_of_both_sides_share_a_clock(recorder: Recorder) -> None:
    before, before_ns = time.perf_counter(), time.perf_counter_ns()
    native_events("updater 0", [("update", before_ns, before_ns + 2_000_000, 7)])
    recorder.event("engine", "forward h.0", before, before + 0.002, unit="h.0")
    update, forward = sorted(recorder.timeline().events, key=lambda event: event.lane, reverse=True)
    assert (update.lane, update.name, update.bytes, update.what) == ("updater 0", "update 7", 10, "update")
    assert abs(update.start_s - forward.start_s) < 0.001
    assert update.seconds == pytest.approx(0.002)
    assert forward.args == {"unit": "h.0"}


def test_native_transfers_get_lanes_beside_their_thread(recorder: Recorder) -> None:
    now = time.perf_counter_ns()
    events = [("read", now, now + 9, 1), ("wait_io", now, now + 8, 0), ("write", now + 1, now + 9, 2)]
    native_events("updater 1", events)
    found = recorder.timeline(lambda thread, what, index: (f"{what} of span {index}", {"of": thread}))
    assert {(lane.name, lane.kind) for lane in found.lanes} == {
        ("updater 1: reads", "channel"),
        ("updater 1: writes", "channel"),
        ("updater 1", "updater"),
    }
    assert {event.name for event in found.events} == {"read of span 1", "waits for I/O", "write of span 2"}


def test_stalls_have_a_lane_of_their_own_named_by_cause(recorder: Recorder) -> None:
    start = time.perf_counter()
    recorder.stall("waits for the update", start, start + 1, unit="h.3")
    recorder.stall("waits for the commit", start + 1, start + 2)
    found = recorder.timeline()
    assert [(lane.name, lane.kind) for lane in found.lanes] == [("stalls", "stall")]
    assert [event.name for event in found.events] == ["waits for the update of h.3", "waits for the commit"]
    assert [event.cause for event in found.events] == ["waits for the update", "waits for the commit"]


def test_what_finds_no_room_is_counted() -> None:
    made = Recorder(capacity=3, native_capacity=5)
    made.start()
    for _ in range(5):
        made.event("engine", "forward", 0, 1)
        made.counter("host", 1)
    now = time.perf_counter_ns()
    native_events("updater 0", [("update", now, now, 0)] * 9)
    made.stop()
    found = made.timeline()
    assert found.dropped == {"engine": 2, "host": 2, "updater 0": 6}
    assert len([event for event in found.events if event.lane == "engine"]) == 3
    assert len([event for event in found.events if event.lane == "updater 0"]) == 3
    assert len(found.counters[0].samples) == 3


def test_each_step_makes_room_for_native_events() -> None:
    made = Recorder(capacity=1000, native_capacity=5)
    made.start()
    for number in range(4):
        now = time.perf_counter_ns()
        native_events(f"updater {number}", [("update", now, now, 0)] * 5)
        made.step(number, now / 1e9, time.perf_counter())
    made.stop()
    found = made.timeline()
    assert found.dropped == {}
    assert len(found.events) == 20
    assert [step.number for step in found.steps] == [0, 1, 2, 3]


def test_what_began_before_the_recording_is_cut_there(recorder: Recorder) -> None:
    now = time.perf_counter_ns()
    native_events("updater 0", [("update", 1, now, 0), ("update", 1, 2, 0)])
    assert [event.start_s for event in recorder.timeline().events] == [0, 0]


def test_declared_lanes_come_first_and_in_order(recorder: Recorder) -> None:
    recorder.lane("ssd read", "channel")
    recorder.lane("engine", "compute")
    recorder.event("other", "x", 0, 1)
    lanes = [(lane.name, lane.kind) for lane in recorder.timeline().lanes]
    assert lanes == [("ssd read", "channel"), ("engine", "compute"), ("other", "compute")]


def test_saved_recording_is_loaded(recorder: Recorder, tmp_path: Path) -> None:
    start = time.perf_counter()
    recorder.facts["tokens_per_step"] = 64
    recorder.event("engine", "forward", start, start + 1, 5)
    recorder.counter("host", 3)
    recorder.step(1, start, start + 1)
    recorder.save(tmp_path / "timeline.json.gz")
    found = load(tmp_path / "timeline.json.gz")
    assert found.facts["tokens_per_step"] == 64
    assert set(found.facts["machine"]) == {"cpu", "cores", "memory_bytes", "kernel"}
    assert [event.name for event in found.events] == ["forward"]
    assert found.steps[0].seconds == pytest.approx(1)
