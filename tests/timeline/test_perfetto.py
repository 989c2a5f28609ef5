"""The export is a trace that Perfetto's importer accepts: named tracks, sorted, nested, nothing negative."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelptm.timeline import Event, Lane, Timeline
from angelptm.timeline.perfetto import nested_tracks, trace_events, write_perfetto

from .runs import EVIL, timeline


def check(trace: dict[str, Any]) -> None:
    """What the format demands, and what makes it readable."""
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} <= {"M", "X", "C"}
    names = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    processes = {e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    timed = [event for event in events if event["ph"] != "M"]
    assert events == [*(event for event in events if event["ph"] == "M"), *timed]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    open_ends: dict[tuple[int, int], list[float]] = {}
    for event in timed:
        assert event["name"]
        assert event["ts"] >= 0
        assert event["pid"] in processes
        if event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
            continue
        assert event["dur"] >= 0
        track = event["pid"], event["tid"]
        assert track in names
        ends = open_ends.setdefault(track, [])
        while ends and ends[-1] <= event["ts"] + 1e-4:  # a tenth of a nanosecond: times are sums of floats
            ends.pop()
        end = event["ts"] + event["dur"]
        assert not ends or end <= ends[-1] + 1e-4, f"{event['name']} is not within what contains its beginning"
        ends.append(end)


def test_export_is_a_valid_trace(tmp_path: Path) -> None:
    found = timeline()
    write_perfetto(found, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    check(trace)
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == len(found.events) + len(found.steps)
    threads = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert {"steps", "engine", "stalls", "ssd read", "ssd read (2)", "updater 0", "updater 1"} <= threads
    samples = [event for event in trace["traceEvents"] if event["ph"] == "C"]
    assert {event["name"] for event in samples} == {"device (bytes)", "host (bytes)", "ssd (bytes)"}


def test_stalls_are_a_process_of_their_own_named_by_cause() -> None:
    events = trace_events(timeline())["traceEvents"]
    (pid,) = {e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"] == "stalls"}
    stalls = [event for event in events if event["pid"] == pid and event["ph"] == "X"]
    assert "waits for the update of h.0" in {event["name"] for event in stalls}
    assert all(event["name"].startswith("waits for") for event in stalls)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=30), st.sampled_from(["compute", "channel"])
)
def test_any_overlap_is_distributed_over_tracks(spans: list[tuple[int, int]], kind: Any) -> None:
    found = Timeline(lanes=[Lane("lane", kind)])
    found.events = [Event("lane", "e", start / 1e9, (start + length) / 1e9) for start, length in spans]
    trace = trace_events(found)
    check(trace)
    assert len([event for event in trace["traceEvents"] if event["ph"] == "X"]) == len(spans)


def test_transfers_that_overlap_are_beside_each_other_and_calls_within() -> None:
    outer, inner = Event("lane", "outer", 0, 3), Event("lane", "inner", 1, 2)
    assert nested_tracks([inner, outer], nest=True) == [[outer, inner]]
    assert nested_tracks([inner, outer], nest=False) == [[outer], [inner]]


@pytest.mark.parametrize("name", [EVIL, "x" * 4096])
def test_any_name_survives(name: str) -> None:
    found = Timeline(lanes=[Lane(name, "updater")], events=[Event(name, name, 0, 1)])
    trace = json.loads(json.dumps(trace_events(found)))
    check(trace)
    assert trace["traceEvents"][-1]["name"] == name
