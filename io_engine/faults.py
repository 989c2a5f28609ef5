"""Seeded faults in front of a queue: the same plan for the native queues and for the Python ones."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from io_engine.attempt import Answer, Attempt, Queue


@dataclass(frozen=True)
class FaultPlan:
    """Probabilities in [0, 1], each for every attempt. The same seed and order of attempts give the same faults."""

    seed: int = 0
    short_transfer: float = 0.0  # only part of the attempt is asked for, a multiple of the offset alignment
    eintr: float = 0.0
    eagain: float = 0.0
    eio: float = 0.0
    enospc: float = 0.0  # writes only
    delay: float = 0.0  # the answer is held back for delay_seconds
    delay_seconds: float = 0.0
    reorder: bool = False  # the answers of each reap are shuffled

    def __post_init__(self) -> None:
        for name in ("short_transfer", "eintr", "eagain", "eio", "enospc", "delay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability in [0, 1]")
        if self.delay_seconds < 0:
            raise ValueError("delay_seconds must not be negative")

    def native(self) -> Any:
        """The same plan for the native queues."""
        import angelptm_native

        return angelptm_native.FaultPlan(**asdict(self))


class FaultQueue:
    """A queue that meets ``plan``'s faults. ``alignments``: the offset alignment of each file, in bytes."""

    def __init__(self, inner: Queue, alignments: Sequence[int], plan: FaultPlan) -> None:
        self._inner, self._alignments, self._plan = inner, alignments, plan
        self._shuffler = random.Random(plan.seed)
        self._transfer_count = self._sync_count = 0  # taken so far
        self._delayed: dict[int, bool] = {}  # attempts inside the inner queue, by id
        self._held: list[tuple[float, Answer]] = []  # release time and answer
        self.name, self.depth, self.notes = inner.name, inner.depth, inner.notes

    def submit(self, attempts: Sequence[Attempt]) -> int:
        attempts = attempts[: self.depth - len(self._delayed) - len(self._held)]
        taken = 0
        for attempt in attempts:
            error, kept_bytes, delayed = self._fate(attempt)
            if error:
                self._hold((attempt.id, -error), delayed)
            elif self._inner.submit([replace(attempt, view=attempt.view[:kept_bytes])]):
                self._delayed[attempt.id] = delayed
            else:
                break
            taken += 1
            self._transfer_count += 1
        return taken

    def reap(self, at_least: int, seconds: float) -> list[Answer]:
        deadline = time.monotonic() + seconds
        answers: list[Answer] = []
        while True:
            self._release(answers)
            now = time.monotonic()
            enough = len(answers) >= at_least or now >= deadline
            wake = min([deadline, *(at for at, _ in self._held)])
            if self._delayed:
                for answer in self._inner.reap(0 if enough else 1, 0 if enough else max(0.0, wake - now)):
                    self._hold(answer, self._delayed.pop(answer[0]))
            elif not enough:
                time.sleep(max(0.0, wake - now))
            if enough:
                break
        self._release(answers)
        if self._plan.reorder:
            self._shuffler.shuffle(answers)
        return answers

    def sync(self, file: int) -> int:
        # Counted apart from the transfers, so that adding a sync leaves their faults where they were.
        generator = random.Random(f"{self._plan.seed} sync {self._sync_count}")
        self._sync_count += 1
        for probability, code in (
            (self._plan.eio, errno.EIO),
            (self._plan.eintr, errno.EINTR),
            (self._plan.eagain, errno.EAGAIN),
        ):
            if generator.random() < probability:
                return -code
        return self._inner.sync(file)

    def close(self, seconds: float) -> bool:
        return self._inner.close(seconds)

    def _fate(self, attempt: Attempt) -> tuple[int, int, bool]:
        """errno or 0, bytes to ask for, whether the answer is delayed."""
        plan = self._plan
        generator = random.Random(f"{plan.seed} {self._transfer_count}")
        # Always the same draws, so that changing one probability leaves the other faults where they were.
        eio, enospc, eintr, eagain, cut, kept, delay = (generator.random() for _ in range(7))
        delayed = delay < plan.delay
        whole = len(attempt.view)
        if eio < plan.eio:
            return errno.EIO, whole, delayed
        if attempt.write and enospc < plan.enospc:
            return errno.ENOSPC, whole, delayed
        if eintr < plan.eintr:
            return errno.EINTR, whole, delayed
        if eagain < plan.eagain:
            return errno.EAGAIN, whole, delayed
        grain = self._alignments[attempt.file]
        grains = whole // grain
        if cut < plan.short_transfer and grains > 1:
            return 0, (1 + int(kept * (grains - 1))) * grain, delayed
        return 0, whole, delayed

    def _hold(self, answer: Answer, delayed: bool) -> None:
        self._held.append((time.monotonic() + (self._plan.delay_seconds if delayed else 0.0), answer))

    def _release(self, answers: list[Answer]) -> None:
        now = time.monotonic()
        answers.extend(answer for at, answer in self._held if at <= now)
        self._held = [held for held in self._held if held[0] > now]
