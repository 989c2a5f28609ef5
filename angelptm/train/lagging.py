"""How far parameters were behind their gradients, step by step: for the metrics of runs in which nothing waits for
updates."""

from __future__ import annotations

from collections import Counter
from typing import Any

from angelptm.engine import Engine


class Lagging:
    """Looks at an engine's counters after each step.

    ``staleness``: gradients that the parameters of a use lacked, over all units. ``gradients``: of spans;
    ``waiting`` at that moment. ``busy``: the part of the time in which the updating threads computed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lags, self._first = self._total(), self._total()

    def _total(self) -> Counter[int]:
        return sum((Counter(own) for own in self._engine.staleness()), Counter())

    def step(self) -> dict[str, Any]:
        """Since the step before."""
        now = self._total()
        lags, self._lags = now - self._lags, now
        return {"staleness_mean": _mean(lags), "staleness_max": max(lags, default=0), **self._engine.gradient_counts()}

    def whole(self) -> dict[str, Any]:
        """Since the start."""
        lags = self._total() - self._first
        return {
            "staleness": {str(lag): count for lag, count in sorted(lags.items())},
            "staleness_mean": _mean(lags),
            "staleness_max": max(lags, default=0),
            "gradients": self._engine.gradient_counts(),
        }


def _mean(lags: Counter[int]) -> float:
    uses = sum(lags.values())
    return sum(lag * count for lag, count in lags.items()) / uses if uses else 0.0
