"""Records what a step does, in the order in which it does it: the trace that plans are made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from angelptm.plan import GradientDone, Plan, Trace, Use
from angelptm.units import Site


@dataclass
class _Entry:
    site: int
    phase: str
    start: float
    waited: float = 0.0  # for pages, and copying gradients: no part of the computing
    end: float = 0.0
    activation_bytes: int = 0
    last: int | None = None  # entered before the forward was left


class Tracer:
    """Traces one step after the other. Later steps of the same order give the durations, on average: the first one
    touches everything for the first time."""

    def __init__(self, plan: Plan, sites: Sequence[Site], *, now: Callable[[], float] = time.perf_counter) -> None:
        """``now``: the time in seconds, of a step that is made up where none passes."""
        self._now = now
        self._plan = plan
        self._sites = sites
        self._inside = [_inside(sites, index) for index in range(len(sites))]
        self._entries: list[_Entry] = []
        self._gradients: dict[int, GradientDone] = {}
        self._ended = self._stepped = 0.0
        self._outside = 0.0
        self.trace: Trace | None = None
        self.steps = 0
        self._alike = 0  # of them, the last ones of one order

    def enter(self, site: int, phase: str) -> None:
        """The computing thread comes to a site."""
        now = self._now()
        if self._entries and not self._entries[-1].end:
            self._entries[-1].end = now
        if not self._entries and self._stepped:
            self._outside += now - self._stepped
        if phase == "forward" and self._ended:  # of another micro-batch
            self._outside += now - self._ended
            self._ended = 0.0
        self._entries.append(_Entry(site, phase, now))

    def waited(self, seconds: float) -> None:
        """The computing thread waited, or copied gradients, since it came to where it is."""
        if self._entries and not self._entries[-1].end:
            self._entries[-1].waited += seconds

    def leave_forward(self, site: int, activation_bytes: int) -> None:
        """The forward of a site is over; so many bytes are kept for its backward, and for all before it."""
        for entry in reversed(self._entries):
            if entry.site == site and entry.phase != "backward" and entry.last is None:
                entry.activation_bytes = activation_bytes
                entry.last = len(self._entries) - 1
                return

    def gradient(self, unit: int, size: int, copy_seconds: float) -> None:
        """A gradient of the unit has come, and was copied to its pages."""
        self.waited(copy_seconds)
        former = self._gradients.get(unit)
        total = (former.bytes if former else 0) + size
        seconds = (former.copy_seconds if former else 0.0) + copy_seconds
        self._gradients[unit] = GradientDone(unit, max(0, len(self._entries) - 1), total, seconds)

    def end_backward(self) -> None:
        self._ended = self._now()
        if self._entries and not self._entries[-1].end:
            self._entries[-1].end = self._ended

    def end_step(self, tokens: int, facts: Mapping[str, object]) -> bool:
        """The step is over. Says whether there is a trace of it, or a refined one."""
        now = self._now()
        entries, gradients = self._entries, self._gradients
        if self._ended:
            self._outside += now - self._ended
        outside = self._outside
        began = entries[0].start if entries else now
        self.drop()
        self._stepped = now
        if not entries or not gradients:
            return False
        uses = self._uses(entries)
        # What the step does outside of every site belongs to its first use: nothing is moved for it.
        uses[0] = replace(uses[0], seconds=uses[0].seconds + outside)
        found = Trace(
            uses=tuple(uses),
            gradients=tuple(sorted(gradients.values(), key=lambda one: (one.use, one.unit))),
            layouts=tuple(unit.layout for unit in self._plan.units),
            sites=tuple((tuple(site.units), site.depth) for site in self._sites),
            param_itemsize=self._plan.param_itemsize,
            grad_itemsize=self._plan.grad_itemsize,
            moment_count=self._plan.moment_count,
            step_seconds=now - began + outside,
            tokens_per_step=tokens,
            facts=dict(facts),
        )
        self.steps += 1
        self._alike = self._alike + 1 if self.trace is not None and _same_order(self.trace, found) else 1
        if self._alike <= 2 or self.trace is None:
            self.trace = found
        else:
            self.trace = _mean(self.trace, found, 1 / (self._alike - 1))
        return True

    def go_on(self) -> None:
        """What came since the end of the step belongs to no step."""
        self._stepped = self._now()

    def drop(self) -> None:
        """Forgets the step that is being traced."""
        self._entries, self._gradients = [], {}
        self._ended = self._stepped = self._outside = 0.0

    def _uses(self, entries: Sequence[_Entry]) -> list[Use]:
        kept: dict[int, int] = {}
        uses = []
        for index, entry in enumerate(entries):
            last = self._last_of(entries, index) if entry.last is None else entry.last
            if entry.phase == "forward":
                kept[entry.site] = entry.activation_bytes
            seconds = max(0.0, entry.end - entry.start - entry.waited)
            units = tuple(self._sites[entry.site].units)
            uses.append(Use(entry.site, units, entry.phase, seconds, last, kept.get(entry.site, 0)))
        return uses

    def _last_of(self, entries: Sequence[_Entry], index: int) -> int:
        """The last use inside a backward one, whose end nobody sees."""
        last = index
        while last + 1 < len(entries) and self._belongs(entries, index, last + 1):
            last += 1
        return last

    def _belongs(self, entries: Sequence[_Entry], index: int, other: int) -> bool:
        """Whether the use ``other`` is inside the use ``index``: of a site inside it, or its own recomputation."""
        outer, inner = entries[index], entries[other]
        if (outer.phase == "forward") != (inner.phase == "forward"):
            return False
        if inner.site == outer.site:
            return outer.phase == "backward" and inner.phase == "recompute"
        return inner.site in self._inside[outer.site]


def _inside(sites: Sequence[Site], index: int) -> set[int]:
    found = set()
    for other in range(index + 1, len(sites)):
        if sites[other].depth <= sites[index].depth:
            break
        found.add(other)
    return found


def _same_order(former: Trace, found: Trace) -> bool:
    return [(use.site, use.phase) for use in former.uses] == [(use.site, use.phase) for use in found.uses]


def _mean(former: Trace, found: Trace, part: float) -> Trace:
    """``found`` with durations between its own, which count for ``part``, and those of ``former``."""

    def between(old: float, new: float) -> float:
        return old + (new - old) * part

    uses = tuple(replace(new, seconds=between(old.seconds, new.seconds)) for old, new in zip(former.uses, found.uses))
    seconds = {one.unit: one.copy_seconds for one in former.gradients}
    gradients = tuple(
        replace(one, copy_seconds=between(seconds.get(one.unit, one.copy_seconds), one.copy_seconds))
        for one in found.gradients
    )
    return replace(found, uses=uses, gradients=gradients, step_seconds=between(former.step_seconds, found.step_seconds))
