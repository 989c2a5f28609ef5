"""A timeline in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

A process for each kind of lane, a thread for each lane; stalls are a process of their own. Where a lane did several
things at once, as channels do, it gets further threads, since the events of one thread have to nest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from angelptm.timeline.data import LANE_KINDS, Event, LaneKind, Timeline

FILE_NAME = "timeline.perfetto.json"
_PROCESS_NAMES: dict[LaneKind, str] = {
    "compute": "step",
    "stall": "stalls",
    "channel": "channels",
    "updater": "updaters",
}
_STEPS_PID, _COUNTERS_PID, _FIRST_PID = 1, 2, 3
_NS = 1_000_000_000


def trace_events(timeline: Timeline) -> dict[str, Any]:
    """The JSON object; ``ts`` and ``dur`` in microseconds, by ``ts``."""
    names: list[dict[str, Any]] = []
    timed: list[dict[str, Any]] = []
    _name(names, _STEPS_PID, 1, "steps", "steps")
    for step in timeline.steps:
        timed.append(_complete(_STEPS_PID, 1, f"step {step.number}", "step", step.start_s, step.end_s, {}))
    by_lane: dict[str, list[Event]] = {}
    for event in timeline.events:
        by_lane.setdefault(event.lane, []).append(event)
    for pid, kind in enumerate(sorted(LANE_KINDS, key=list(_PROCESS_NAMES).index), _FIRST_PID):
        tid = 1
        for lane in (lane for lane in timeline.lanes if lane.kind == kind):
            # Of overlapping transfers neither is part of the other, even where the times would allow it.
            tracks = nested_tracks(by_lane.get(lane.name, []), nest=kind != "channel")
            for number, track in enumerate(tracks or [[]], 1):
                _name(names, pid, tid, _PROCESS_NAMES[kind], lane.name if number == 1 else f"{lane.name} ({number})")
                for event in track:
                    args = {**event.args, **({"bytes": event.bytes} if event.bytes else {})}
                    timed.append(_complete(pid, tid, event.name, event.what, event.start_s, event.end_s, args))
                tid += 1
    for counter in timeline.counters:
        label = f"{counter.name} ({counter.unit})" if counter.unit else counter.name
        for at, value in counter.samples:
            sample = {"ph": "C", "pid": _COUNTERS_PID, "tid": 0, "name": label, "ts": _us(_ns(at))}
            timed.append({**sample, "args": {counter.unit or "value": value}})
    if timeline.counters:
        names.append(_meta(_COUNTERS_PID, 0, "process_name", "occupancy"))
    timed.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    return {
        "traceEvents": [*names, *timed],
        "displayTimeUnit": "ms",
        "otherData": {"origin_unix_s": timeline.origin_unix_s, "dropped": timeline.dropped},
    }


def write_perfetto(timeline: Timeline, path: Path) -> None:
    """Raises OSError."""
    path.write_text(json.dumps(trace_events(timeline), separators=(",", ":")), encoding="utf-8")


def nested_tracks(events: Iterable[Event], *, nest: bool) -> list[list[Event]]:
    """Distributes events over as few tracks as first-fit finds, so that in each any two are apart or (with ``nest``)
    one contains the other."""
    tracks: list[list[Event]] = []
    open_ends: list[list[int]] = []  # of each track: ends of what is under way, the innermost last
    for event in sorted(events, key=lambda event: (_ns(event.start_s), -_ns(event.end_s))):
        start, end = _ns(event.start_s), _ns(event.end_s)
        index = next((i for i, ends in enumerate(open_ends) if _fits(ends, start, end, nest)), len(tracks))
        if index == len(tracks):
            tracks.append([])
            open_ends.append([])
        tracks[index].append(event)
        open_ends[index].append(end)
    return tracks


def _fits(ends: list[int], start: int, end: int, nest: bool) -> bool:
    """Whether a track has room; forgets what has ended there."""
    while ends and ends[-1] <= start:
        ends.pop()
    return not ends or (nest and end <= ends[-1])


def _complete(
    pid: int, tid: int, name: str, category: str, start_s: float, end_s: float, args: dict[str, Any]
) -> dict[str, Any]:
    start, end = _ns(start_s), _ns(end_s)
    event = {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": name,
        "cat": category,
        "ts": _us(start),
        "dur": _us(end - start),
    }
    return {**event, "args": args} if args else event


def _name(names: list[dict[str, Any]], pid: int, tid: int, process: str, thread: str) -> None:
    if not any(event["pid"] == pid for event in names):
        names.append(_meta(pid, 0, "process_name", process))
        names.append({**_meta(pid, 0, "process_sort_index", ""), "args": {"sort_index": pid}})
    names.append(_meta(pid, tid, "thread_name", thread))
    names.append({**_meta(pid, tid, "thread_sort_index", ""), "args": {"sort_index": tid}})


def _meta(pid: int, tid: int, name: str, value: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": name, "args": {"name": value}}


def _ns(seconds: float) -> int:
    return round(seconds * _NS)


def _us(nanoseconds: int) -> float:
    return nanoseconds / 1000
