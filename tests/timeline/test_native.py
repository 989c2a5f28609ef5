"""The native recorder: lanes of threads, bounded, and safe to start, stop and take at any time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from angelptm_native import Timeline

READ = Timeline.what_names().index("read")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Whatever a test leaves is gone before the next one."""
    Timeline.stop()
    Timeline.take()
    yield
    Timeline.stop()
    Timeline.take()


def in_thread(name: str, events: int) -> None:
    def work() -> None:
        Timeline.name_lane(name)
        for index in range(events):
            Timeline.record(READ, 10 * index, 10 * index + 5, index, 4096)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_events_of_a_thread_that_has_ended_come_back_in_its_lane() -> None:
    Timeline.start(100)
    in_thread("reader", 3)
    lanes, beyond = Timeline.take()
    assert beyond == 0
    (lane,) = lanes
    assert (lane["name"], lane["dropped"]) == ("reader", 0)
    expected = {
        "what": np.array([READ] * 3, np.uint8),
        "start_ns": np.array([0, 10, 20], np.int64),
        "end_ns": np.array([5, 15, 25], np.int64),
        "id": np.array([0, 1, 2], np.uint32),
        "bytes": np.array([4096] * 3, np.uint64),
    }
    for name, column in expected.items():
        assert (lane[name].dtype, lane[name].tolist()) == (column.dtype, column.tolist())
    assert Timeline.take() == ([], 0)


def test_what_does_not_fit_a_lane_is_counted() -> None:
    Timeline.start(4)
    in_thread("reader", 10)
    in_thread("other", 4)
    lanes, _ = Timeline.take()
    assert [(lane["name"], len(lane["what"]), lane["dropped"]) for lane in lanes] == [("reader", 4, 6), ("other", 4, 0)]
    assert lanes[0]["id"].tolist() == [0, 1, 2, 3]


def test_take_makes_room_while_recording_goes_on() -> None:
    Timeline.start(4)
    for _ in range(3):
        for index in range(4):
            Timeline.record(READ, 0, 1, index)
        ((lane,), _) = Timeline.take()
        assert (len(lane["what"]), lane["dropped"]) == (4, 0)


def test_nothing_is_kept_before_start_and_after_stop() -> None:
    Timeline.record(READ, 0, 1)
    assert not Timeline.recording()
    Timeline.start(4)
    assert Timeline.recording()
    Timeline.record(READ, 0, 1, 7)
    Timeline.stop()
    Timeline.record(READ, 0, 1, 8)
    ((lane,), _) = Timeline.take()
    assert lane["id"].tolist() == [7]


def test_start_begins_anew() -> None:
    Timeline.start(4)
    Timeline.record(READ, 0, 1)
    Timeline.start(4)
    assert Timeline.take() == ([], 0)


@pytest.mark.parametrize("capacity", [0, 2**24 + 1])
def test_capacity_out_of_bounds_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match="a lane holds from 1 to 16777216 events"):
        Timeline.start(capacity)


def test_unknown_event_is_refused() -> None:
    with pytest.raises(ValueError, match="no such member"):
        Timeline.record(len(Timeline.what_names()), 0, 1)


def test_clock_is_that_of_perf_counter() -> None:
    before = time.perf_counter_ns()
    now = Timeline.now_ns()
    assert before <= now <= time.perf_counter_ns()


def test_threads_beyond_the_most_lanes_are_counted_and_ended_ones_forgotten() -> None:
    for index in range(1100):  # named, and gone with nothing to tell
        in_thread(f"short {index}", 0)
    Timeline.start(2)
    for index in range(1030):
        in_thread(f"short {index}", 1)
    lanes, beyond = Timeline.take()
    assert len(lanes) + beyond == 1030
    assert 0 < beyond <= 100  # 1024 lanes, less what other threads of this process have
    in_thread("later", 1)
    ((lane,), _) = Timeline.take()
    assert lane["name"] == "later"


def test_start_stop_and_take_while_threads_record_lose_nothing_uncounted() -> None:
    Timeline.start(50)
    done = threading.Event()
    recorded = [0] * 4

    def work(number: int) -> None:
        Timeline.name_lane(f"worker {number}")
        while not done.is_set() or recorded[number] == 0:
            Timeline.record(READ, 0, 1, number)
            recorded[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    found = dict.fromkeys(range(4), 0)

    def take() -> None:
        for lane in Timeline.take()[0]:
            number = int(lane["name"].removeprefix("worker "))
            assert set(lane["id"].tolist()) <= {number}
            found[number] += len(lane["what"]) + lane["dropped"]

    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        take()
    done.set()
    for thread in threads:
        thread.join()
    take()
    assert list(found.values()) == recorded
    Timeline.stop()
    Timeline.start(50)
    assert Timeline.take() == ([], 0)
