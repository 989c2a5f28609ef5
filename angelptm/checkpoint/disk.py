"""Metadata on disk: small files that exist whole or not at all, and operations that are durable when they return."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from io_engine.errors import IoError

PART_SUFFIX = ".part"
"""A file that was not finished has this after its name."""


class Hook(Protocol):
    """Called around each primitive operation, one of write, sync_file, rename, remove, sync_folder, make_folder.

    ``path`` is what it works on; of a rename, the new name. Tests end the process here, or note the order.
    """

    def before(self, operation: str, path: Path) -> None: ...
    def after(self, operation: str, path: Path) -> None: ...


class Disk:
    """The three durable operations. Every failure is an IoError with the operation, the path and the errno."""

    WRITE_BYTES = 1 << 20
    """Bytes of one write; smaller in tests that end the process between two."""

    def __init__(self, hook: Hook | None = None) -> None:
        self._hook = hook

    def publish(self, path: Path, content: bytes) -> None:
        """Makes ``content`` the content of ``path``; at every instant the name has the old content or the new one.

        Writes ``<name>.part`` beside it, syncs it, renames it, syncs the folder. A failure before the rename leaves the
        old content and no part; a failure after it leaves the new content, perhaps not durable. Raises IoError.
        """
        part = path.with_name(path.name + PART_SUFFIX)
        if os.path.lexists(part):
            self._unlink(part)  # left behind by a process that ended
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _io_error("open", part, error) from error
        try:
            try:
                self._write(descriptor, part, content)
                self.sync(descriptor, part)
            finally:
                os.close(descriptor)
            with self._operation("rename", path):
                os.rename(part, path)
        except IoError:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        self.sync_folder(path.parent)

    def remove(self, path: Path) -> None:
        """Removes a file's name for good. Raises IoError, also when there is none."""
        self._unlink(path)
        self.sync_folder(path.parent)

    def sync(self, descriptor: int, path: Path) -> None:
        """Returns when what was written to the open file ``path`` is durable. Raises IoError."""
        with self._operation("sync_file", path):
            os.fsync(descriptor)

    def sync_names(self, folder: Path) -> None:
        """Makes durable what was made by other means: files and folders in ``folder``, itself, and folders above it.

        Goes up as far as this process could have made something, and not to another file system. Raises IoError.
        """
        for path in (folder := folder.resolve(), *folder.parents):
            if not os.access(path, os.R_OK | os.W_OK):
                return
            self.sync_folder(path)
            if os.path.ismount(path):
                return

    def make_folder(self, path: Path) -> None:
        """Makes a folder and the missing ones above it; one that is there is left as it is. Raises IoError."""
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for folder in reversed(missing):
            with self._operation("make_folder", folder):
                # Another process may have been faster; a file in the way is an error.
                try:
                    os.mkdir(folder)
                except FileExistsError:
                    if not folder.is_dir():
                        raise
            self.sync_folder(folder.parent)

    def _write(self, descriptor: int, path: Path, content: bytes) -> None:
        view = memoryview(content)
        while view:
            with self._operation("write", path):
                written = os.write(descriptor, view[: self.WRITE_BYTES])
                if written == 0:
                    raise OSError(errno.EIO, "nothing was written")
            view = view[written:]

    def _unlink(self, path: Path) -> None:
        with self._operation("remove", path):
            os.unlink(path)

    def sync_folder(self, folder: Path) -> None:
        """Makes the names in a folder durable. Raises IoError."""
        with self._operation("sync_folder", folder):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _operation(self, name: str, path: Path) -> Iterator[None]:
        if self._hook is not None:
            self._hook.before(name, path)
        try:
            yield
        except OSError as error:
            raise _io_error(name, path, error) from error
        if self._hook is not None:
            self._hook.after(name, path)


def _io_error(operation: str, path: Path, error: OSError) -> IoError:
    code = error.errno or errno.EIO
    return IoError(operation, str(path), 0, 0, code, f"{operation} {path}: {os.strerror(code)} (errno {code})")
