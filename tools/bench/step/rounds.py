"""The order of a run: every case warms up, then the rounds, each of one block of every case and of all ceilings.

Workers live from the first round to the last where memory allows; the others are started anew, and warm up again, for
each of their blocks. One computes at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bench.step.cases import Case, Size, python_of, worker_argument
from bench.step.drive import Drive, device_bytes
from bench.step.process import Worker

WARM_UP_STEPS = 5
_SHARE_OF_MEMORY = 0.8  # of what is free at the start


@dataclass
class Block:
    """What one block of steps and the single step after it have told."""

    reply: dict[str, Any]
    latency_seconds: float
    device_io: dict[str, int] | None


@dataclass
class Series:
    """One case's blocks. ``losses``: one list for each life of its worker, warm-up and all."""

    case: Case
    steps: int
    blocks: list[Block] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    lives_on: bool = True

    def ssd_bytes(self) -> dict[str, int]:
        """Of one step, from the last block: what AngelPTM counts, else what the kernel counted for the process."""
        reply = self.blocks[-1].reply if self.blocks else self._warm_up
        moved = reply["counters"]["bytes"]["ssd"] if "bytes" in reply["counters"] else reply["process_io"]
        return {side: moved[side] // len(reply["losses"]) for side in ("read", "written")}

    def read_percent(self) -> int | None:
        """Share of reads in what a step moves on the drive, to 5 %; None when it moves next to nothing.

        So coarse that cases which differ by less share one measurement, and its noise."""
        moved = self.ssd_bytes()
        total = moved["read"] + moved["written"]
        return 5 * round(20 * moved["read"] / total) if total > 2**20 else None

    def warmed_up(self, reply: dict[str, Any]) -> None:
        self._warm_up = reply
        self.took(reply)

    def took(self, reply: dict[str, Any]) -> None:
        self.losses[-1] += reply["losses"]
        self.facts = reply["facts"]
        self.peak_rss_bytes = max(self.peak_rss_bytes, reply["peak_rss_bytes"])


class Rounds:
    """All workers of a run, and whose turn it is."""

    def __init__(
        self,
        cases: list[Case],
        work: dict[str, Any],
        size: Size,
        folder: Path,
        deepspeed: str | None,
        progress: Callable[[str], None],
    ) -> None:
        self.series = [Series(case, size.steps) for case in cases]
        self.ceilings: list[dict[str, float]] = []
        self._work, self._size, self._folder = work, size, folder
        self._deepspeed, self._progress = deepspeed, progress
        self._workers: dict[str, Worker] = {}
        available = int(psutil.virtual_memory().available * _SHARE_OF_MEMORY)
        stay = {one.case.name for one in _that_fit(self.series, available)}
        for one in self.series:
            one.lives_on = one.case.name in stay

    def run(self, drive: Drive, facts: dict[str, int]) -> None:
        with ExitStack() as stack:
            stack.callback(self._stop_all)
            ceilings = Worker(
                "ceilings",
                "bench.step.ceilings",
                {
                    "tokens": self._work["batch"] * self._work["sequence"],
                    "width": facts["width"],
                    "elements": self._size.triad_elements,
                    "seconds": self._size.ceiling_seconds,
                },
            )
            stack.callback(ceilings.stop)
            ceilings.reply()
            staying = [one for one in self.series if one.lives_on]
            for one in staying:  # importing libraries side by side
                self._start(one)
            for one in staying:  # and not beside the first steps of others, which their plans are made from
                self._workers[one.case.name].reply()
            for one in staying:
                self._warm_up(one)
            for number in range(self._size.rounds):
                said = f"round {number + 1}/{self._size.rounds}"
                first = number % len(self.series) if self.series else 0
                for one in self.series[first:] + self.series[:first]:
                    self._progress(f"{said}: {one.case.name}")
                    self._block(one)
                    percent = one.read_percent()
                    if percent is not None:
                        drive.want(percent)
                self._progress(f"{said}: ceilings")
                self.ceilings.append(ceilings.ask({}))
                drive.round()

    def _block(self, one: Series) -> None:
        if one.case.name not in self._workers:
            self._start(one)
            self._workers[one.case.name].reply()
            self._warm_up(one)
        worker = self._workers[one.case.name]
        before = device_bytes(self._folder)
        reply = worker.ask({"steps": one.steps})
        after = device_bytes(self._folder)
        moved = {side: after[side] - before[side] for side in after} if before and after else None
        one.took(reply)
        single = worker.ask({"steps": 1})
        one.took(single)
        one.blocks.append(Block(reply, single["seconds"], moved))
        if not one.lives_on:
            self._stop(one.case.name)

    def _start(self, one: Series) -> None:
        python, module, environment = python_of(one.case, self._deepspeed)
        folder = self._case_folder(one.case.name)
        folder.mkdir()
        argument = worker_argument(one.case, self._work, folder)
        self._workers[one.case.name] = Worker(one.case.name, module, argument, python, **environment)

    def _warm_up(self, one: Series) -> None:
        """To be called when its worker has said that it is ready."""
        self._progress(f"warming up: {one.case.name}")
        worker = self._workers[one.case.name]
        one.losses.append([])
        one.warmed_up(worker.ask({"steps": WARM_UP_STEPS}))

    def _case_folder(self, name: str) -> Path:
        return self._folder / name.replace(" ", "-")

    def _stop(self, name: str) -> None:
        self._workers.pop(name).stop()
        shutil.rmtree(self._case_folder(name), ignore_errors=True)

    def _stop_all(self) -> None:
        for name in list(self._workers):
            self._stop(name)


def _that_fit(series: list[Series], available: int) -> list[Series]:
    """Which may stay in memory for the whole run, leaving room for the largest of those that come and go."""
    order = sorted(series, key=lambda one: one.case.expected_bytes)
    for count in range(len(order), -1, -1):
        stay, go = order[:count], order[count:]
        if (
            sum(one.case.expected_bytes for one in stay) + max((one.case.expected_bytes for one in go), default=0)
            <= available
        ):
            return stay
    return []
