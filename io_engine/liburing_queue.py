"""Attempts through the PyPI binding ``liburing``.

The binding's ``prep_read`` takes only a bytearray, whose address nobody can align, so vectored reads and writes are
used: their ``Iovec`` accepts any memoryview. Its waiting calls keep the GIL, so the wait is a poll(2) on the ring's
descriptor, which releases it. And an ``Iovec`` never gives back the view it was made from (version 2026.3.30), which
would pin every buffer for the life of the process; so it is made from a view of the bare address, and reused for the
same address and length.

Its wheels of 2026 for x86-64 hold AVX-512 instructions without asking whether the processor has them. There, creating
a ring ends the whole process; so the first ring is created by another one.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from io_engine.attempt import Answer, Attempt
from io_engine.buffer import address_of
from io_engine.errors import IoError
from io_engine.file import File, sync_file

_MOST_VECTORS = 4096  # kept for reuse
_FIRST_RING = "import liburing; liburing.Ring(), liburing.Cqe()"
_FIRST_RING_SECONDS = 60.0


@functools.cache
def killed_by_first_ring() -> str | None:
    """The name of the signal that ends a process which creates a ring here, or None. Takes a child process, once."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _FIRST_RING],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_FIRST_RING_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no verdict: as without asking
    return signal.Signals(-ended.returncode).name if ended.returncode < 0 else None


class LiburingQueue:
    """Raises IoError("setup") where the package is missing or the kernel refuses io_uring."""

    def __init__(self, files: Sequence[File], depth: int) -> None:
        try:
            import liburing
        except ImportError as error:
            text = f"setup: the liburing package cannot be imported: {error}"
            raise IoError("setup", "", 0, 0, errno.ENOSYS, text) from error
        if killer := killed_by_first_ring():
            text = f"setup: the liburing package ends a process here with {killer}"
            if killer == "SIGILL":
                text += ": it was built for another processor; build it from its sources, or choose another backend"
            raise IoError("setup", "", 0, 0, errno.ENOEXEC, text)
        self.name, self.depth, self.notes = "liburing", depth, ""
        self._api = liburing
        self._files = files
        self._ring = liburing.Ring()
        self._completion = liburing.Cqe()
        self._in_flight: dict[int, tuple[object, memoryview]] = {}  # by id: the vector and the memory it points to
        self._vectors: dict[tuple[int, int], object] = {}  # by address and length; owns none of that memory
        try:
            liburing.io_uring_queue_init(depth, self._ring)
        except OSError as error:
            code = error.errno or errno.EIO
            raise IoError("setup", "", 0, 0, code, f"setup: io_uring does not work here: {error}") from error
        self._poll = select.poll()
        self._poll.register(self._ring.ring_fd, select.POLLIN)

    def submit(self, attempts: Sequence[Attempt]) -> int:
        api, count = self._api, min(len(attempts), self.depth - len(self._in_flight))
        for attempt in attempts[:count]:
            vector = self._vector(attempt.view)
            entry = api.io_uring_get_sqe(self._ring)
            prepare = api.io_uring_prep_writev if attempt.write else api.io_uring_prep_readv
            prepare(entry, self._files[attempt.file].descriptor, vector, attempt.offset)
            entry.user_data = attempt.id
            self._in_flight[attempt.id] = (vector, attempt.view)
        # Entries that the kernel does not take now stay in the ring and go with the next call, so all count as taken.
        if count:
            self._flush()
        return count

    def reap(self, at_least: int, seconds: float) -> list[Answer]:
        deadline = time.monotonic() + seconds
        answers = self._drain()
        while len(answers) < min(at_least, len(answers) + len(self._in_flight)):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if self._api.io_uring_sq_ready(self._ring):
                self._flush()
                left = min(left, 0.001)
            self._poll.poll(left * 1000)
            answers += self._drain()
        return answers

    def sync(self, file: int) -> int:
        return sync_file(self._files[file])

    def close(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._in_flight and time.monotonic() < deadline:
            self.reap(len(self._in_flight), deadline - time.monotonic())
        if self._in_flight:
            return False
        self._api.io_uring_queue_exit(self._ring)
        return True

    def _vector(self, view: memoryview) -> object:
        key = (address_of(view), len(view))
        if key not in self._vectors:
            if len(self._vectors) >= _MOST_VECTORS:
                self._vectors.clear()
            bare = (ctypes.c_ubyte * len(view)).from_address(key[0])
            self._vectors[key] = self._api.Iovec([memoryview(bare).cast("B")])
        return self._vectors[key]

    def _flush(self) -> None:
        try:
            self._api.io_uring_submit(self._ring)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EBUSY, errno.EINTR):
                code = error.errno or errno.EIO
                raise IoError("setup", "", 0, 0, code, f"setup: io_uring_submit: {os.strerror(code)}") from error

    def _drain(self) -> list[Answer]:
        answers: list[Answer] = []
        for _ in range(self._api.io_uring_cq_ready(self._ring)):
            self._api.io_uring_peek_cqe(self._ring, self._completion)
            entry = self._completion[0]
            try:
                result = entry.res
            except OSError as error:  # that is how the binding tells a negative result
                result = -(error.errno or errno.EIO)
            answers.append((entry.user_data, result))
            del self._in_flight[entry.user_data]
            self._api.io_uring_cq_advance(self._ring, 1)
        return answers
