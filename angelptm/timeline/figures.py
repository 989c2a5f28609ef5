"""The figures of one step that the command and the report show, measured and predicted side by side."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from angelptm.errors import DataError
from angelptm.timeline.data import Event, Step, Timeline, busy, covered_seconds, started_bytes
from angelptm.timeline.file import FILE_NAME
from angelptm.timeline.run_files import RunFiles, number, numbers, tables

TIERS = ("device", "host", "ssd")


@dataclass(frozen=True)
class Stall:
    """``cause`` without the unit; ``seconds`` of ``count`` stalls of this name within the step."""

    name: str
    cause: str
    count: int
    seconds: float


@dataclass(frozen=True)
class Roofline:
    """A phase, and the least seconds that its ceiling allows; None where no ceiling is known."""

    phase: str
    seconds: float
    ceiling: str
    ceiling_seconds: float | None

    @property
    def share(self) -> float | None:
        """Of what the ceiling allows; 1 is the best."""
        return self.ceiling_seconds / self.seconds if self.ceiling_seconds is not None and self.seconds > 0 else None


@dataclass(frozen=True)
class Compared:
    """``unit``: seconds or bytes. What is None was not predicted, or not measured."""

    group: str
    name: str
    unit: str
    predicted: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        if self.predicted is None or self.measured is None or self.predicted <= 0:
            return None
        return self.measured / self.predicted


@dataclass
class Figures:
    """Everything about one step, in seconds and bytes."""

    step: Step
    all_seconds: list[float] = field(default_factory=list)
    tokens_per_s: float | None = None
    lane_events: dict[str, list[Event]] = field(default_factory=dict)
    busy_seconds: dict[str, float] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    stalls: list[Stall] = field(default_factory=list)
    stall_seconds: float = 0.0
    traffic_bytes: dict[str, dict[str, float]] = field(default_factory=dict)
    tier_bytes: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_bytes: dict[str, float] = field(default_factory=dict)
    budget_bytes: dict[str, float] = field(default_factory=dict)
    rooflines: list[Roofline] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    bottleneck: str = ""
    predicted_bottleneck: str = ""

    @property
    def stalls_by_cause(self) -> dict[str, float]:
        """Longest first."""
        total: dict[str, float] = {}
        for stall in self.stalls:
            total[stall.cause] = total.get(stall.cause, 0.0) + stall.seconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def figures_of(run: RunFiles, step_number: int | None = None) -> Figures:
    """Figures of a step, the typical one if none is named. DataError if the timeline has no such step."""
    step = _chosen(run, step_number)
    found = Figures(step, [other.seconds for other in run.timeline.steps])
    for event in run.timeline.events:
        if event.end_s >= step.start_s and event.start_s < step.end_s:
            found.lane_events.setdefault(event.lane, []).append(event)
    tokens = number(run.result.get("tokens_per_step")) or number(run.timeline.facts.get("tokens_per_step"))
    if tokens and step.seconds > 0:
        found.tokens_per_s = tokens / step.seconds
    _stalls(found, run.timeline)
    _busy(found, run.timeline)
    _bytes(found, run)
    _rooflines(found, run)
    _compare(found, run)
    found.bottleneck = _bottleneck(found, run.timeline)
    found.predicted_bottleneck = _predicted_bottleneck(run.prediction)
    return found


def percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"  # no line break before the sign


def seconds_text(seconds: float) -> str:
    """Three significant digits: 2.31 s, 48.2 ms, 950 µs."""
    if seconds == 0 or abs(seconds) >= 1e6:
        return f"{seconds:.3g} s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= scale or unit == "µs":
            value = seconds / scale
            return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
    raise AssertionError("the last unit takes everything")


def _chosen(run: RunFiles, number: int | None) -> Step:
    steps = run.timeline.steps
    path = str(run.folder / FILE_NAME)
    if not steps:
        raise DataError(
            path, "no step", "at least one whole step", "The run ended before one was recorded; train again."
        )
    step = run.timeline.typical_step() if number is None else run.timeline.step_numbered(number)
    if step is None:
        known = sorted(other.number for other in steps)
        shown = ", ".join(map(str, known[:20])) + (" ..." if len(known) > 20 else "")
        raise DataError(path, f"no step {number}", f"one of the recorded steps: {shown}", "Choose one with --step.")
    return step


def _stalls(found: Figures, timeline: Timeline) -> None:
    total: dict[tuple[str, str], tuple[int, float]] = {}
    everything: list[Event] = []
    for lane in (lane for lane in timeline.lanes if lane.kind == "stall"):
        for event in found.lane_events.get(lane.name, []):
            everything.append(event)
            count, seconds = total.get((event.name, event.cause), (0, 0.0))
            total[event.name, event.cause] = count + 1, seconds + covered_seconds([event], found.step)
    stalls = [Stall(name, cause, count, seconds) for (name, cause), (count, seconds) in total.items()]
    found.stalls = sorted(stalls, key=lambda stall: (-round(stall.seconds, 9), stall.name))
    found.stall_seconds = covered_seconds(everything, found.step)


def _busy(found: Figures, timeline: Timeline) -> None:
    compute: list[Event] = []
    for lane in timeline.lanes:
        events = busy(found.lane_events.get(lane.name, []))
        if lane.kind == "compute":
            compute += events
        elif lane.kind != "stall":
            found.busy_seconds[lane.name] = covered_seconds(events, found.step)
    by_phase: dict[str, list[Event]] = {}
    for event in compute:
        by_phase.setdefault(str(event.args.get("phase") or event.what), []).append(event)
    found.phase_seconds = {phase: covered_seconds(events, found.step) for phase, events in by_phase.items()}
    if compute:
        # Stalls may lie within what computes, and are none of it.
        stalls = [e for lane in timeline.lanes if lane.kind == "stall" for e in found.lane_events.get(lane.name, [])]
        working = covered_seconds([*compute, *stalls], found.step) - found.stall_seconds
        found.busy_seconds = {"compute": max(0.0, working), **found.busy_seconds}
    found.busy_seconds |= numbers(timeline.facts.get("busy_seconds"))


def _bytes(found: Figures, run: RunFiles) -> None:
    facts = run.timeline.facts
    found.traffic_bytes = tables(facts.get("traffic_bytes"))
    if not found.traffic_bytes:
        links: dict[str, dict[str, list[Event]]] = {}
        for lane, events in found.lane_events.items():
            for event in events:
                if event.bytes:
                    kind = str(event.args.get("kind") or "all kinds")
                    links.setdefault(kind, {}).setdefault(str(event.args.get("link") or lane), []).append(event)
        found.traffic_bytes = {
            kind: {link: float(size) for link, events in by.items() if (size := started_bytes(events, found.step))}
            for kind, by in links.items()
        }
    found.tier_bytes = _moved(run.metrics, found.step.number)
    found.budget_bytes = numbers(facts.get("budget_bytes")) or numbers(run.result.get("budget_bytes"))
    found.peak_bytes = numbers(run.result.get("peak_bytes"))
    for counter in run.timeline.counters:
        if counter.name in TIERS and (samples := occupancy(counter.samples, found.step)):
            found.peak_bytes[counter.name] = max(value for _, value in samples)


def occupancy(samples: tuple[tuple[float, float], ...], step: Step) -> list[tuple[float, float]]:
    """Samples of a step; a value holds until the next one, so the last before it counts at its beginning."""
    before = [value for at, value in samples if at <= step.start_s]
    inside = [(at, value) for at, value in samples if step.start_s < at <= step.end_s]
    return [(step.start_s, before[-1]), *inside] if before else inside


def _moved(metrics: list[dict[str, Any]], step: int) -> dict[str, dict[str, float]]:
    """Bytes that crossed each tier's border in a step: the metrics count up, so two lines are needed."""
    lines = {line["step"]: tables(line["bytes"]) for line in metrics if "bytes" in line and "step" in line}
    now, former = lines.get(step), lines.get(step - 1)
    if now is None or (former is None and step != 1):
        return {}
    return {
        tier: {way: size - (former or {}).get(tier, {}).get(way, 0.0) for way, size in both.items()}
        for tier, both in now.items()
    }


def _words(name: str) -> str:
    return " ".join(re.findall(r"[a-z]+|[0-9]+", name.lower()))


def measured_busy(found: Figures, channel: str) -> float | None:
    """Busy seconds of a channel of the prediction: the lane of that name, or else all events of that sort or link."""
    wanted = _words(channel)
    for name, seconds in found.busy_seconds.items():
        if _words(name) == wanted:
            return seconds
    sorts = {wanted, wanted.removeprefix("ssd ")}
    events = [
        event
        for all_events in found.lane_events.values()
        for event in busy(all_events)
        if _words(event.what) in sorts or _words(str(event.args.get("link", ""))) == wanted
    ]
    return covered_seconds(events, found.step) if events else None


def _rooflines(found: Figures, run: RunFiles) -> None:
    """Ceilings that the run recorded itself come first; the planner's channels are ceilings, too."""
    least = numbers(run.prediction.get("busy_seconds"))
    rates = numbers(run.prediction.get("rates"))
    if least:
        channel, seconds = max(least.items(), key=lambda item: item[1])
        found.rooflines.append(Roofline("whole step", found.step.seconds, _ceiling(channel, rates), seconds))
    told = run.timeline.facts.get("rooflines")
    told = told if isinstance(told, Mapping) else {}
    for phase, facts in told.items():
        facts = facts if isinstance(facts, Mapping) else {}
        measured = (
            number(facts.get("measured_seconds")) or found.phase_seconds.get(phase) or measured_busy(found, phase)
        )
        if measured is not None:
            ceiling = str(facts.get("ceiling") or "")
            found.rooflines.append(Roofline(str(phase), measured, ceiling, number(facts.get("seconds"))))
    for phase, seconds in found.phase_seconds.items():
        if phase not in told:
            found.rooflines.append(Roofline(phase, seconds, "", None))
    for channel, seconds in least.items():
        measured = measured_busy(found, channel)
        if channel not in told and measured is not None:
            found.rooflines.append(Roofline(channel, measured, _ceiling(channel, rates), seconds))


def _ceiling(channel: str, rates: Mapping[str, float]) -> str:
    """ "ssd_read at 1.35 GB/s", if a rate is named after the channel."""
    for name, rate in rates.items():
        if _words(name).startswith(_words(channel)):
            if "flop" in name:
                return f"{channel} at {rate / 1e9:,.3g} GFLOP/s"
            if "bytes" in name or "bandwidth" in name:
                return f"{channel} at {rate / 1e9:,.3g} GB/s"
            return f"{channel} at {rate:,.3g} ({name})"
    return channel


def _compare(found: Figures, run: RunFiles) -> None:
    prediction = run.prediction
    if not prediction:
        return
    rows = found.compared
    rows.append(Compared("step", "a step", "seconds", number(prediction.get("step_seconds")), found.step.seconds))
    for channel, seconds in numbers(prediction.get("busy_seconds")).items():
        rows.append(Compared("busy", channel, "seconds", seconds, measured_busy(found, channel)))
    measured_links = {
        (_words(kind), _words(link)): size for kind, by in found.traffic_bytes.items() for link, size in by.items()
    }
    for kind, by in tables(prediction.get("traffic_bytes")).items():
        for link, size in by.items():
            measured = measured_links.get((_words(kind), _words(link)))
            rows.append(Compared("traffic", f"{kind}, {link}", "bytes", size, measured))
    for tier, size in numbers(prediction.get("peak_bytes")).items():
        rows.append(Compared("peak", tier, "bytes", size, found.peak_bytes.get(tier)))
    stalls, predicted = found.stalls_by_cause, numbers(prediction.get("stall_seconds"))
    for cause in sorted({*stalls, *predicted}, key=lambda cause: -max(stalls.get(cause, 0), predicted.get(cause, 0))):
        rows.append(Compared("stall", cause, "seconds", predicted.get(cause, 0.0), stalls.get(cause, 0.0)))


def _bottleneck(found: Figures, timeline: Timeline) -> str:
    """One sentence from what was measured alone."""
    length = found.step.seconds
    if not found.busy_seconds or length <= 0:
        return "Nothing was recorded that could be the bottleneck."
    (first, seconds), *others = sorted(found.busy_seconds.items(), key=lambda item: -item[1])
    text = f"Busiest is {first}, {percent(seconds / length)} of the step"
    if others and others[0][1] > 0:
        text += f", then {others[0][0]} with {percent(others[0][1] / length)}"
    if found.stalls:
        cause, most = next(iter(found.stalls_by_cause.items()))
        text += f"; it stood still {percent(found.stall_seconds / length)} of the time, longest for: {cause}"
        text += f" ({seconds_text(most)})."
    elif any(lane.kind == "stall" for lane in timeline.lanes):
        text += "; it never stood still."
    else:
        text += ". Whether it stood still was not recorded."
    return text


def _predicted_bottleneck(prediction: Mapping[str, Any]) -> str:
    names = [_name(prediction.get(key)) for key in ("bottleneck", "second_bottleneck")]
    if not names[0]:
        return ""
    return f"Predicted: {names[0]}" + (f", then {names[1]}." if names[1] else ".")


def _name(value: object) -> str:
    """A bottleneck may be a text, or an object that has a name."""
    if isinstance(value, Mapping):
        value = value.get("name") or value.get("channel") or ""
    return value if isinstance(value, str) else ""


def median_seconds(found: Figures) -> float:
    return statistics.median(found.all_seconds)
