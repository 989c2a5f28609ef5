"""A timeline: what each lane did in the recorded steps. Times are seconds since the timeline's origin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

LaneKind = Literal["compute", "channel", "updater", "stall"]
LANE_KINDS: tuple[LaneKind, ...] = ("compute", "channel", "updater", "stall")
STALL_LANE = "stalls"
"""The one lane of kind ``stall``: times at which the step stood still, each named by its cause."""

WAITS = ("wait_io", "wait_work")
"""Values of an event's ``what`` that are no work."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, from its first forward to the return of ``step()``."""

    number: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Lane:
    """``compute``: what the step itself does, in sequence; ``channel``: moves over one link; ``updater``: a thread that
    updates; ``stall``: see STALL_LANE. Events of a channel may overlap."""

    name: str
    kind: LaneKind


@dataclass(frozen=True)
class Event:
    """``args`` holds whatever else is known, as JSON. Three keys are looked at: ``what`` (the sort of work, "read"),
    ``cause`` (of a stall) and ``link`` with ``kind`` (which bytes moved where: "ssd→host", "PARAM")."""

    lane: str
    name: str
    start_s: float
    end_s: float
    bytes: int = 0
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def what(self) -> str:
        """The sort of work; the name's first word if nothing says it."""
        return str(self.args.get("what") or self.name.split(" ", 1)[0])

    @property
    def cause(self) -> str:
        """What a stall waited for, without the unit."""
        return str(self.args.get("cause") or self.name)


@dataclass(frozen=True)
class Counter:
    """A quantity over time: (seconds, value), in order. The occupancy of a tier is called ``device``, ``host`` or
    ``ssd``, with the unit ``bytes``."""

    name: str
    unit: str
    samples: tuple[tuple[float, float], ...]


@dataclass
class Timeline:
    """``origin_unix_s``: the wall-clock time of second 0. ``dropped``: events and samples that found no room, by
    lane or counter. ``facts``: JSON about the run; docs/timeline-format.md lists the keys that the report looks at."""

    origin_unix_s: float = 0.0
    steps: list[Step] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    counters: list[Counter] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def typical_step(self) -> Step | None:
        """The one of median length, the later of two; the first one is left out if there are more than two, since
        it finds everything cold."""
        steps = self.steps[1:] if len(self.steps) > 2 else self.steps
        ordered = sorted(steps, key=lambda step: (step.seconds, step.number))
        return ordered[len(ordered) // 2] if ordered else None

    def step_numbered(self, number: int) -> Step | None:
        return next((step for step in self.steps if step.number == number), None)

    def lane_events(self, lane: str, step: Step) -> list[Event]:
        """Events of a lane that overlap a step, by start."""
        found = [e for e in self.events if e.lane == lane and e.end_s >= step.start_s and e.start_s < step.end_s]
        return sorted(found, key=lambda event: (event.start_s, -event.end_s))


def covered_seconds(events: Iterable[Event], step: Step) -> float:
    """Seconds of a step in which at least one of the events was under way."""
    total, reached = 0.0, step.start_s
    for event in sorted(events, key=lambda event: event.start_s):
        start, end = max(event.start_s, reached), min(event.end_s, step.end_s)
        if end > start:
            total += end - start
            reached = end
    return total


def busy(events: Sequence[Event]) -> list[Event]:
    """Those that are work, and no waiting for it."""
    return [event for event in events if event.what not in WAITS]


def started_bytes(events: Iterable[Event], step: Step) -> int:
    """Bytes of the events that began in a step, so that the steps of a run add up to all bytes."""
    return sum(event.bytes for event in events if step.start_s <= event.start_s < step.end_s)
