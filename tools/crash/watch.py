"""Looks on while a run makes its commits, notes what it has promised so far, and ends the process where told to."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from angelptm.checkpoint.disk import Disk
from io_engine.power_cut import MetadataJournal

_MANIFEST = re.compile(r"step-([0-9]{12})\.manifest")
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Kill:
    """When a process ends by SIGKILL. ``at``: seconds after its start (timer), the number of the native write or sync
    (write), or of the metadata operation (name), counted from 1; ``after``: not before but after that operation."""

    how: Literal["timer", "write", "name"]
    at: float
    after: bool = False

    def __str__(self) -> str:
        return f"{self.how}:{self.at:g}{'+' if self.after else ''}"

    @classmethod
    def parse(cls, text: str) -> Kill:
        how, at = text.removesuffix("+").split(":")
        return cls(how, float(at), text.endswith("+"))  # type: ignore[arg-type]


def end_process() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    while True:
        signal.pause()


class SmallWrites(Disk):
    """A manifest takes several writes, so that the process can end between two."""

    WRITE_BYTES = 16 << 10


class Watch:
    """The hook of the run's Disk. ``notes``: where lines of JSON go, each by one write; ``journal``: what could be
    undone by a power cut, or None; ``early``: the process ends after an operation before the journal hears of it."""

    def __init__(self, notes: Path, journal: MetadataJournal | None, kill: Kill | None, *, early: bool) -> None:
        self._notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._journal, self._kill, self._early = journal, kill, early
        self._lock = threading.RLock()
        self._renamed: int | None = None
        self._names: list[str] = []
        self._metrics_bytes = 0
        self.operations: list[str] = []
        """Name and file of each operation begun so far."""

    def note(self, **facts: Any) -> None:
        os.write(self._notes, json.dumps(facts).encode() + b"\n")

    def before(self, operation: str, path: Path) -> None:
        with self._lock:
            self.operations.append(f"{operation} {path.name}")
            number = len(self.operations)
            if operation == "sync_folder":
                self._names = os.listdir(path)
            elif operation == "sync_file" and path.name.startswith(METRICS):
                self._metrics_bytes = path.stat().st_size
            if self._journal is not None and operation != "make_folder":
                self._journal.before(operation, path)  # type: ignore[arg-type]
            if self._is_kill(number, after=False):
                end_process()

    def after(self, operation: str, path: Path) -> None:
        with self._lock:
            # One thread makes commits while the other computes, so no second operation began meanwhile.
            number = len(self.operations)
            if self._early and self._is_kill(number, after=True):
                end_process()
            if self._journal is not None and operation != "make_folder":
                self._journal.after(operation, path)  # type: ignore[arg-type]
            self._note_durable(operation, path)
            if self._is_kill(number, after=True):
                end_process()

    def _is_kill(self, number: int, *, after: bool) -> bool:
        kill = self._kill
        return kill is not None and kill.how == "name" and int(kill.at) == number and kill.after == after

    def _note_durable(self, operation: str, path: Path) -> None:
        if operation == "rename" and (match := _MANIFEST.fullmatch(path.name)):
            self._renamed = int(match.group(1))
        elif operation == "sync_folder":
            self.note(folder=str(path), names=self._names)
            if self._renamed is not None:
                self.note(published=self._renamed)
                self._renamed = None
        elif operation == "sync_file" and path.name.startswith(METRICS):
            self.note(metrics_bytes=self._metrics_bytes, inode=path.stat().st_ino)
