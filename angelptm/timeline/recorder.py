"""Records what happens in steps: what Python code tells it, and what the native threads recorded meanwhile."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import angelptm_native as native
import psutil

from angelptm.timeline.data import STALL_LANE, Counter, Event, Lane, LaneKind, Step, Timeline
from angelptm.timeline.file import save

_NS = 1_000_000_000
_CHANNELS = {"read": "reads", "write": "writes"}
"""Native transfers overlap each other and the work of their thread, so they get a lane of their own beside its."""
_WORDS = {"wait_io": "waits for I/O", "wait_work": "waits for work"}
_KINDS: tuple[tuple[str, LaneKind], ...] = (("updater", "updater"), ("engine", "compute"), ("main", "compute"))
"""Kinds of native lanes by the beginning of their name; the others are channels."""

NameEvent = Callable[[str, str, int], tuple[str, dict[str, Any]]]
"""(thread, what, id) of a native event → its name and args: ("updater 0", "update", 3) → ("update h.3", {})."""


class Recorder:
    """Off until ``start``; while off, every call returns at once.

    ``event``, ``stall`` and ``counter`` may be called from any thread; times are those of ``time.perf_counter()``. At
    most ``capacity`` events and as many samples are kept (threads that race may exceed it by one each), and what finds
    no room is counted in ``Timeline.dropped``.
    """

    def __init__(self, capacity: int = 200_000, native_capacity: int = 65_536) -> None:
        assert capacity > 0
        self._capacity, self._native_capacity = capacity, native_capacity
        self.recording = False
        self.facts: dict[str, Any] = {}
        """Goes into the timeline as it is; JSON."""
        self._clear()

    def _clear(self) -> None:
        self._origin_ns, self._origin_unix_s = time.perf_counter_ns(), time.time()
        self._steps: list[tuple[int, float, float]] = []
        self._lanes: dict[str, LaneKind] = {}
        self._events: list[tuple[str, str, float, float, int, dict[str, Any]]] = []
        self._samples: list[tuple[str, float, float]] = []
        self._units: dict[str, str] = {}
        self._dropped: dict[str, int] = {}
        self._native: list[dict[str, Any]] = []

    def start(self) -> None:
        """Forgets what there was, and records from now on, native threads too. One recorder at a time does so."""
        self._clear()
        native.Timeline.start(self._native_capacity)
        self.recording = True

    def stop(self) -> None:
        """What was recorded stays until the next ``start``."""
        if self.recording:
            self.recording = False
            native.Timeline.stop()
            self._take()

    def lane(self, name: str, kind: LaneKind) -> None:
        """Declares a lane; lanes appear in the order in which they are declared. One that is not is ``compute``."""
        self._lanes[name] = kind

    def event(self, lane: str, name: str, start: float, end: float, bytes: int = 0, **args: Any) -> None:
        """Something that ``lane`` did; ``args`` as Event has them."""
        if not self.recording:
            return
        if len(self._events) >= self._capacity:
            self._dropped[lane] = self._dropped.get(lane, 0) + 1
            return
        self._events.append((lane, name, start, end, bytes, args))

    def stall(self, cause: str, start: float, end: float, unit: str = "") -> None:
        """The step stood still: ``stall("waits for the update", start, end, unit="h.3")``."""
        if self.recording:
            name, args = (f"{cause} of {unit}", {"unit": unit}) if unit else (cause, {})
            self.event(STALL_LANE, name, start, end, 0, cause=cause, **args)

    def counter(self, name: str, value: float, unit: str = "bytes", at: float | None = None) -> None:
        """A sample of a quantity, taken now unless ``at`` says otherwise."""
        if not self.recording:
            return
        if len(self._samples) >= self._capacity:
            self._dropped[name] = self._dropped.get(name, 0) + 1
            return
        self._units.setdefault(name, unit)
        self._samples.append((name, time.perf_counter() if at is None else at, value))

    def step(self, number: int, start: float, end: float) -> None:
        """A step is over. Takes what native threads recorded, so that their lanes have room for the next one."""
        if self.recording:
            self._steps.append((number, start, end))
            self._take()

    def timeline(self, name_event: NameEvent | None = None) -> Timeline:
        """Everything since ``start``, by start; events that began before it are cut there."""
        if self.recording:
            self._take()
        lanes = dict(self._lanes)
        events = [
            Event(lane, name, self._seconds(start), self._seconds(end), bytes, args)
            for lane, name, start, end, bytes, args in self._events
        ]
        for found in self._native:
            events += self._native_events(found, name_event, lanes)
        for event in events:
            lanes.setdefault(event.lane, "stall" if event.lane == STALL_LANE else "compute")
        samples: dict[str, list[tuple[float, float]]] = {}
        for name, at, value in self._samples:
            samples.setdefault(name, []).append((self._seconds(at), float(value)))
        return Timeline(
            origin_unix_s=self._origin_unix_s,
            steps=[Step(number, self._seconds(start), self._seconds(end)) for number, start, end in self._steps],
            lanes=[Lane(name, kind) for name, kind in lanes.items()],
            events=sorted(events, key=lambda event: (event.start_s, -event.end_s)),
            counters=[Counter(name, self._units[name], tuple(sorted(found))) for name, found in samples.items()],
            facts={"machine": machine(), **self.facts},
            dropped=dict(self._dropped),
        )

    def save(self, path: Path, name_event: NameEvent | None = None) -> None:
        """Writes ``timeline(name_event)``; angelptm.timeline.file.load reads it back. Raises OSError."""
        save(self.timeline(name_event), path)

    def _seconds(self, perf_counter: float) -> float:
        return max(0.0, perf_counter - self._origin_ns / _NS)

    def _take(self) -> None:
        lanes, beyond = native.Timeline.take()
        held = sum(len(lane["what"]) for lane in self._native)
        for lane in lanes:
            room = max(0, self._capacity - held)
            count = len(lane["what"])
            dropped = lane["dropped"] + max(0, count - room)
            if dropped:
                self._dropped[lane["name"]] = self._dropped.get(lane["name"], 0) + dropped
            if room:
                self._native.append({key: v[:room] if key not in ("name", "dropped") else v for key, v in lane.items()})
            held += min(count, room)
        if beyond:
            self._dropped["threads without a lane"] = self._dropped.get("threads without a lane", 0) + beyond

    def _native_events(
        self, found: dict[str, Any], name_event: NameEvent | None, lanes: dict[str, LaneKind]
    ) -> list[Event]:
        whats = native.Timeline.what_names()
        thread = found["name"]
        kind: LaneKind = next((kind for prefix, kind in _KINDS if thread.startswith(prefix)), "channel")
        events = []
        for index, start_ns, end_ns, id_, size in zip(
            *(found[key].tolist() for key in ("what", "start_ns", "end_ns", "id", "bytes"))
        ):
            what = whats[index]
            lane = f"{thread}: {_CHANNELS[what]}" if what in _CHANNELS else thread
            lanes.setdefault(lane, "channel" if what in _CHANNELS else kind)
            name = _WORDS.get(what) or f"{what} {id_}"
            args: Mapping[str, Any] = {}
            if name_event is not None and what not in _WORDS:
                name, args = name_event(thread, what, id_)
            start, end = max(0, start_ns - self._origin_ns), max(0, end_ns - self._origin_ns)
            events.append(Event(lane, name, start / _NS, max(start, end) / _NS, size, {"what": what, **args}))
        return events


def machine() -> dict[str, Any]:
    """What the times depend on."""
    model = ""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        model = next(
            (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), ""
        )
    except OSError:
        pass  # not Linux, or no /proc: the architecture has to do
    return {
        "cpu": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
    }
