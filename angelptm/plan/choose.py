"""From a trace to the plan, schedule and prediction of a run: a few candidates, each simulated, the fastest taken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from angelptm.plan.budgets import Budgets
from angelptm.plan.moves import make_schedule, planned_offsets
from angelptm.plan.placed import Plan
from angelptm.plan.placing import make_plan
from angelptm.plan.prediction import Prediction, Settings
from angelptm.plan.rates import Rates
from angelptm.plan.schedule import Schedule
from angelptm.plan.simulate import simulate
from angelptm.plan.trace import Trace
from angelptm.states.layout import choose_page_elements
from angelptm.units.layout import ParamSpec, pack

_TIE = 1e-3
"""Candidates whose times differ by less than this part of them are as fast as one another."""


def plan_from_trace(trace: Trace, budgets: Budgets) -> Plan:
    """The plan of a traced model under any budgets, any page size too. Raises CapacityError as make_plan does."""
    params = [(param.numel, param.states) for one in trace.layouts for param in one.params if param.trainable]
    page_elements = choose_page_elements(
        params,
        page_bytes=budgets.page_bytes,
        param_itemsize=trace.param_itemsize,
        grad_itemsize=trace.grad_itemsize,
        moment_count=trace.moment_count,
    )
    layouts = [
        pack(
            layout.name,
            layout.index,
            [ParamSpec(one.name, one.shape, one.trainable, one.owners, one.states) for one in layout.params],
            page_elements,
        )
        for layout in trace.layouts
    ]
    return make_plan(
        layouts,
        trace.sites,
        budgets,
        param_itemsize=trace.param_itemsize,
        grad_itemsize=trace.grad_itemsize,
        moment_count=trace.moment_count,
    )


@dataclass(frozen=True)
class Candidate:
    """What is free in a schedule; see make_schedule."""

    room: int = 0
    lead: int | None = None
    retain: bool = True
    read_ahead_frames: int | None = None
    read_states_ahead: bool = True

    def schedule(self, plan: Plan, trace: Trace, updates: str) -> Schedule:
        return make_schedule(
            plan,
            trace,
            lead=self.lead,
            room=self.room,
            retain=self.retain,
            updates=updates,
            read_ahead_frames=self.read_ahead_frames,
            read_states_ahead=self.read_states_ahead,
        )


def _variants(best: Candidate, base: Schedule, stage: int, keeps_lead: bool) -> Iterator[Candidate]:
    """Candidates that differ from ``best`` in one respect: room against retention, lead, or what is read ahead."""
    if stage == 0:
        yield from (replace(best, room=room) for room in (0, 1, 2, 4))
        yield replace(best, room=2, retain=False)
    elif stage == 1 and not keeps_lead:
        yield from (replace(best, lead=lead) for lead in (0, 1, 2, 4, 8))
    elif stage == 2 and any(fetch.ssd_pages for fetch in base.fetches):
        yield from (replace(best, read_ahead_frames=frames) for frames in (0, base.read_ahead_frames // 2))
        yield replace(best, read_states_ahead=False)
    elif stage == 2:
        yield replace(best, read_states_ahead=False)
    elif stage == 3:
        # As on demand: what runs ahead may be in the way of what is needed now.
        for one in (best, Candidate(lead=best.lead)):
            lead = one.lead if keeps_lead else 0
            yield replace(one, lead=lead, read_ahead_frames=0, read_states_ahead=False)


def choose(
    plan: Plan,
    trace: Trace,
    rates: Rates,
    settings: Settings | None = None,
    *,
    lead: int | None = None,
    seconds: float = float("inf"),
) -> tuple[Schedule, Prediction]:
    """The fastest schedule as the simulator sees it, and what it says of it.

    In a mode other than "planned" nothing is chosen: units lie where the plan has them and move at use. Of those that
    are as fast as the fastest within a thousandth, the one with the least traffic is taken. ``lead`` as in
    make_schedule; None leaves it free. No candidate is begun that would not be done after ``seconds``, but for the
    first one, which is that of make_schedule.
    """
    began = time.perf_counter()
    settings = settings or Settings()
    if settings.mode != "planned":
        schedule = make_schedule(plan, trace, lead=lead, updates=settings.updates)
        schedule = replace(schedule, offsets=planned_offsets(plan, trace) or schedule.offsets)
        return schedule, simulate(plan, trace, schedule, rates, settings)
    found: dict[str, tuple[Schedule, Candidate, Prediction]] = {}  # by the schedule's JSON
    best = Candidate(lead=lead)
    longest = 0.0

    def fastest() -> tuple[Schedule, Candidate, Prediction]:
        limit = min(one.step_seconds for _, _, one in found.values()) * (1 + _TIE)
        ties = [one for one in found.values() if one[2].step_seconds <= limit]
        return min(ties, key=lambda one: one[2].traffic_bytes)

    for stage in range(4):
        base = fastest()[0] if found else best.schedule(plan, trace, settings.updates)
        for candidate in _variants(best, base, stage, lead is not None):
            start = time.perf_counter()
            if found and start - began + longest > seconds:
                break
            schedule = candidate.schedule(plan, trace, settings.updates)
            # The lead itself changes nothing; what it leads to may.
            key = replace(schedule, lead=None).to_json()
            if key not in found:
                found[key] = (schedule, candidate, simulate(plan, trace, schedule, rates, settings))
            longest = max(longest, time.perf_counter() - start)
        best = fastest()[1]
    chosen, _, prediction = fastest()
    return chosen, prediction
