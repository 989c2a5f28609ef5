"""One process at a time: the lock file of a checkpoint folder.

A POSIX record lock belongs to a process: a forked child does not inherit it, and the kernel releases it however the
process ends. It has two gaps, which the registry here closes: two openers in one process do not exclude each other, and
closing *any* descriptor of the file releases the lock. So a process opens a lock file at most once, looking in the
registry before it does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import threading
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from angelptm.errors import CheckpointError, StoreLockedError

_MAX_BYTES = 65536
_UNKNOWN = "unknown"

_held: dict[tuple[int, int], Holder] = {}  # by (st_dev, st_ino): the lock files that this process has open
_registry = threading.RLock()


def _forget_in_child() -> None:
    global _registry
    _registry = threading.RLock()  # another thread of the parent may have had it
    _held.clear()  # the parent's locks are not ours


os.register_at_fork(after_in_child=_forget_in_child)


@dataclass(frozen=True)
class Holder:
    """Who holds, or held, a lock. ``pid`` is 0 and the texts "unknown" where the file does not say."""

    pid: int = 0
    host: str = _UNKNOWN
    started: str = _UNKNOWN
    command: str = _UNKNOWN

    def __str__(self) -> str:
        return f"process {self.pid or _UNKNOWN} on host {self.host} since {self.started}, `{self.command}`"


class Lock:
    """The exclusive lock on ``path``, taken by the constructor, which makes the file where it is missing.

    ``taken_over_from`` is the former holder, if that one ended without releasing the lock. Raises StoreLockedError when
    another process, or this one, holds it; CheckpointError for what is no regular file; OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pid = os.getpid()
        with _registry:
            self._descriptor = _open_and_lock(path)
            status = os.fstat(self._descriptor)
            self._key = (status.st_dev, status.st_ino)
            try:
                self.taken_over_from = _read_holder(self._descriptor)
                self.holder = _this_process()
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, json.dumps(asdict(self.holder)).encode(), 0)
            except BaseException:
                os.close(self._descriptor)
                raise
            _held[self._key] = self.holder
        self._closed = False

    @property
    def held(self) -> bool:
        """False after ``release``, and in a forked child, which does not have its parent's lock."""
        return not self._closed and self._pid == os.getpid()

    def release(self) -> None:
        """Empties the file and gives the lock up; a second call does nothing, nor does one in a forked child."""
        if self.held:
            self._closed = True
            with _registry:
                with contextlib.suppress(OSError):  # a full or failing disk: the next holder reports a takeover
                    os.ftruncate(self._descriptor, 0)
                os.close(self._descriptor)
                _held.pop(self._key, None)


def _open_and_lock(path: Path) -> int:
    """A descriptor of the file that ``path`` names, locked. The registry's lock is held."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(str(path), "something that is no regular file", "a lock file")
            if (status.st_dev, status.st_ino) in _held:
                raise _locked(path, _held[status.st_dev, status.st_ino])
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                # Somebody may have removed the file, and made another, since it was opened.
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    return descriptor
        except OSError as error:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _locked(path, holder or Holder()) from error
            raise
        os.close(descriptor)


def _locked(path: Path, holder: Holder) -> StoreLockedError:
    return StoreLockedError(
        str(path.parent),
        f"the store in use by {holder}",
        "a store that no process uses",
        "Wait for that process to end, or end it; the lock goes with it.",
    )


def _read_holder(descriptor: int) -> Holder | None:
    """None where the file is empty. What does not make sense gives an unknown holder: it only serves for texts."""
    content = os.pread(descriptor, _MAX_BYTES, 0)
    if not content:
        return None
    try:
        value = json.loads(content)
        pid, texts = value["pid"], [value[key] for key in ("host", "started", "command")]
    except (ValueError, KeyError, TypeError, RecursionError):
        return Holder()
    if type(pid) is not int or pid < 1 or not all(isinstance(text, str) and text.isprintable() for text in texts):
        return Holder()
    return Holder(pid, *(text[:500] for text in texts))


def _this_process() -> Holder:
    command = shlex.join([os.path.basename(sys.argv[0] or "python"), *sys.argv[1:]])
    text = "".join(letter if letter.isprintable() else "?" for letter in command)[:500]
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Holder(os.getpid(), socket.gethostname(), started, text)
