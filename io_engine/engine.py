"""The interface: open, submit, reap, close; tickets carry the errors."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from io_engine.backends import make_driver
from io_engine.buffer import byte_view
from io_engine.driver import Counters, Driver, Transfer
from io_engine.errors import IoError
from io_engine.faults import FaultPlan
from io_engine.file import File, open_file

log = logging.getLogger("io_engine")

# Memory that the kernel may still write after a close that ran out of time: never given back.
_kept_for_the_kernel: list[memoryview] = []


class Ticket:
    """One read or write under way. Consumed once: by its ``wait``, or by the ``Engine.reap`` that returns it.

    The buffer is borrowed by the engine until the ticket is done.
    """

    def __init__(self, engine: Engine, tag: int, write: bool, file: File, offset: int, view: memoryview) -> None:
        self.write, self.offset, self.bytes = write, offset, len(view)
        self.error: IoError | None = None  # set when done, if it failed
        self._engine, self._tag, self._file, self._view = engine, tag, file, view
        self._done = False

    @property
    def path(self) -> str:
        return self._file.path

    def done(self) -> bool:
        """Whether it finished, well or not. Never waits."""
        if not self._done and not self._engine.closed:
            self._engine._progress(0, 0.0)
        return self._done

    def wait(self, deadline_seconds: float) -> None:
        """Returns when all bytes are transferred. Raises the transfer's IoError, or one with errno ETIMEDOUT when
        ``deadline_seconds`` pass first: the transfer then goes on and still owns its buffer."""
        self._engine._wait_for(self, deadline_seconds)
        if self.error is not None:
            raise self.error

    def _finish(self, error: IoError | None) -> None:
        self.error = error
        self._view = memoryview(b"")  # the buffer is the caller's again
        self._done = True


class Engine:
    """Reads and writes on a fixed set of files, ``depth`` at once; more wait their turn in order.

    Safe to use from several threads. Close it, or use it as a context manager.
    """

    def __init__(self, driver: Driver, files: Sequence[File], close_seconds: float) -> None:
        self._driver, self.files, self._close_seconds = driver, list(files), close_seconds
        self.backend, self.depth, self.notes = driver.name, driver.depth, driver.notes
        self.chosen_because = driver.chosen_because
        self.closed = False
        self._tags = itertools.count(1)
        self._changed = threading.Condition()  # guards the two maps; notified when tickets finish
        self._pending: dict[int, Ticket] = {}  # by tag, oldest first
        self._finished: dict[int, Ticket] = {}  # done and not yet consumed

    def read(self, offset: int, buffer: Any, file: int = 0) -> Ticket:
        """Fills ``buffer`` from ``offset`` of files[file]."""
        return self.submit([(False, file, offset, buffer)])[0]

    def write(self, offset: int, buffer: Any, file: int = 0) -> Ticket:
        """Writes all of ``buffer`` at ``offset`` of files[file]."""
        return self.submit([(True, file, offset, buffer)])[0]

    def submit(self, requests: Sequence[tuple[bool, int, int, Any]]) -> list[Ticket]:
        """Queues (write, file index, offset, buffer) requests in one batch, and does not wait.

        Raises ValueError, with nothing queued, when one is misaligned, empty, or names no file; when a read's buffer is
        read-only; when the engine is closed.
        """
        if self.closed:
            raise ValueError("the I/O engine is closed")
        transfers, tickets = [], []
        for write, file, offset, buffer in requests:
            view = byte_view(buffer)
            if not write and view.readonly:
                raise ValueError("a read needs a writable buffer")
            if not 0 <= file < len(self.files) or offset < 0:
                raise ValueError(f"file index {file} of {len(self.files)}, offset {offset}")
            tag = next(self._tags)
            transfers.append(Transfer(tag, write, file, offset, view))
            tickets.append(Ticket(self, tag, write, self.files[file], offset, view))
        with self._changed:
            self._pending.update((ticket._tag, ticket) for ticket in tickets)
        try:
            self._driver.submit(transfers)
        except ValueError:
            with self._changed:
                for ticket in tickets:
                    del self._pending[ticket._tag]
            raise
        return tickets

    def reap(self, at_least: int, deadline_seconds: float) -> list[Ticket]:
        """Finished tickets, at least so many, those that failed included: look at ``error``.

        Raises IoError with errno ETIMEDOUT naming the oldest unfinished transfer when the deadline passes first; what
        had finished is returned by the next call. Raises ValueError for more than are unfinished.
        """
        deadline = time.monotonic() + deadline_seconds
        with self._changed:
            if at_least > len(self._pending) + len(self._finished):
                raise ValueError("cannot reap more tickets than are unfinished")
        self._progress(0, 0.0)
        while True:
            with self._changed:
                if len(self._finished) >= at_least:
                    tickets = list(self._finished.values())
                    self._finished.clear()
                    return tickets
                missing = at_least - len(self._finished)
                oldest = next(iter(self._pending.values()), None)
            left = deadline - time.monotonic()
            if oldest is None:  # another thread consumed some: there is nothing left to wait for
                at_least = 0
            elif left <= 0:
                raise self._overdue(oldest, deadline_seconds)
            else:
                self._progress(missing, left)

    def sync(self, deadline_seconds: float) -> None:
        """Flushes every file to stable storage: afterwards all that was written here survives a power cut.

        Raises RuntimeError while a ticket is unfinished or not consumed, since it would not be covered; the IoError
        ("sync") of the first file that failed, after which what was written since its last sync may be lost for good,
        whatever another sync says; ValueError when the engine is closed.
        """
        if self.closed:
            raise ValueError("the I/O engine is closed")
        if count := self.unfinished:
            raise RuntimeError(f"a sync covers only what was reaped before it; unfinished: {count}")
        self._driver.sync(deadline_seconds)

    @property
    def unfinished(self) -> int:
        """Tickets that no wait or reap has consumed."""
        with self._changed:
            return len(self._pending) + len(self._finished)

    @property
    def counters(self) -> Counters:
        return self._driver.counters()

    def close(self) -> None:
        """Waits, within a bound, for what is under way, then ends the engine; a second call does nothing.

        Tickets that the bound cuts off fail with ECANCELED, and their memory is kept, since the kernel may still
        write to it; standard error says so.
        """
        if self.closed:
            return
        deadline = time.monotonic() + self._close_seconds
        under_way = True
        while self._pending and under_way and (left := deadline - time.monotonic()) > 0:
            # Nothing comes before the time is over: then an interrupted call has not handed over what is pending.
            under_way = self._progress(len(self._pending), left) or time.monotonic() >= deadline
        self.closed = True
        with self._changed:
            cut_off = list(self._pending.values())
            self._pending.clear()
        if under_way:
            _kept_for_the_kernel.extend(ticket._view for ticket in cut_off)
        ended = self._driver.close()
        for ticket in cut_off:
            op = "write" if ticket.write else "read"
            ticket._finish(IoError(op, ticket.path, ticket.offset, ticket.bytes, errno.ECANCELED))
        if (cut_off and under_way) or not ended:
            print(f"io_engine: closed with {len(cut_off)} transfers unfinished: their memory is kept", file=sys.stderr)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            warnings.warn("an I/O engine was not closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def _progress(self, at_least: int, seconds: float) -> bool:
        """Lets the driver work until so many more transfers finished, or all did, or the time is over. False when none
        did."""
        outcomes = self._driver.reap_some(at_least, seconds)
        if not outcomes:
            return False
        with self._changed:
            for tag, error in outcomes:
                ticket = self._pending.pop(tag, None)
                if ticket is None:
                    continue  # of a sync whose deadline had passed
                ticket._finish(error)
                self._finished[tag] = ticket
            self._changed.notify_all()
        return True

    def _wait_for(self, ticket: Ticket, deadline_seconds: float) -> None:
        deadline = time.monotonic() + deadline_seconds
        while not ticket._done:
            if self.closed:
                raise ValueError("the I/O engine is closed")
            left = deadline - time.monotonic()
            # Short, since another thread may be the one that reaps this ticket's outcome.
            self._progress(1, min(max(left, 0.0), 0.02))
            if left <= 0 and not ticket._done:
                raise self._overdue(ticket, deadline_seconds)
        with self._changed:
            self._finished.pop(ticket._tag, None)

    @staticmethod
    def _overdue(ticket: Ticket, seconds: float) -> IoError:
        op = "write" if ticket.write else "read"
        text = f"{op} {ticket.path} at offset {ticket.offset}, {ticket.bytes} bytes: not done after {seconds:g} s"
        return IoError(op, ticket.path, ticket.offset, ticket.bytes, errno.ETIMEDOUT, text)


def open(
    files: Sequence[File | str | os.PathLike[str]],
    *,
    backend: str = "auto",
    depth: int = 8,
    buffers: Sequence[Any] = (),
    faults: FaultPlan | None = None,
    close_seconds: float = 30.0,
) -> Engine:
    """An engine on ``files`` (existing paths are opened for reading and writing).

    backend: uring, threads, liburing, aiofiles, or auto: the best that works here, which the log names with the reason.
    buffers: memory that requests will use, registered with the kernel where the backend can; kept alive until close.
    faults: inject these, for tests. close_seconds: how long ``close`` may wait. Raises IoError("setup") when the
    backend does not work here.
    """
    if depth < 1 or depth > 4096:
        raise ValueError(f"queue depth must be from 1 to 4096, not {depth}")
    opened = [open_file(file) if isinstance(file, (str, os.PathLike)) else file for file in files]
    driver = make_driver(backend, opened, depth, [byte_view(b) for b in buffers], faults, close_seconds)
    log.info("backend %s (%s)%s", driver.name, driver.chosen_because, f"; {driver.notes}" if driver.notes else "")
    for file in opened:
        if not file.direct:
            log.info("%s is buffered: %s", file.path, file.buffered_reason)
    return Engine(driver, opened, close_seconds)
