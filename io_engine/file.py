"""Opening a file the way pages need it: aligned for O_DIRECT, preallocated, removable at once."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from typing import Protocol

from io_engine.errors import IoError
from io_engine.machine import file_system

try:
    import angelptm_native
except ImportError:  # a host without the native module: the liburing and aiofiles backends still work
    angelptm_native = None  # type: ignore[assignment]

# Without the native module there is no statx(STATX_DIOALIGN): a multiple of every block size in use.
_FALLBACK_ALIGNMENT = 4096


class File(Protocol):
    """An open file. ``direct`` is False when the file system refuses O_DIRECT; ``buffered_reason`` then says why.

    Offsets and lengths of requests must be multiples of ``offset_alignment``, addresses of ``memory_alignment``; both
    are 1 when buffered. The descriptor is closed when the last reference goes.
    """

    @property
    def path(self) -> str: ...
    @property
    def descriptor(self) -> int: ...
    @property
    def direct(self) -> bool: ...
    @property
    def buffered_reason(self) -> str: ...
    @property
    def allocation_note(self) -> str: ...
    @property
    def memory_alignment(self) -> int: ...
    @property
    def offset_alignment(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...


def open_file(
    path: str | os.PathLike[str],
    *,
    create: bool = False,
    read_only: bool = False,
    direct: bool = True,
    unlink: bool = False,
    allocate_bytes: int = 0,
) -> File:
    """Opens ``path``; native where the native module is there, which every backend accepts.

    create: make it if absent. unlink: remove the name at once, so that the space is given back however the process
    ends. allocate_bytes: reserve the blocks now, so that a full disk is met here. A file that this call created is
    removed again when the call fails. Raises IoError.
    """
    opener = PlainFile if angelptm_native is None else angelptm_native.File
    return opener(
        os.fspath(path),
        create=create,
        read_only=read_only,
        direct=direct,
        unlink=unlink,
        allocate_bytes=allocate_bytes,
    )


def sync_file(file: File) -> int:
    """fdatasync; 0 or -errno, as a queue answers."""
    try:
        os.fdatasync(file.descriptor)
    except OSError as error:
        return -(error.errno or errno.EIO)
    return 0


class PlainFile:
    """A File without the native module. O_DIRECT is asked for with 4096-byte alignment."""

    def __init__(
        self,
        path: str,
        *,
        create: bool = False,
        read_only: bool = False,
        direct: bool = True,
        unlink: bool = False,
        allocate_bytes: int = 0,
    ) -> None:
        self.path = path
        self.buffered_reason = "" if direct else "O_DIRECT was not asked for"
        self.allocation_note = ""
        access = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
        created = False
        try:
            if os.path.exists(path) and not (os.path.isfile(path) or stat.S_ISBLK(os.stat(path).st_mode)):
                code = errno.EISDIR if os.path.isdir(path) else errno.EINVAL
                raise OSError(code, "expected a regular file or a block device")
            if create and not read_only and not os.path.exists(path):
                os.close(os.open(path, access | os.O_CREAT | os.O_EXCL, 0o644))
                created = True
            self.descriptor = self._open_descriptor(access)
            self._finalizer = weakref.finalize(self, os.close, self.descriptor)
            if allocate_bytes and not read_only:
                self._allocate(allocate_bytes)
            if unlink:
                os.unlink(path)
        except OSError as error:
            if created:
                os.unlink(path)
            if hasattr(self, "_finalizer"):
                self._finalizer()  # now, not with the traceback that still refers to this object
            op = "allocate" if hasattr(self, "_finalizer") and allocate_bytes else "open"
            raise IoError(op, path, 0, allocate_bytes, error.errno or errno.EIO, f"{op} {path}: {error}") from error
        self.memory_alignment = self.offset_alignment = 1 if self.buffered_reason else _FALLBACK_ALIGNMENT

    def _open_descriptor(self, access: int) -> int:
        if not self.buffered_reason:
            try:
                descriptor = os.open(self.path, access | os.O_DIRECT)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self.buffered_reason = "the file system refuses O_DIRECT"
            else:
                # Since Linux 6.6 tmpfs accepts O_DIRECT and ignores it.
                if file_system(self.path) != "tmpfs":
                    return descriptor
                os.close(descriptor)
                self.buffered_reason = "tmpfs keeps files in memory, so O_DIRECT has no effect"
        return os.open(self.path, access)

    def _allocate(self, bytes: int) -> None:
        # Compared first, because a fallocate that fails has taken the whole disk until it gives up, from everybody.
        space, status = os.fstatvfs(self.descriptor), os.fstat(self.descriptor)
        if bytes - status.st_blocks * 512 > space.f_bavail * space.f_frsize:
            raise OSError(errno.ENOSPC, f"free on this file system: {space.f_bavail * space.f_frsize} bytes")
        os.posix_fallocate(self.descriptor, 0, bytes)

    @property
    def direct(self) -> bool:
        return not self.buffered_reason

    @property
    def size_bytes(self) -> int:
        return os.stat(self.descriptor).st_size
