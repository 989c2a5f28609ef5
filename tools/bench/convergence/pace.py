"""The pace of the modes, measured by itself: a table of runs takes more than an hour, in which a machine has other work
too. All modes are alive at once, each in a process of its own, and take turns with short blocks of steps."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.step.process import Worker

_WARM_UP = 16
"""Steps of each block that are not timed: accumulators fill meanwhile. The first three of a run are traced."""


@dataclass(frozen=True)
class Pace:
    """``step_seconds``: mode → seconds of a step in each round, in blocks of ``steps``. ``circumstances``: when, on
    what, of which version."""

    steps: int
    step_seconds: dict[str, list[float]]
    circumstances: dict[str, Any]

    def of(self, mode: str) -> float:
        return statistics.median(self.step_seconds[mode])


def measure_pace(
    modes: Sequence[str],
    settings: dict[str, Any],
    folder: Path,
    rounds: int,
    steps: int,
    circumstances: dict[str, Any],
) -> Pace:
    """Raises WorkerError."""
    workers: dict[str, Worker] = {}
    found: dict[str, list[float]] = {mode: [] for mode in modes}
    try:
        for mode in modes:
            case = {"mode": mode, "seed": 1, "settings": settings, "folder": str(folder)}
            workers[mode] = Worker(f"pace of {mode}", "bench.convergence.pace", case)
            workers[mode].ask({"untimed": _WARM_UP, "timed": 1})
        for number in range(rounds):
            first = number % len(modes)
            for mode in [*modes[first:], *modes[:first]]:
                seconds = workers[mode].ask({"untimed": _WARM_UP, "timed": steps})["step_seconds"]
                print(
                    f"pace of {mode}, round {number + 1}/{rounds}: {seconds:.4f} s a step", file=sys.stderr, flush=True
                )
                found[mode].append(seconds)
    finally:
        for worker in workers.values():
            worker.stop()
    return Pace(steps, found, circumstances)


def at_pace(runs: Sequence[dict[str, Any]], pace: Pace | None) -> list[dict[str, Any]]:
    """The runs with the times that they would have had at their mode's measured pace. As they are where the pace of one
    of their modes was not measured, since times of both kinds do not compare."""
    if pace is None or any(run["mode"] not in pace.step_seconds for run in runs):
        return list(runs)
    return [_at(run, pace.of(run["mode"])) for run in runs]


def _at(run: dict[str, Any], step_seconds: float) -> dict[str, Any]:
    """Shares of the time stay what they were."""
    seconds = run["steps"] * step_seconds
    rest = {name: run[name] * seconds / run["training_seconds"] for name in ("stall_seconds", "drain_seconds")}
    curve = [{**point, "seconds": point["step"] * step_seconds} for point in run["curve"]]
    return {**run, **rest, "curve": curve, "training_seconds": seconds}


def main() -> None:
    from bench.convergence.training import Settings, Training
    from bench.step.worker import reply_channel, send

    channel = reply_channel()
    case = json.loads(sys.argv[1])
    training = Training(Settings(**case["settings"]), case["mode"], case["seed"], Path(case["folder"]))
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            training.train(asked["untimed"])
            before = training.seconds
            training.train(asked["timed"])
            training.trained.drain()
            send(channel, {"step_seconds": (training.seconds - before) / asked["timed"]})
    finally:
        training.trained.close()


if __name__ == "__main__":
    main()
