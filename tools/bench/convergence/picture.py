"""The comparison as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from bench.convergence.comparison import column, loss_at, model_of
from bench.convergence.pace import Pace, at_pace

_SHOWN_FROM = 0.05  # of the steps: the first fall would flatten all that follows
_POINTS = 200


def draw(found: dict[str, Any], path: Path, *, with_seconds: bool = True) -> None:
    """Validation loss over tokens and over training seconds: the median over seeds in a band from min to max."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings, comparison = found["settings"], found["comparison"]
    seeds, equal = comparison["seeds"], comparison["equal_seconds"]
    compared = [one["mode"] for one in comparison["modes"]]
    pace = Pace(**found["pace"]) if found["pace"] else None
    all_runs = at_pace([run for run in found["runs"] if run["mode"] in compared], pace)
    columns = 1 + with_seconds
    figure, axes = pyplot.subplots(1, columns, figsize=(12 if with_seconds else 9.5, 5), sharey=True, squeeze=False)
    tokens, seconds = axes[0, 0], axes[0, -1]
    shown: list[float] = []
    for index, mode in enumerate(compared):
        runs = [run for run in all_runs if run["mode"] == mode and run["seed"] in seeds]
        per_step = settings["batch"] * settings["sequence"]
        steps = np.array(column(runs[0], "step"))
        losses = np.array([column(run, "validation_loss") for run in runs])
        _band(tokens, steps * per_step, losses, f"C{index}", mode)
        shown += losses[:, steps >= _SHOWN_FROM * settings["steps"]].ravel().tolist()
        if not with_seconds:
            continue
        # Each seed has its own times; the band ends where the first of them does.
        grid = np.linspace(0, min(run["training_seconds"] for run in runs), _POINTS)
        over_time = np.array([[loss_at(run, moment) for moment in grid] for run in runs])
        _band(seconds, grid, over_time, f"C{index}", mode)
    low, high = min(shown), max(shown)
    tokens.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    tokens.set_xlabel("tokens")
    tokens.set_ylabel("validation loss (nats per byte)")
    if with_seconds:
        seconds.set_xlabel("training seconds")
        ended = float(np.median(list(equal.values())))
        seconds.axvline(ended, color="0.6", linestyle=":", label="the fastest has ended")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    seconds.legend(frameon=False)
    figure.suptitle(
        f"{model_of(settings)}, steps of {per_step} tokens, lr {settings['lr']:g} {settings['schedule']}; "
        f"median and range of {len(seeds)} seed{'s' * (len(seeds) != 1)}; {found['runs'][0]['machine']['cpu']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _band(axis: Any, across: Any, losses: Any, colour: str, label: str) -> None:
    """``losses``: (seeds, points)."""
    axis.fill_between(across, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    axis.plot(across, np.median(losses, axis=0), color=colour, label=label, linewidth=1.2)
