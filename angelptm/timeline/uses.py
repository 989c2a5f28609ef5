"""The report's section about the traced step: its uses in order, and the schedule made from them.

What is no trace or schedule as the planner writes them is shown with whatever keys it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from angelptm.sizes import format_bytes
from angelptm.timeline.figures import Figures, seconds_text
from angelptm.timeline.html import paragraph, table, text
from angelptm.timeline.run_files import RunFiles, number

_MOST_ROWS = 400
_LIST_OF_USES = ("uses", "events", "sites", "steps")


def trace_section(run: RunFiles, figures: Figures) -> Iterable[str]:
    """Uses and schedule as the files have them; without a trace, what the step's own lanes did."""
    names = _unit_names(run.trace)
    uses = _uses(run.trace)
    if uses and names:
        yield from _planned_step(uses, names, run.schedule)
        if run.schedule is None:
            yield paragraph(f"schedule.json: {run.missing.get('schedule.json', 'it is empty')}.", "soft")
        return
    if uses:
        yield _generic("Uses in the order of the traced step", uses)
    else:
        why = run.missing.get("trace.json", "it holds no list of uses")
        events = [
            event
            for lane in run.timeline.lanes
            if lane.kind == "compute"
            for event in figures.lane_events.get(lane.name, [])
        ]
        events.sort(key=lambda event: event.start_s)
        if events:
            cells = [
                (text(event.name), text(event.lane), seconds_text(event.start_s - figures.step.start_s),
                 seconds_text(event.seconds))
                for event in events[:_MOST_ROWS]
            ]  # fmt: skip
            yield table("What the step did, in order", ("what", "lane", "at", "seconds"), cells, (2, 3))
            yield from _cut(len(events))
        yield paragraph(f"trace.json: {why}.", "soft")
    if run.schedule is None:
        yield paragraph(f"schedule.json: {run.missing.get('schedule.json', 'it is empty')}.", "soft")
        return
    if isinstance(run.schedule, Mapping):
        scalars = [
            (text(key), text(_plain(str(key), value)))
            for key, value in run.schedule.items()
            if not isinstance(value, (list, dict))
        ]
        if scalars:
            yield table("The schedule", ("", "value"), scalars)
    for key, moves in _lists(run.schedule):
        yield _generic(f"The schedule: {key}" if key else "The schedule", moves)


def _unit_names(trace: Any) -> list[str]:
    """Of the units, by their number; empty for what is no trace of the planner's."""
    layouts = trace.get("layouts") if isinstance(trace, Mapping) else None
    if not isinstance(layouts, list) or not all(isinstance(one, Mapping) and "name" in one for one in layouts):
        return []
    return [str(one["name"]) for one in layouts]


def _planned_step(uses: list[dict[str, Any]], names: list[str], schedule: Any) -> Iterable[str]:
    """One row for each use: how long it computes, and the moves that the schedule begins there."""
    schedule = schedule if isinstance(schedule, Mapping) else {}

    def name(unit: object) -> str:
        return names[unit] if isinstance(unit, int) and 0 <= unit < len(names) else f"unit {unit}"

    def total(key: str, *fields: str) -> float:
        return sum(number(one.get(field)) or 0.0 for one in _objects(schedule, key) for field in fields)

    begun: dict[int, list[str]] = {}
    count = len(uses)
    for fetch in _objects(schedule, "fetches"):
        what = f"fetch {name(fetch.get('unit'))}, {_plain('bytes', fetch.get('bytes'))}"
        _at(begun, fetch.get("trigger"), count).append(what)
        if number(fetch.get("ssd_pages")) and fetch.get("read_ahead_trigger") != fetch.get("trigger"):
            early = f"read {name(fetch.get('unit'))} ahead, {_plain('bytes', fetch.get('ssd_bytes'))}"
            _at(begun, fetch.get("read_ahead_trigger"), count).append(early)
    for copy in _objects(schedule, "copy_outs"):
        what = f"gradients of {name(copy.get('unit'))} to the host, {_plain('bytes', copy.get('bytes'))}"
        _at(begun, copy.get("use"), count).append(what)
    if schedule:
        order = schedule.get("update_order")
        ahead = schedule.get("read_ahead_order")
        facts = {
            "fetches": f"{len(_objects(schedule, 'fetches')):,}, of {format_bytes(total('fetches', 'bytes'))} in all, "
            f"{format_bytes(total('fetches', 'ssd_bytes'))} of them from the SSD",
            "furthest ahead of use": f"{schedule['lead']} uses" if schedule.get("lead") is not None else "no limit",
            "arena": f"{schedule.get('peak_frames')} frames, at least {schedule.get('lower_bound_frames')}",
            "pages read ahead": f"at most {schedule.get('read_ahead_frames')}",
            "updates": "inside the backward pass" if schedule.get("updates") == "backward" else "after the step",
            "updates read": format_bytes(total("write_backs", "read_bytes")),
            "updates write": format_bytes(total("write_backs", "state_bytes", "param_bytes")),
            "order of updates": _in_words(order, name),
            "states read ahead": _in_words(ahead, name),
        }
        yield table("The schedule", ("", "value"), [(text(key), text(value, 2000)) for key, value in facts.items()])
    cells = []
    for index, use in enumerate(uses[:_MOST_ROWS]):
        units = use.get("units")
        what = ", ".join(map(name, units)) if isinstance(units, list) else ""
        cells.append(
            (
                str(index),
                text(use.get("phase")),
                text(what),
                text(_plain("seconds", use.get("seconds"))),
                text(_plain("bytes", use.get("activation_bytes"))),
                "<br>".join(text(move) for move in begun.get(index, ())),
            )
        )
    if at_end := begun.get(count):
        cells.append(("end", "step", "", "", "", "<br>".join(map(text, at_end))))
    columns = ("use", "phase", "units", "computes", "activations alive", "moves that begin here")
    yield table("The step as traced, use by use, and the moves of the plan", columns, cells, (3, 4))
    yield from _cut(count)


def _at(begun: dict[int, list[str]], trigger: object, count: int) -> list[str]:
    """The list of a trigger; negative ones are of the step before: -1 is its end."""
    at = trigger if isinstance(trigger, int) else 0
    return begun.setdefault(at if at >= 0 else count + 1 + at, [])


def _objects(schedule: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = schedule.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _in_words(units: object, name: Callable[[object], str]) -> str:
    return ", ".join(map(name, units[:100])) if isinstance(units, list) and units else "none"


def _uses(trace: Any) -> list[dict[str, Any]]:
    lists = dict(_lists(trace))
    return next((lists[name] for name in _LIST_OF_USES if name in lists), next(iter(lists.values()), []))


def _lists(value: Any) -> list[tuple[str, list[dict[str, Any]]]]:
    """Lists of objects, at the top or one level below, whatever they are called."""
    candidates = value.items() if isinstance(value, Mapping) else [("", value)]
    found = [
        (str(key), [item for item in items if isinstance(item, dict)])
        for key, items in candidates
        if isinstance(items, list)
    ]
    return [(key, items) for key, items in found if items][:6]


def _generic(caption: str, items: list[dict[str, Any]]) -> str:
    """A table of whatever keys the first objects have."""
    columns = list(dict.fromkeys(str(key) for item in items[:20] for key in item))[:8]
    numeric = [i for i, name in enumerate(columns) if i and number(items[0].get(name)) is not None]
    cells = [[text(_plain(name, item.get(name)), 120) for name in columns] for item in items[:_MOST_ROWS]]
    return table(caption, [name.replace("_", " ") for name in columns], cells, numeric) + "".join(_cut(len(items)))


def _cut(count: int) -> Iterable[str]:
    if count > _MOST_ROWS:
        yield paragraph(f"The first {_MOST_ROWS} of {count:,} are shown.", "soft")


def _plain(key: str, value: Any) -> str:
    found = number(value)
    if found is not None and (key.endswith("seconds") or key.endswith("_s")):
        return seconds_text(found)
    if found is not None and key.endswith("bytes"):
        return format_bytes(found)
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)[:400]
