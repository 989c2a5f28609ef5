"""What a Python backend has to do: attempts, answered as the kernel answered them. Mirrors csrc/io/queue.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# id of the attempt, and bytes transferred or -errno
Answer = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at moving ``view`` (at most 1 GiB), which keeps the memory alive until the answer. The view is the
    attempt's own slice: whoever takes the attempt may release it."""

    id: int
    write: bool
    file: int  # index into the files given at construction
    offset: int
    view: memoryview


class Queue(Protocol):
    """One thread at a time; its owner serializes. Nothing is retried or resumed here."""

    name: str
    depth: int
    notes: str

    def submit(self, attempts: Sequence[Attempt]) -> int:
        """Takes at most depth - in flight; returns how many, in order."""

    def reap(self, at_least: int, seconds: float) -> list[Answer]:
        """Waits for ``at_least`` answers or ``seconds``; returns what arrived."""

    def sync(self, file: int) -> int:
        """fdatasync of files[file], in the calling thread; 0 or -errno. Covers the writes that were reaped before."""

    def close(self, seconds: float) -> bool:
        """Waits up to ``seconds`` for what is in flight; False when some still is (then nothing was freed)."""
