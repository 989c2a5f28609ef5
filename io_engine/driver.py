"""What stands behind an Engine: whole transfers, retried and resumed. One class for the native engine, one for any
Python queue; both are safe to use from several threads."""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from io_engine.attempt import Attempt, Queue
from io_engine.buffer import address_of
from io_engine.errors import IoError
from io_engine.faults import FaultPlan
from io_engine.file import File

# Tag of the transfer, and its error or None.
Outcome = tuple[int, IoError | None]

_MOST_BYTES_OF_ATTEMPT = 1 << 30
# As in csrc/io/engine.cpp: attempts in a row that moved nothing before the transfer fails with the last error.
_MOST_RETRIES = 16
# How long a reaping thread may keep others from submitting.
_SLICE_SECONDS = 0.005


def _pause_before(retry: int) -> float:
    """Seconds: none at first, then 0.1 ms doubling up to 25.6 ms."""
    return 0.0 if retry <= 1 else 0.0001 * 2 ** min(retry - 2, 8)


@dataclass(frozen=True, slots=True)
class Transfer:
    """All of ``view`` to or from ``offset``; ``tag`` names it in the outcome."""

    tag: int
    write: bool
    file: int
    offset: int
    view: memoryview


@dataclass(slots=True)
class Counters:
    """What a driver has done. Bytes count once, however often a transfer was resumed."""

    read_bytes: int = 0
    written_bytes: int = 0
    read_count: int = 0  # completed transfers
    write_count: int = 0
    resumed_count: int = 0
    retried_count: int = 0
    failed_count: int = 0
    sync_count: int = 0  # completed; one for each file


class Driver(Protocol):
    name: str
    depth: int
    notes: str
    chosen_because: str

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """Checks all (ValueError for misalignment or a closed driver), then queues all. Never waits."""

    def reap_some(self, at_least: int, seconds: float) -> list[Outcome]:
        """Waits for ``at_least`` outcomes, or fewer where fewer are unfinished, or ``seconds``."""

    def sync(self, seconds: float) -> None:
        """Flushes every file. RuntimeError while anything is unfinished; the first file's IoError."""

    def counters(self) -> Counters: ...

    def close(self) -> bool:
        """False when the kernel still owns buffers after the bound: they must then be kept."""


class NativeDriver:
    """The native engine (uring or threads)."""

    def __init__(
        self,
        backend: str,
        files: Sequence[File],
        depth: int,
        buffers: Sequence[memoryview],
        faults: FaultPlan | None,
        close_seconds: float,
    ) -> None:
        try:
            import angelptm_native
        except ImportError as error:
            text = f"setup: the native module cannot be imported: {error}"
            raise IoError("setup", "", 0, 0, errno.ENOSYS, text) from error
        native: Any = angelptm_native
        self._engine = native.Engine(
            list(files),
            depth,
            backend=getattr(native.Backend, backend.upper()),
            regions=[(address_of(view), len(view)) for view in buffers],
            faults=faults.native() if faults else None,
            close_seconds=close_seconds,
        )
        self._buffers = list(buffers)  # registered with the kernel, so they must outlive the engine
        self.name, self.depth, self.notes = self._engine.name, self._engine.depth, self._engine.notes
        self.chosen_because: str = self._engine.chosen_because

    def submit(self, transfers: Sequence[Transfer]) -> None:
        self._engine.submit([(t.tag, t.write, t.file, t.offset, address_of(t.view), len(t.view)) for t in transfers])

    def reap_some(self, at_least: int, seconds: float) -> list[Outcome]:
        outcomes: list[Outcome] = self._engine.reap_some(at_least, seconds)
        return outcomes

    def sync(self, seconds: float) -> None:
        self._engine.sync(seconds)

    def counters(self) -> Counters:
        native = self._engine.counters
        return Counters(**{name: getattr(native, name) for name in Counters.__slots__})

    def close(self) -> bool:
        self._engine.close()
        self._buffers.clear()
        return True


class _Turn:
    """A lock whose next owner is who waited first: a loop of reaps cannot starve a thread that submits."""

    def __init__(self) -> None:
        self._next, self._lock = threading.Lock(), threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._next:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()


@dataclass(slots=True)
class _Active:
    transfer: Transfer
    done: int = 0  # bytes transferred, a multiple of the offset alignment
    retries: int = 0
    in_flight: bool = False
    not_before: float = field(default=0.0)


class QueueDriver:
    """Whole transfers over a Python queue, by the rules of csrc/io/engine.cpp."""

    chosen_because = "asked for"

    def __init__(self, queue: Queue, files: Sequence[File], close_seconds: float) -> None:
        self._queue, self._files, self._close_seconds = queue, list(files), close_seconds
        self.name, self.depth, self.notes = queue.name, queue.depth, queue.notes
        self._turn = _Turn()
        self._waiting: deque[Transfer] = deque()
        self._active: dict[int, _Active] = {}  # by attempt id; in order of submission
        self._next_id = 0
        self._finished: list[Outcome] = []
        self._counters = Counters()
        self._closed = False

    def submit(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            self._check(transfer)
        with self._turn():
            self._require_open()
            self._waiting.extend(transfers)
            self._pump()

    def reap_some(self, at_least: int, seconds: float) -> list[Outcome]:
        deadline = time.monotonic() + seconds
        outcomes: list[Outcome] = []
        while True:
            with self._turn():
                self._require_open()
                missing = at_least - len(outcomes) - len(self._finished)
                wait = missing > 0 and bool(self._active)
                left = min(max(0.0, deadline - time.monotonic()), _SLICE_SECONDS) if wait else 0.0
                for id, result in self._queue.reap(1 if wait else 0, left):
                    self._settle(id, result)
                self._pump()
                outcomes += self._finished
                self._finished.clear()
                idle = not self._active and not self._waiting
                pausing = not any(active.in_flight for active in self._active.values())
            if len(outcomes) >= at_least or idle or time.monotonic() >= deadline:
                return outcomes
            if pausing:  # before a retry, or for memory of the kernel: no answer will end this wait
                time.sleep(0.0005)

    def sync(self, seconds: float) -> None:
        """fdatasync cannot be cut off, so the deadline is looked at between two files."""
        deadline = time.monotonic() + seconds
        first: IoError | None = None
        with self._turn():
            self._require_open()
            if count := len(self._waiting) + len(self._active) + len(self._finished):
                raise RuntimeError(f"a sync covers only what was reaped before it; unfinished: {count}")
            for index, file in enumerate(self._files):
                if time.monotonic() > deadline:
                    raise IoError("sync", file.path, 0, 0, errno.ETIMEDOUT)
                if code := self._sync_file(index):
                    self._counters.failed_count += 1
                    first = first or IoError("sync", file.path, 0, 0, code)
                else:
                    self._counters.sync_count += 1
        if first is not None:
            raise first

    def _sync_file(self, index: int) -> int:
        """errno or 0. EIO is never tried again: the kernel tells of a lost write once, and the next sync succeeds."""
        code = -self._queue.sync(index)
        for retry in range(_MOST_RETRIES):
            if code not in (errno.EINTR, errno.EAGAIN, errno.ECANCELED):
                break
            self._counters.retried_count += 1
            time.sleep(_pause_before(retry + 1))
            code = -self._queue.sync(index)
        return code

    def counters(self) -> Counters:
        return self._counters

    def close(self) -> bool:
        with self._turn():
            if self._closed:
                return True
            self._closed = True
            return self._queue.close(self._close_seconds)

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("the I/O engine is closed")

    def _check(self, transfer: Transfer) -> None:
        if not 0 <= transfer.file < len(self._files):
            raise ValueError(f"file index {transfer.file} of {len(self._files)}")
        file, bytes = self._files[transfer.file], len(transfer.view)
        if bytes == 0 or transfer.offset < 0 or transfer.offset + bytes >= 1 << 63:
            raise ValueError("a transfer needs 1 byte or more, and its end below 2^63")
        if transfer.offset % file.offset_alignment or bytes % file.offset_alignment:
            raise ValueError(
                f"offset {transfer.offset} and length {bytes} must be multiples of {file.offset_alignment} "
                f"for {file.path}"
            )
        if file.memory_alignment > 1 and address_of(transfer.view) % file.memory_alignment:
            raise ValueError(f"the buffer's address must be a multiple of {file.memory_alignment} for {file.path}")

    def _pump(self) -> None:
        while self._waiting and len(self._active) < self.depth:
            self._active[self._next_id] = _Active(self._waiting.popleft())
            self._next_id += 1
        now = time.monotonic()
        batch = []
        for id, active in self._active.items():
            if not active.in_flight and active.not_before <= now:
                t = active.transfer
                view = t.view[active.done : active.done + _MOST_BYTES_OF_ATTEMPT]
                batch.append(Attempt(id, t.write, t.file, t.offset + active.done, view))
        if batch:
            for attempt in batch[: self._queue.submit(batch)]:
                self._active[attempt.id].in_flight = True

    def _settle(self, id: int, result: int) -> None:
        active = self._active[id]
        transfer, file, counters = active.transfer, self._files[active.transfer.file], self._counters
        active.in_flight = False
        total, before = len(transfer.view), active.done
        reached, error = before + max(result, 0), 0
        if result < 0 or (result == 0 and transfer.write):
            # ECANCELED is what the kernel answers when the thread that submitted has ended meanwhile.
            error = -result or errno.EIO
            passes = result == 0 or error in (errno.EINTR, errno.EAGAIN, errno.ECANCELED)
        elif reached < total and not transfer.write and (result == 0 or transfer.offset + reached >= file.size_bytes):
            error, passes = errno.ENODATA, False
            active.done = reached
        else:
            # Resume on the alignment: of 8 KiB asked, 700 B arrived; the next attempt asks from 512 on.
            active.done = reached if reached == total else reached - reached % file.offset_alignment
            passes = active.done == before
            error = errno.EIO if passes else 0
        moved = active.done - before
        if transfer.write:
            counters.written_bytes += moved
        else:
            counters.read_bytes += moved
        if not error and reached < total:
            counters.resumed_count += result != _MOST_BYTES_OF_ATTEMPT
            active.retries = 0
            return
        if error and passes:
            active.retries += 1
            if active.retries <= _MOST_RETRIES:
                counters.retried_count += 1
                active.not_before = time.monotonic() + _pause_before(active.retries)
                return
        del self._active[id]
        if error:
            counters.failed_count += 1
            op, offset, left = "write" if transfer.write else "read", transfer.offset + active.done, total - active.done
            self._finished.append((transfer.tag, IoError(op, file.path, offset, left, error)))
            return
        if transfer.write:
            counters.write_count += 1
        else:
            counters.read_count += 1
        self._finished.append((transfer.tag, None))
