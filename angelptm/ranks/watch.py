"""Who is where: each rank tells the run's store once a second, so that a wait that fails can name the one to blame."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from angelptm.errors import RankError

_ENDED = "the end of its part"
_BEAT_SECONDS = 0.5
_SILENT_SECONDS = 3.0
"""A rank that tells nothing for so long has ended, or its machine cannot be reached."""


@dataclass
class Place:
    """What a rank tells. ``beats`` counts up; ``operation`` is the number of waits so far, ``what`` the one it is in or
    was in last; ``error`` what it ended with, ``blames`` whom it found to blame, and ``why``."""

    beats: int = 0
    operation: int = 0
    what: str = "starting"
    waiting: bool = False
    error: str = ""
    blames: int | None = None
    why: str = ""
    host: str = ""
    pid: int = 0


class Watch:
    """Of one rank. ``store`` is a connection of its own to the store that all ranks share."""

    def __init__(self, store: Any, index: int, count: int) -> None:
        self._store, self._index, self._count = store, index, count
        self._place = Place(host=socket.gethostname(), pid=os.getpid())
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._main = threading.get_ident()
        self._former_hook = sys.excepthook
        sys.excepthook = self._uncaught
        atexit.register(self.close)  # no thread may be in the store's code when the interpreter goes
        self._thread = threading.Thread(target=self._beat, name="angelptm-watch", daemon=True)
        self._thread.start()

    def enter(self, what: str) -> None:
        """A wait begins. Those of other threads than the first are not told, as they have no order among these."""
        if threading.get_ident() == self._main:
            with self._lock:
                self._place.what, self._place.waiting = what, True
                self._place.operation += 1

    def leave(self) -> None:
        if threading.get_ident() == self._main:
            with self._lock:
                self._place.waiting = False

    def fail(self, error: BaseException) -> None:
        """This rank is about to end with an error: others are told, once."""
        with self._lock:
            self._place.error = self._place.error or f"{type(error).__name__}: {error}"[:500]
        self._tell()

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.fail(error)
        self._former_hook(kind, error, trace)

    def close(self) -> None:
        """Tells the others that this rank is done. A second call does nothing."""
        if not self._ended.is_set():
            self._ended.set()
            atexit.unregister(self.close)
            if sys.excepthook == self._uncaught:
                sys.excepthook = self._former_hook
            self._thread.join(_SILENT_SECONDS)
            with self._lock:
                self._place.what, self._place.waiting = _ENDED, False
            self._tell()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            self._tell()

    def _tell(self) -> None:
        with self._lock:  # not while the store answers: the computing thread takes it too
            self._place.beats += 1
            text = json.dumps(asdict(self._place))
        with suppress(Exception):  # the store may be gone: waits notice
            self._store.set(f"place/{self._index}", text)

    def _places(self) -> dict[int, Place]:
        found = {}
        for rank in range(self._count):
            if rank != self._index and self._store.check([f"place/{rank}"]):
                found[rank] = Place(**json.loads(self._store.get(f"place/{rank}")))
        return found

    def explain(self, what: str, error: BaseException) -> RankError:
        """What went wrong in a wait of this rank: which other one is to blame, as far as the store knows. Takes some
        seconds, in which those that live tell that they do."""
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        try:
            before = self._places()
            deadline = time.monotonic() + _SILENT_SECONDS
            after = before
            while time.monotonic() < deadline:
                time.sleep(_BEAT_SECONDS)
                after = self._places()
                if any(place.error for place in after.values()):
                    break  # it says so itself
        except Exception:
            return RankError(
                None,
                what,
                f"rank {self._index} of {self._count}, at {what}: {reason}. The store of the run does not answer "
                "either: the launcher, or the machine it runs on, is gone or cut off. Start the run again; it goes on "
                "from its last commit.",
            )
        blamed, why = self._blame(before, after)
        with self._lock:
            self._place.blames, self._place.why = blamed, why
        self._tell()
        text = f"rank {self._index} of {self._count}, at {what}: {why} ({reason})."
        return RankError(blamed, what, f"{text} Start the run again; it goes on from its last commit.")

    def _blame(self, before: dict[int, Place], after: dict[int, Place]) -> tuple[int | None, str]:
        def named(rank: int) -> str:
            place = after[rank]
            return f"rank {rank} (process {place.pid} on {place.host})"

        # One that fails of itself goes before those that it takes along.
        first = [rank for rank, place in after.items() if place.error and not place.error.startswith("RankError")]
        if first:
            return first[0], f"{named(first[0])} ended with {after[first[0]].error}"
        ended = [rank for rank, place in after.items() if place.error or place.what == _ENDED]
        silent = [
            rank
            for rank, place in after.items()
            if place.beats == before.get(rank, Place()).beats and rank not in ended
        ]
        if silent:
            return silent[0], (
                f"{named(silent[0])} tells nothing any more: it died, was stopped, or cannot be reached; it was at "
                f"{after[silent[0]].what}"
            )
        if never := [rank for rank in range(self._count) if rank != self._index and rank not in after]:
            return never[0], f"rank {never[0]} never came"
        for place in after.values():
            if place.why and place.blames != self._index:
                return place.blames, place.why  # it has found out before it ended
        if ended:
            return ended[0], f"{named(ended[0])} ended before"
        if not after:
            return None, "no other rank is known"
        slow = min(after, key=lambda rank: after[rank].operation)
        if after[slow].operation < self._place.operation:
            place = after[slow]
            at = f"it waits at {place.what}" if place.waiting else f"the last that it waited for was {place.what}"
            return slow, f"{named(slow)} lives and did not come: {at}"
        return None, "all ranks live; the connection between them failed"
