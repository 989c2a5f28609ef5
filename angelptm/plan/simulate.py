"""What a step takes: the runtime's threads in events, step after step until one is like the one before it."""

from __future__ import annotations

from dataclasses import replace

from angelptm.plan.channels import Event
from angelptm.plan.placed import Plan
from angelptm.plan.prediction import CHANNELS, Prediction, Settings, rank
from angelptm.plan.rates import Rates
from angelptm.plan.schedule import Schedule, Traffic
from angelptm.plan.stepping import SimulatedStep, StepTotals
from angelptm.plan.trace import Trace

_LEAST_STEPS, _MOST_STEPS = 3, 8
_AVERAGED_STEPS = 4  # the last ones, where none becomes like the one before it
# A step that differs by less from the one before it is like it. Which of two spans comes first may never settle.
_STEADY = 2e-3


def _difference(later: StepTotals, former: StepTotals) -> StepTotals:
    return StepTotals(
        {name: later.busy[name] - former.busy[name] for name in CHANNELS},
        {
            cause: seconds - former.stalls.get(cause, 0.0)
            for cause, seconds in later.stalls.items()
            if seconds > former.stalls.get(cause, 0.0)
        },
        {
            kind: {link: size - former.traffic[kind][link] for link, size in links.items()}
            for kind, links in later.traffic.items()
        },
        later.handed_over - former.handed_over,
        later.now - former.now,
        [
            Event(event.lane, event.name, event.start - former.now, event.end - former.now, event.bytes)
            for event in later.events
        ],
    )


def _mean(later: StepTotals, former: StepTotals, steps: int, events: list[Event]) -> StepTotals:
    """Of the steps between two totals."""
    whole = _difference(replace(later, events=[]), former)
    return StepTotals(
        {name: seconds / steps for name, seconds in whole.busy.items()},
        {cause: seconds / steps for cause, seconds in whole.stalls.items()},
        {kind: {link: size // steps for link, size in links.items()} for kind, links in whole.traffic.items()},
        whole.handed_over // steps,
        whole.now / steps,
        events,
    )


def _is_whole(moved: Traffic, scheduled: Traffic) -> bool:
    """Whether a step moved what one step's schedule has, and neither left some to the next nor did some of it.

    Only what fetches read from the SSD may be less, by what was handed over.
    """
    return all(
        moved[kind][link] == size
        for kind, links in scheduled.items()
        for link, size in links.items()
        if (kind, link) != ("PARAM", "ssd_read")
    )


def simulate(
    plan: Plan, trace: Trace, schedule: Schedule, rates: Rates, settings: Settings | None = None
) -> Prediction:
    """The steady step of ``trace`` under ``schedule`` on a machine of these rates. Deterministic."""
    run = SimulatedStep(plan, trace, schedule, rates, settings or Settings())
    ends = [run.take_totals()]
    run.begin()
    last: StepTotals | None = None
    steady = False
    for step in range(_MOST_STEPS):
        while not run.step_ended:
            going = run.machine.step()
            assert going, f"use {run.use} of step {run.step} waits for what nothing brings"
        ends.append(run.take_totals())
        this = _difference(ends[-1], ends[-2])
        alike = last is not None and abs(this.now - last.now) <= _STEADY * this.now and this.traffic == last.traffic
        steady = alike and _is_whole(this.traffic, schedule.traffic)
        last = this
        if steady and step + 1 >= _LEAST_STEPS:
            break
        run.resume()
    assert last is not None
    if not steady:
        last = _mean(ends[-1], ends[-1 - _AVERAGED_STEPS], _AVERAGED_STEPS, last.events)
    page = plan.page_bytes
    kept = plan.ring_frames + plan.saver_frames + plan.readout_frames + plan.spare_frames
    host_frames = plan.home_frames + kept + run.fetcher.peak_frames
    first, second = rank(last.busy, rates.compute_uses_cores)
    return Prediction(
        step_seconds=last.now,
        busy_seconds=last.busy,
        stall_seconds=last.stalls,
        traffic=last.traffic,
        handed_over_bytes=last.handed_over,
        peak_bytes={
            "device": (run.peak_frames + plan.device_state_frames) * page,
            "host": host_frames * page,
            "ssd": sum(tiers["ssd"] for tiers in plan.kind_bytes.values()) + plan.update_slots * page,
        },
        bottleneck=first,
        second_bottleneck=second,
        steady=steady,
        events=tuple(last.events),
    )
