"""The report's section on updates that nobody waited for: how far parameters were behind, and what became of the
gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from angelptm.timeline.figures import Figures, percent
from angelptm.timeline.html import bar, paragraph, table, text
from angelptm.timeline.run_files import RunFiles, number

_MOST_UNITS = 200
_MOST_COLUMNS = 12


def updates_section(run: RunFiles, figures: Figures) -> Iterable[str]:
    """From the timeline's ``updates`` fact."""
    facts = run.timeline.facts.get("updates")
    if not isinstance(facts, Mapping):
        yield paragraph(
            "Each unit waited for its update before its next use (update.mode: sync), so parameters were never behind "
            "their gradients."
        )
        return
    bound = number(facts.get("max_staleness"))
    mode = str(facts.get("mode", "?"))
    limit = f"at most {bound:.0f}, enforced" if bound is not None else "nothing bounds it"
    yield paragraph(
        f"Mode {mode}: how many of a unit's gradients the parameters that a step computed with lacked; {limit}."
    )
    yield paragraph("What was predicted above is a step that waits for its updates, as in mode sync.", "soft")
    staleness = _histograms(facts.get("staleness"))
    if staleness:
        yield _staleness_table(staleness)
    else:
        yield paragraph("No use was recorded.", "soft")
    counts = facts.get("gradients")
    if isinstance(counts, Mapping):
        rows = [(text(name), f"{value:,.0f}") for name, one in counts.items() if (value := number(one)) is not None]
        caption = "Gradients of spans in the recorded steps; waiting: at their end"
        yield table(caption, ("gradients", "count"), rows, {1})
    if threads := list(_utilisation(run, figures)):
        caption = "Updating threads: time in kernels and checks, of this step"
        lanes = [(text(lane), percent(share), bar(share, "k-update")) for lane, share in threads]
        yield table(caption, ("thread", "busy", ""), lanes, {1})


def _histograms(found: Any) -> dict[str, dict[int, int]]:
    """unit → gradients lacking → uses. Whatever is not of this form is left out."""
    if not isinstance(found, Mapping):
        return {}
    result: dict[str, dict[int, int]] = {}
    for unit, counts in found.items():
        if isinstance(counts, Mapping):
            own = {}
            for lag, value in counts.items():
                count = number(value)
                if str(lag).isdecimal() and count is not None and count > 0:
                    own[int(lag)] = int(count)
            if own:
                result[str(unit)] = own
    return result


def _staleness_table(staleness: Mapping[str, Mapping[int, int]]) -> str:
    most = max(max(counts) for counts in staleness.values())
    columns = list(range(min(most, _MOST_COLUMNS - 1) + 1))
    names = [str(lag) for lag in columns]
    if most > columns[-1]:
        names[-1] += " and more"

    def row(name: str, counts: Mapping[int, int]) -> tuple[str, ...]:
        uses = sum(counts.values())
        mean = sum(lag * count for lag, count in counts.items()) / uses
        shares = [
            sum(count for lag, count in counts.items() if min(lag, columns[-1]) == column) / uses for column in columns
        ]
        return (text(name), f"{uses:,}", f"{mean:.2f}", str(max(counts)), *(percent(share) for share in shares))

    whole: dict[int, int] = {}
    for counts in staleness.values():
        for lag, count in counts.items():
            whole[lag] = whole.get(lag, 0) + count
    rows = [row("all units", whole)] + [row(name, counts) for name, counts in list(staleness.items())[:_MOST_UNITS]]
    if (left := len(staleness) - _MOST_UNITS) > 0:
        rows.append((f"{left} other units", *([""] * (len(names) + 3))))
    numeric = range(1, len(names) + 4)
    return table("Gradients lacking, share of uses", ("unit", "uses", "mean", "most", *names), rows, numeric)


def _utilisation(run: RunFiles, figures: Figures) -> Iterable[tuple[str, float]]:
    """Of each updating thread: the part of the step in which it computed."""
    length = figures.step.seconds or 1.0
    for lane in run.timeline.lanes:
        if lane.kind == "updater" and (events := figures.lane_events.get(lane.name)):
            worked = [event for event in events if event.what in ("update", "check")]
            inside = sum(
                max(0.0, min(event.end_s, figures.step.end_s) - max(event.start_s, figures.step.start_s))
                for event in worked
            )
            if worked:
                yield lane.name, min(1.0, inside / length)
