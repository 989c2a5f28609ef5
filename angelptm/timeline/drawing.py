"""Rows of a step drawn as SVG: lanes and the occupancy of tiers, over one time axis.

Only shapes are SVG, stretched to the width of the page; labels are HTML, so that they keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from angelptm.timeline.data import Event, Step
from angelptm.timeline.figures import seconds_text
from angelptm.timeline.html import text
from angelptm.timeline.perfetto import nested_tracks

_WIDTH = 1000.0
_LEAST = 0.7
"""Narrower events are drawn this wide, and neighbours of one colour as one."""
_TRACK_PIXELS = 14
_MOST_TRACKS = 6
_MOST_POINTS = 500
_MERGED = ", and others too short to draw"

Colour = Callable[[Event], str]


def lane_row(label: str, detail: str, events: Sequence[Event], step: Step, colour: Colour) -> str:
    """A lane: bars at the events' times; what overlaps lies on further tracks below."""
    tracks = nested_tracks(events, nest=False)
    if len(tracks) > _MOST_TRACKS:
        rest = [event for track in tracks[_MOST_TRACKS - 1 :] for event in track]
        tracks = [*tracks[: _MOST_TRACKS - 1], sorted(rest, key=lambda event: event.start_s)]
    height = max(1, len(tracks))
    shapes = []
    for number, track in enumerate(tracks):
        for left, right, name, klass in _merged(track, step, colour):
            shapes.append(
                f'<rect class="k-{klass}" x="{left:.2f}" y="{number + 0.08:.2f}" width="{right - left:.2f}" '
                f'height=".84"><title>{text(name, 200)}</title></rect>'
            )
    pixels = max(20, _TRACK_PIXELS * height)
    return _row(
        label,
        detail,
        f'<svg role="img" aria-label="{text(f"{label}: {detail}")}" viewBox="0 0 {_WIDTH:.0f} {height}" '
        f'preserveAspectRatio="none" height="{pixels}">{"".join(shapes)}</svg>',
    )


def area_row(label: str, detail: str, samples: Sequence[tuple[float, float]], budget: float | None, step: Step) -> str:
    """A quantity that holds between its samples, with its budget as a dashed line."""
    top = 1.08 * max([budget or 0.0, *(value for _, value in samples)]) or 1.0
    points = _binned(samples, step)
    path = ["M0 100"]
    for index, (x, value) in enumerate(points):
        y = 100 - 100 * max(0.0, value) / top
        following = points[index + 1][0] if index + 1 < len(points) else _WIDTH
        path.append(f"L{x:.1f} {y:.2f}H{following:.1f}")
    line = ""
    if budget:
        at = 100 - 100 * budget / top
        line = f'<line class="budget" x1="0" x2="{_WIDTH:.0f}" y1="{at:.2f}" y2="{at:.2f}"/>'
    return _row(
        label,
        detail,
        f'<svg role="img" aria-label="{text(f"{label}: {detail}")}" viewBox="0 0 {_WIDTH:.0f} 100" '
        f'preserveAspectRatio="none" height="70"><path class="area" d="{"".join(path)}V100Z"/>{line}</svg>',
    )


def axis_row(step: Step) -> str:
    """Times since the step's beginning."""
    spans = [
        f'<span style="left:{100 * at / step.seconds:.2f}%">{text(seconds_text(at) if at else "0")}</span>'
        for at in _ticks(step.seconds)
    ]
    return f'<div></div><div class="axis" aria-hidden="true">{"".join(spans)}</div>'


def group_row(name: str) -> str:
    return f'<div class="group">{text(name)}</div>'


def rows(caption: str, content: Sequence[str]) -> str:
    body = "\n".join(content)
    return f'<figure><figcaption>{text(caption)}</figcaption><div class="rows">\n{body}\n</div></figure>'


def _row(label: str, detail: str, drawing: str) -> str:
    return (
        f'<div class="label" title="{text(label)}">{text(label)}<small>{text(detail)}</small></div><div>{drawing}</div>'
    )


def _merged(track: Sequence[Event], step: Step, colour: Colour) -> list[tuple[float, float, str, str]]:
    """(left, right, title, class). At most one shape for each of the page's pixels, whatever the number of events."""
    found: list[tuple[float, float, str, str]] = []
    for event in track:
        left, right = _x(event.start_s, step), _x(event.end_s, step)
        klass = colour(event)
        if found and klass == found[-1][3] and right - found[-1][1] < _LEAST:
            former = found[-1][2]
            name = former if former.endswith(_MERGED) else former + _MERGED
            found[-1] = (found[-1][0], max(found[-1][1], right), name, klass)
            continue
        if found:
            left = max(left, min(found[-1][1], right))  # what came before may have been widened
        right = min(_WIDTH, max(right, left + _LEAST))
        title = f"{event.name}: {seconds_text(event.seconds)} at {seconds_text(event.start_s - step.start_s)}"
        found.append((min(left, _WIDTH - _LEAST), right, title, klass))
    return found


def _x(at_s: float, step: Step) -> float:
    if step.seconds <= 0:
        return 0.0
    return _WIDTH * min(1.0, max(0.0, (at_s - step.start_s) / step.seconds))


def _binned(samples: Sequence[tuple[float, float]], step: Step) -> list[tuple[float, float]]:
    """At most _MOST_POINTS points, the highest value of each bin, since peaks are what budgets are about."""
    bins: dict[int, tuple[float, float]] = {}
    for at, value in samples:
        x = _x(at, step)
        index = int(x * _MOST_POINTS / _WIDTH)
        former = bins.get(index)
        bins[index] = (former[0], max(former[1], value)) if former and len(samples) > _MOST_POINTS else (x, value)
    return [bins[index] for index in sorted(bins)]


def _ticks(seconds: float) -> list[float]:
    """About six round times, with room for the last one's label."""
    if seconds <= 0:
        return [0.0]
    rough = seconds / 6
    scale = 10.0 ** math.floor(math.log10(rough))
    interval = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= rough)
    return [index * interval for index in range(int(0.93 * seconds / interval) + 1)]
