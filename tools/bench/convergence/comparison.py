"""Modes against sync, seed by seed: at equal tokens, and at equal wall time."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Run = dict[str, Any]


def model_of(settings: dict[str, Any]) -> str:
    """For titles; runs that say nothing of it are of the demo's model."""
    layers, width = settings.get("layers", 6), settings.get("width", 384)
    return "gpt2-demo" if (layers, width) == (6, 384) else f"GPT-2, {layers} layers of {width}"


def complete_seeds(runs: Sequence[Run], modes: Sequence[str]) -> list[int]:
    """Seeds that every mode has come to the end with: only these are compared."""
    ended = {(run["mode"], run["seed"]) for run in runs if run["diverged_at"] is None}
    return sorted(seed for seed in {seed for _, seed in ended} if all((mode, seed) in ended for mode in modes))


def loss_at(run: Run, seconds: float) -> float:
    """The validation loss that a run had after so much training, between its validations by a straight line."""
    return float(np.interp(seconds, column(run, "seconds"), column(run, "validation_loss")))


def column(run: Run, name: str) -> list[float]:
    return [point[name] for point in run["curve"]]


def compare(runs: Sequence[Run], modes: Sequence[str]) -> dict[str, Any]:
    """``equal_seconds``: for each seed, the training time of its fastest mode. For each mode: spreads over seeds, and
    those of its losses' ratio to sync's, less 1, None where sync is not among the modes."""
    seeds = complete_seeds(runs, modes)
    by_mode = {mode: {run["seed"]: run for run in runs if run["mode"] == mode} for mode in modes}
    equal = {seed: min(by_mode[mode][seed]["training_seconds"] for mode in modes) for seed in seeds}
    final = {mode: [by_mode[mode][seed]["final_validation_loss"] for seed in seeds] for mode in modes}
    timed = {mode: [loss_at(by_mode[mode][seed], equal[seed]) for seed in seeds] for mode in modes}
    found = []
    for mode in modes if seeds else []:
        chosen = [by_mode[mode][seed] for seed in seeds]
        found.append(
            {
                "mode": mode,
                "final_loss": spread(final[mode]),
                "final_against_sync": _against(final[mode], final.get("sync")),
                "equal_time_loss": spread(timed[mode]),
                "equal_time_against_sync": _against(timed[mode], timed.get("sync")),
                "steps_per_s": spread(run["steps"] / run["training_seconds"] for run in chosen),
                "stall_share": spread(run["stall_seconds"] / run["training_seconds"] for run in chosen),
                "drain_share": spread(run["drain_seconds"] / run["training_seconds"] for run in chosen),
                "staleness": _staleness(chosen),
            }
        )
    return {"seeds": seeds, "equal_seconds": {str(seed): seconds for seed, seconds in equal.items()}, "modes": found}


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _against(losses: Sequence[float], sync: Sequence[float] | None) -> dict[str, float] | None:
    return None if sync is None else spread(one / other - 1 for one, other in zip(losses, sync))


def _staleness(runs: Iterable[Run]) -> dict[str, float]:
    """Gradients that a unit's parameters lacked when a step computed with them; 0 where nothing is ever late."""
    counts = Counter[int]()
    for run in runs:
        counts.update({int(lag): count for lag, count in run["staleness"].items()})
    if not counts:
        return {"mean": 0.0, "max": 0}
    return {"mean": sum(lag * count for lag, count in counts.items()) / counts.total(), "max": max(counts)}
