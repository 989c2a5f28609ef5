"""The comparison for people."""

from __future__ import annotations

import sys
from typing import Any

from bench.convergence.comparison import model_of
from rich.console import Console
from rich.table import Table


def show(found: dict[str, Any]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=170)
    settings, comparison = found["settings"], found["comparison"]
    table = Table(
        title=f"{model_of(settings)}, {settings['steps']} steps of "
        f"{settings['batch']} x {settings['sequence']} tokens, "
        f"lr {settings['lr']:g}, seeds {comparison['seeds']}: median (min - max)"
    )
    table.add_column("mode")
    for heading in ("final validation loss", "against sync", "steps/s", "loss at equal wall time", "against sync"):
        table.add_column(heading, justify="right")
    table.add_column("staleness mean, max", justify="right")
    for mode in comparison["modes"]:
        staleness = mode["staleness"]
        table.add_row(
            mode["mode"],
            _told(mode["final_loss"], "{:.4f}"),
            _told(mode["final_against_sync"], "{:+.2f} %", 100),
            _told(mode["steps_per_s"], "{:.2f}"),
            _told(mode["equal_time_loss"], "{:.4f}"),
            _told(mode["equal_time_against_sync"], "{:+.2f} %", 100),
            f"{staleness['mean']:.2f}, {staleness['max']}",
        )
    console.print(table)
    for run in found["runs"]:
        if run["diverged_at"] is not None:
            console.print(f"{run['mode']}, seed {run['seed']}: its loss was no number after step {run['diverged_at']}")
    if missing := found["missing"]:
        console.print(f"missing: {', '.join(f'{mode} seed {seed}' for mode, seed in missing)}", highlight=False)
    for mode in comparison["modes"]:
        stalls, drains = (_told(mode[key], "{:.1f} %", 100) for key in ("stall_share", "drain_share"))
        console.print(
            f"{mode['mode']}: {stalls} of training waits for updates and pages; the drains before validations, "
            f"uncounted, are {drains} of it",
            highlight=False,
        )


def _told(spread: dict[str, float] | None, form: str, factor: float = 1.0) -> str:
    if spread is None:
        return ""
    median, low, high = (form.format(factor * spread[key]) for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low} - {high})"
