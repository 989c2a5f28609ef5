"""Attempts through ``aiofiles``: one asyncio loop in a background thread.

A file object has one position, so concurrent requests on it would race between seek and read. Each slot of the queue
therefore has its own handle on every file, reopened through /proc/self/fd, which also works for unlinked files.
Handles are unbuffered and keep O_DIRECT.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from io_engine.attempt import Answer, Attempt
from io_engine.errors import IoError
from io_engine.file import File, sync_file

_ACCESS_MODE = 3  # O_ACCMODE, which Python's os lacks
_OPEN_SECONDS = 30.0  # for opening or closing all handles


class AiofilesQueue:
    """Raises IoError("setup") where the package is missing."""

    def __init__(self, files: Sequence[File], depth: int) -> None:
        try:
            import aiofiles
        except ImportError as error:
            text = f"setup: the aiofiles package cannot be imported: {error}"
            raise IoError("setup", "", 0, 0, errno.ENOSYS, text) from error
        self.name, self.depth, self.notes = "aiofiles", depth, ""
        self._open = aiofiles.open
        self._files = files
        self._arrived = threading.Condition()  # guards _answers, _in_flight_count and _free_slots
        self._answers: list[Answer] = []
        self._in_flight_count = 0
        self._free_slots = list(range(depth))
        self._handles: list[list[Any]] = []  # by slot, then by file
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(depth, thread_name_prefix="io_engine-aiofiles"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="io_engine-aiofiles-loop", daemon=True)
        self._thread.start()
        try:
            self._call(self._open_handles())
        except (OSError, TimeoutError) as error:
            self._stop()
            code = getattr(error, "errno", None) or errno.ETIMEDOUT
            raise IoError("setup", "", 0, 0, code, f"setup: aiofiles could not open its handles: {error}") from error

    def submit(self, attempts: Sequence[Attempt]) -> int:
        with self._arrived:
            count = min(len(attempts), len(self._free_slots))
            slots = [self._free_slots.pop() for _ in range(count)]
            self._in_flight_count += count
        for slot, attempt in zip(slots, attempts[:count]):
            asyncio.run_coroutine_threadsafe(self._transfer(slot, attempt), self._loop)
        return count

    def reap(self, at_least: int, seconds: float) -> list[Answer]:
        with self._arrived:
            self._arrived.wait_for(lambda: len(self._answers) >= min(at_least, self._in_flight_count), seconds)
            answers, self._answers = self._answers, []
            self._in_flight_count -= len(answers)
        return answers

    def sync(self, file: int) -> int:
        return sync_file(self._files[file])

    def close(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._in_flight_count and time.monotonic() < deadline:
            self.reap(self._in_flight_count, deadline - time.monotonic())
        if self._in_flight_count:
            return False
        self._stop()
        return True

    async def _transfer(self, slot: int, attempt: Attempt) -> None:
        handle = self._handles[slot][attempt.file]
        try:
            await handle.seek(attempt.offset)
            count = await (handle.write(attempt.view) if attempt.write else handle.readinto(attempt.view))
            result = -errno.EAGAIN if count is None else count
        except io.UnsupportedOperation:  # Python's own, without errno: the handle is not open for this
            result = -errno.EBADF
        except OSError as error:
            result = -(error.errno or errno.EIO)
        # The executor and this coroutine may outlive the answer for a moment, but the buffer is then the caller's.
        attempt.view.release()
        with self._arrived:
            self._answers.append((attempt.id, result))
            self._free_slots.append(slot)
            self._arrived.notify_all()

    async def _open_handles(self) -> None:
        for _ in range(self.depth):
            handles: list[Any] = []
            self._handles.append(handles)
            for file in self._files:
                flags = os.O_DIRECT if file.direct else 0
                writable = fcntl.fcntl(file.descriptor, fcntl.F_GETFL) & _ACCESS_MODE == os.O_RDWR
                handles.append(
                    await self._open(
                        f"/proc/self/fd/{file.descriptor}",
                        "r+b" if writable else "rb",
                        buffering=0,
                        opener=lambda path, mode, flags=flags: os.open(path, mode | flags),
                    )
                )

    async def _close_handles(self) -> None:
        for handles in self._handles:
            for handle in handles:
                await handle.close()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_OPEN_SECONDS)

    def _stop(self) -> None:
        self._call(self._close_handles())
        self._call(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_OPEN_SECONDS)
        self._loop.close()
