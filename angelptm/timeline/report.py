"""One HTML file that explains a step: no script, nothing from a network, every text of the run escaped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from angelptm.sizes import format_bytes
from angelptm.timeline.data import Event, LaneKind
from angelptm.timeline.drawing import area_row, axis_row, group_row, lane_row, rows
from angelptm.timeline.figures import TIERS, Compared, Figures, median_seconds, occupancy, percent, seconds_text
from angelptm.timeline.html import bar, page, paragraph, section, swatch, table, text
from angelptm.timeline.reading import reading
from angelptm.timeline.run_files import RunFiles, number
from angelptm.timeline.updates import updates_section
from angelptm.timeline.uses import trace_section

FILE_NAME = "report.html"
_GROUPS: tuple[tuple[LaneKind, str], ...] = (
    ("compute", "step"), ("stall", "stalls"), ("channel", "channels"), ("updater", "updaters"),
)  # fmt: skip
_COLOURS = {
    "forward": "forward", "backward": "backward", "step": "step", "optimizer": "step", "read": "read", "write": "write",
    "save": "write", "sync": "write", "update": "update", "check": "check", "copy": "copy", "gradient": "copy",
    "publish": "copy", "fetch": "fetch", "evict": "fetch", "wait_io": "wait", "wait_work": "wait",
}  # fmt: skip
_WORDS = {"wait_io": "waits for I/O"}
_MOST_LANES = 40
_MOST_ROWS = 400
_MOST_STALLS = 30


def write_report(run: RunFiles, figures: Figures, path: Path) -> None:
    """Raises OSError."""
    path.write_text(render_report(run, figures), encoding="utf-8", errors="replace")


def render_report(run: RunFiles, figures: Figures) -> str:
    """The document. ``figures`` are those of the step that it is about."""
    sections = (
        ("summary", "Summary", _summary(run, figures)),
        ("timeline", "Timeline of one step", _timeline(run, figures)),
        ("occupancy", "Tier occupancy over the step", _occupancy(run, figures)),
        ("traffic", "Traffic per kind and link", _traffic(run, figures)),
        ("roofline", "Time per phase against its roofline", _roofline(figures)),
        ("prediction", "Predicted against measured", _prediction(run, figures)),
        ("stalls", "Stalls by cause", _stalls(run, figures)),
        ("updates", "Updates and staleness", updates_section(run, figures)),
        ("trace", "Trace", trace_section(run, figures)),
        ("reading", "How to read this", reading()),
    )
    links = "".join(f'<li><a href="#{name}">{text(heading)}</a></li>' for name, heading, _ in sections)
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.timeline.origin_unix_s))
    top = (
        f'<header><h1>Step {figures.step.number} of <span class="name">{text(run.folder.name)}</span></h1>'
        f'<p class="soft">recorded from {text(when)}</p></header>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
    )
    body = [top, "<main>", *(section(name, heading, content) for name, heading, content in sections), "</main>"]
    return page(f"{run.folder.name}: step {figures.step.number}", body)


def _summary(run: RunFiles, figures: Figures) -> Iterable[str]:
    step = figures.step
    tiles = {
        f"step {step.number}": seconds_text(step.seconds),
        f"median of {_count(len(figures.all_seconds), 'step')}": seconds_text(median_seconds(figures)),
        "tokens/s": f"{figures.tokens_per_s:,.0f}" if figures.tokens_per_s is not None else "not recorded",
        "stood still": seconds_text(figures.stall_seconds),
    }
    yield '<dl class="tiles">'
    yield from (f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in tiles.items())
    yield "</dl>"
    yield f'<div class="verdict" role="note">{paragraph(figures.bottleneck)}'
    yield (paragraph(figures.predicted_bottleneck) if figures.predicted_bottleneck else "") + "</div>"
    facts, machine = run.timeline.facts, run.timeline.facts.get("machine")
    machine = machine if isinstance(machine, Mapping) else {}
    memory, page_bytes = number(machine.get("memory_bytes")), number(run.plan.get("page_bytes"))
    parameters = number(run.result.get("parameters")) or number(run.plan.get("parameters"))
    described: dict[str, object] = {
        "run folder": run.folder,
        "model": run.result.get("model") or facts.get("model"),
        "parameters": f"{parameters / 1e6:,.1f} M" if parameters and parameters > 0 else None,
        "precision": run.config.get("precision"),
        "pages": format_bytes(page_bytes) if page_bytes else None,
        "tokens per step": run.result.get("tokens_per_step") or facts.get("tokens_per_step"),
        "processor": f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores" if machine else None,
        "memory": format_bytes(memory) if memory else None,
        "system": machine.get("kernel"),
        "config": run.result.get("config_hash") or facts.get("config_hash"),
    }
    yield table(
        "The run and its machine",
        ("", "value"),
        [(text(name), f'<span class="name">{text(value)}</span>') for name, value in described.items() if value],
    )
    if run.timeline.dropped:
        dropped = sum(run.timeline.dropped.values())
        yield paragraph(
            f"{dropped:,} events or samples found no room and are missing below: "
            + ", ".join(f"{name[:80]} {count:,}" for name, count in list(run.timeline.dropped.items())[:20])
        )
    if run.missing:
        yield paragraph("Not shown: " + "; ".join(f"{name} ({why})" for name, why in run.missing.items()) + ".", "soft")


def _timeline(run: RunFiles, figures: Figures) -> Iterable[str]:
    causes = _cause_colours(figures)
    shown: list[str] = [axis_row(figures.step)]
    used: dict[str, set[str]] = {}
    count = 0

    def colour(event: Event) -> str:
        klass = causes.get(event.cause, "s7") if event.args.get("cause") else _COLOURS.get(event.what, "other")
        if not event.args.get("cause"):
            used.setdefault(klass, set()).add(_WORDS.get(event.what, event.what) if klass != "other" else "other")
        return klass

    def stall_colour(event: Event) -> str:
        return causes.get(event.cause, "s7")

    for kind, heading in _GROUPS:
        lanes = [lane for lane in run.timeline.lanes if lane.kind == kind and lane.name in figures.lane_events]
        if lanes and count < _MOST_LANES:
            shown.append(group_row(heading))
        for lane in lanes[: max(0, _MOST_LANES - count)]:
            events = [event for event in figures.lane_events[lane.name] if event.what != "wait_work"]
            if kind == "stall":
                detail = f"{_count(len(events), 'stall')}, {seconds_text(figures.stall_seconds)}"
            else:
                seconds = figures.busy_seconds.get(lane.name)
                share = seconds / figures.step.seconds if seconds is not None and figures.step.seconds > 0 else None
                detail = _count(len(events), "event") + (f", busy {percent(share)}" if share is not None else "")
            row = lane_row(lane.name, detail, events, figures.step, stall_colour if kind == "stall" else colour)
            shown.append(row)
        count += len(lanes)
    yield rows(f"Step {figures.step.number}: {seconds_text(figures.step.seconds)} from left to right", shown)
    if count > _MOST_LANES:
        yield paragraph(f"{count - _MOST_LANES} further lanes are in the Perfetto file.")
    yield _legend("Work", [(", ".join(sorted(names)), klass) for klass, names in used.items()])
    yield _legend("Stalls", _legend_causes(causes))
    if not figures.lane_events:
        yield paragraph("Nothing was recorded within this step.")


def _legend(title: str, entries: list[tuple[str, str]]) -> str:
    """(name, class) of each colour; nothing for none."""
    if not entries:
        return ""
    items = "".join(f"<li>{swatch(f'k-{klass}')}{text(name, 80)}</li>" for name, klass in entries)
    return f'<ul class="legend" aria-label="Colours: {text(title.lower())}"><li><b>{text(title)}</b></li>{items}</ul>'


def _cause_colours(figures: Figures) -> dict[str, str]:
    """The causes that took longest get colours of their own, the others share the last."""
    return {cause: f"s{min(index, 7)}" for index, cause in enumerate(figures.stalls_by_cause)}


def _legend_causes(causes: Mapping[str, str]) -> list[tuple[str, str]]:
    several = list(causes.items())
    return several if len(several) <= 8 else [*several[:7], ("all other causes", "s7")]


def _occupancy(run: RunFiles, figures: Figures) -> Iterable[str]:
    shown = [axis_row(figures.step)]
    missing = []
    for tier in TIERS:
        counter = next((c for c in run.timeline.counters if c.name == tier and c.unit == "bytes"), None)
        samples = occupancy(counter.samples, figures.step) if counter else []
        if not samples:
            missing.append(tier)
            continue
        budget, most = figures.budget_bytes.get(tier), max(value for _, value in samples)
        detail = f"peak {format_bytes(most)}"
        detail += f" of {format_bytes(budget)} ({percent(most / budget)})" if budget else ", no budget known"
        shown.append(area_row(tier, detail, samples, budget, figures.step))
    if len(shown) > 1:
        yield rows("Bytes in use; the dashed line is the budget", shown)
    if missing:
        yield paragraph(
            f"Not recorded in this step: {', '.join(missing)} (the timeline has no samples of counters of these names)."
        )
    tiers = [tier for tier in TIERS if tier in figures.peak_bytes or tier in figures.budget_bytes]
    if tiers:
        cells = []
        for tier in tiers:
            peak, budget = figures.peak_bytes.get(tier), figures.budget_bytes.get(tier)
            used = peak / budget if peak is not None and budget else None
            cells.append((text(tier), _size(peak), _size(budget), _percent(used), bar(used) if used else ""))
        yield table("Peak and budget of each tier", ("tier", "peak", "budget", "used", ""), cells, (1, 2, 3))


def _traffic(run: RunFiles, figures: Figures) -> Iterable[str]:
    flat = [(kind, link, size) for kind, links in figures.traffic_bytes.items() for link, size in links.items()]
    flat.sort(key=lambda row: (-row[2], row[0], row[1]))
    if flat:
        most = max(size for _, _, size in flat) or 1.0
        cells = [
            (text(kind), text(link.replace("_", " ")), f"{size / 1e9:,.3f}", format_bytes(size), bar(size / most))
            for kind, link, size in flat[:_MOST_ROWS]
        ]
        told = bool(run.timeline.facts.get("traffic_bytes"))
        caption = "Bytes moved in a step, the mean of all that were recorded" if told else "Bytes moved in the step"
        yield table(caption, ("kind", "link", "GB", "bytes", ""), cells, (2, 3))
    else:
        yield paragraph("No bytes by kind and link: no event of the timeline carries any, and its facts name none.")
    if figures.tier_bytes:
        sizes = [(tier, way, size) for tier, both in figures.tier_bytes.items() for way, size in both.items()]
        most = max((size for _, _, size in sizes), default=0.0) or 1.0
        cells = [
            (text(tier), text(way), f"{size / 1e9:,.3f}", _size(size), bar(size / most)) for tier, way, size in sizes
        ]
        yield table("What crossed each tier's border", ("tier", "", "GB", "bytes", ""), cells, (2, 3))
    else:
        why = run.missing.get("metrics.jsonl", f"the metrics have no bytes of step {figures.step.number} and before it")
        yield paragraph(f"What crossed each tier's border is not known: {why}.", "soft")


def _roofline(figures: Figures) -> Iterable[str]:
    if not figures.rooflines:
        yield paragraph("No phases: the timeline has no events of the step itself, and nothing was predicted.")
        return
    cells = []
    for row in figures.rooflines:
        share = row.share
        cells.append(
            (
                text(row.phase),
                seconds_text(row.seconds),
                text(row.ceiling) if row.ceiling_seconds is not None else "no ceiling known",
                seconds_text(row.ceiling_seconds) if row.ceiling_seconds is not None else "–",
                _percent(share),
                bar(share) if share is not None else "",
            )
        )
    columns = ("phase", "measured", "bounded by", "at the ceiling", "reached", "")
    yield table("Seconds of the step by phase, and the least that the ceiling allows", columns, cells, (1, 3, 4))
    if not any(row.ceiling_seconds is not None for row in figures.rooflines):
        yield paragraph("No ceilings: prediction.json names none, and neither do the timeline's facts.", "soft")


def _prediction(run: RunFiles, figures: Figures) -> Iterable[str]:
    if not run.prediction:
        why = run.missing.get("prediction.json", "it is empty")
        yield paragraph(f"There is no prediction to compare with: prediction.json: {why}.")
        return
    groups = (
        ("step", "Step", "step_seconds"),
        ("busy", "Busy time of each channel", "busy_seconds"),
        ("traffic", "Bytes by kind and link", "traffic_bytes"),
        ("peak", "Peak of each tier", "peak_bytes"),
        ("stall", "Stalls by cause", "stall_seconds"),
    )
    absent = []
    for name, heading, key in groups:
        found = [row for row in figures.compared if row.group == name][:_MOST_ROWS]
        if key not in run.prediction:
            absent.append(key)
        if found and (key in run.prediction or name == "stall"):
            cells = [
                (text(row.name), _amount(row.predicted, row), _amount(row.measured, row), _ratio(row)) for row in found
            ]
            columns = ("", "predicted", "measured", "measured / predicted")
            yield table(heading, columns, cells, (1, 2, 3))
    if absent:
        yield paragraph(f"prediction.json does not name: {', '.join(absent)}.", "soft")


def _stalls(run: RunFiles, figures: Figures) -> Iterable[str]:
    if not figures.stalls:
        recorded = any(lane.kind == "stall" for lane in run.timeline.lanes)
        yield paragraph("The step never stood still." if recorded else "No stalls were recorded in this step.")
        return
    causes = _cause_colours(figures)
    length = figures.step.seconds or 1.0
    cells = [
        (
            swatch(f"k-{causes[stall.cause]}") + text(stall.name),
            f"{stall.count:,}",
            seconds_text(stall.seconds),
            percent(stall.seconds / length),
            bar(
                stall.seconds / figures.stalls[0].seconds if figures.stalls[0].seconds else 0,
                f"k-{causes[stall.cause]}",
            ),
        )
        for stall in figures.stalls[:_MOST_STALLS]
    ]
    left = figures.stalls[_MOST_STALLS:]
    if left:
        seconds = sum(stall.seconds for stall in left)
        cells.append(
            (
                f"{len(left)} other causes",
                f"{sum(stall.count for stall in left):,}",
                seconds_text(seconds),
                percent(seconds / length),
                "",
            )
        )
    columns = ("cause", "times", "seconds", "of the step", "")
    yield table("What the step waited for, longest first", columns, cells, (1, 2, 3))


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _size(value: float | None) -> str:
    return format_bytes(value) if value is not None else "–"


def _percent(share: float | None) -> str:
    return percent(share) if share is not None else "–"


def _amount(value: float | None, row: Compared) -> str:
    if value is None:
        return "–"
    return seconds_text(value) if row.unit == "seconds" else format_bytes(value)


def _ratio(row: Compared) -> str:
    return f"{row.ratio:.2f}" if row.ratio is not None else "–"
