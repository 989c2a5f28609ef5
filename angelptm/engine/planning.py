"""From traced steps to a plan that the scheduler follows, and to what the plan says that a step takes."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from angelptm.config import Config
from angelptm.engine.assembly import Parts
from angelptm.engine.dtypes import TORCH_DTYPES
from angelptm.engine.hooks import Hooks
from angelptm.engine.measure import DriveWatch, compute_speed, measure_rates
from angelptm.engine.optimizer import RULES
from angelptm.engine.scheduler import Scheduler
from angelptm.engine.setup import grad_precision, updates_in_backward
from angelptm.engine.tracing import Tracer
from angelptm.errors import CapacityError
from angelptm.plan import Prediction, Rates, Schedule, Settings, Trace, choose, simulate
from angelptm.units import Site

_log = logging.getLogger("angelptm")

TRACED_STEPS = 3
# To choose may take this long; or this part of a step, whichever is more.
_CHOOSING_SECONDS, _CHOOSING_PART = 0.5, 0.02


def settings_of(config: Config) -> tuple[Settings, int | None]:
    """How a config's steps run, and the lead of their fetches; None leaves that to the plan."""
    updates = "backward" if updates_in_backward(config) else "forward"
    return Settings(config.execution.moves, updates), None if config.execution.lead == "auto" else config.execution.lead


class Planning:
    """Traces the first steps, in which computing has the machine to itself: pages move on demand, and each step waits
    for its updates. Then the simulator chooses a plan, with rates that were measured when first it was quiet."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        sites: Sequence[Site],
        hooks: Hooks,
        scheduler: Scheduler,
        peak_bytes: Callable[[], dict[str, int]],
    ) -> None:
        self._config = config
        self._parts = parts
        self._hooks = hooks
        self._scheduler = scheduler
        self._settings, self._lead = settings_of(config)
        self.rates: Rates | None = None
        self.prediction: Prediction | None = None
        self._chosen: Schedule | None = None
        self._speeds: list[float] = []  # of computing, between the steps that are traced
        self._peak_bytes = peak_bytes
        self._peaks: dict[str, int] = {}  # before what is predicted
        self._watch = DriveWatch(parts.store)
        self._tracer = Tracer(parts.plan, sites)
        self._hooks.tracer = self._tracer
        parts.residency.stall_listeners.append(self._stalled)

    @property
    def trace(self) -> Trace | None:
        return self._tracer.trace

    @property
    def schedule(self) -> Schedule | None:
        return self._scheduler.schedule

    @property
    def is_tracing(self) -> bool:
        """Whether this step is one of the first."""
        return self._hooks.tracer is not None

    def facts(self) -> dict[str, Any] | None:
        """See Engine.prediction."""
        if self.prediction is None or self.rates is None:
            return None
        facts = self.prediction.facts()
        facts["traffic_bytes"] = facts.pop("traffic")
        # Filling the pages and tracing on demand came before the steady step, and may have held more.
        for tier, size in self._peaks.items():
            facts["peak_bytes"][tier] = max(facts["peak_bytes"][tier], size)
        return {**facts, "rates": asdict(self.rates)}

    def predict_again(self) -> dict[str, Any] | None:
        """As ``facts``, with rates measured now, of the plan that is followed: where the machine has other work too."""
        trace, rates = self.trace, self._measure()
        if self._chosen is None or trace is None or rates is None:
            return None
        if rates.compute_per_s:
            trace = trace.scaled(statistics.mean(self._speeds) / rates.compute_per_s)
        self.rates = rates
        self.prediction = simulate(self._parts.plan, trace, self._chosen, rates, self._settings)
        return self.facts()

    def _stalled(self, _cause: str, start: float, end: float) -> None:
        self._tracer.waited(end - start)

    def gradient(self, unit: int, size: int, seconds: float) -> None:
        if self._hooks.tracer is not None:
            self._tracer.gradient(unit, size, seconds)

    def drop(self) -> None:
        self._tracer.drop()

    def end_step(self) -> None:
        if self._hooks.tracer is None:
            return
        ranks = self._parts.ranks
        traced = self._tracer.end_step(0, {})
        self._parts.updates.drain()
        ranks.barrier("the end of a traced step")  # all measure while nothing moves
        self._speeds.append(compute_speed(self._parts.dtype, self._parts.device))
        trace = self._tracer.trace
        if traced and trace is not None and self._tracer.steps >= TRACED_STEPS:
            self.rates = self._measure()
            if not ranks.any(self.rates is None, "the rates of this machine") and self.rates is not None:
                self._hooks.tracer = None
                self._conclude(trace, self.rates)
        self._tracer.go_on()

    def _conclude(self, trace: Trace, rates: Rates) -> None:
        plan = self._parts.plan
        self._peaks = self._peak_bytes()
        seconds = max(_CHOOSING_SECONDS, _CHOOSING_PART * trace.step_seconds)
        refused = None
        if self._parts.ranks.is_first:
            try:
                self._chosen, self.prediction = choose(
                    plan, trace, rates, self._settings, lead=self._lead, seconds=seconds
                )
            except CapacityError as error:
                refused = str(error)
        # What ranks gather, and when, is the same for all: that of the first one's schedule.
        self._chosen, refused = self._parts.ranks.of_first((self._chosen, refused), "the schedule")
        if self._chosen is None:
            # The traced steps found room for each unit as it came; there is none that all of them could keep.
            _log.warning("units go on to move on demand, as no schedule of them fits: %s", refused)
            return
        if not self._parts.ranks.is_first:
            self.prediction = simulate(plan, trace, self._chosen, rates, self._settings)
        if self._settings.mode == "planned":
            self._scheduler.follow(trace, self._chosen, use_offsets=not plan.params_stay)

    def _measure(self) -> Rates | None:
        """Makes the machine quiet first. None where an update failed, which is for those who wait for it to learn."""
        try:
            self._parts.updates.drain()
            self._parts.updates.recall()
        except Exception:
            return None
        self._parts.fetcher.let_go()
        return measure_rates(
            self._parts.store,
            self._parts.plan,
            self._parts.device,
            rule=RULES[self._config.optimizer.type],
            grad_dtype=TORCH_DTYPES[grad_precision(self._config)],
            param_dtype=self._parts.dtype,
            watched=self._watch.take(),
        )
