"""The folder of a store's commits: LOCK, stores.json, and a manifest for each commit in ``commits/``."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from angelptm.checkpoint.disk import PART_SUFFIX, Disk
from angelptm.checkpoint.format import MAX_BYTES, Manifest, manifest_name
from angelptm.checkpoint.json_value import dump_json, parse_json
from angelptm.checkpoint.lock import Holder, Lock
from angelptm.errors import CheckpointError
from io_engine.errors import IoError

LOCK_NAME = "LOCK"
STORES_NAME = "stores.json"
COMMITS_NAME = "commits"
RUN_SUBFOLDER = "checkpoint"
"""Where a run folder has its checkpoint folder."""

_MANIFEST = re.compile(r"step-([0-9]{12})\.manifest")
_STORES_MAX_BYTES = 1 << 20
_HOLD_SECONDS = 30  # a lock that excludes readers lasts as long as a rename and a sync of the folder


class _Stores(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format_version: Annotated[int, Field(ge=1, le=1)]
    store_ids: list[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]]


def _stores_json(ids: list[str]) -> bytes:
    return dump_json(_Stores(format_version=1, store_ids=ids).model_dump())


def locate(path: Path) -> Path:
    """The checkpoint folder at ``path``, or in the run folder at ``path``. Raises CheckpointError where neither is."""
    for folder in (path, path / RUN_SUBFOLDER):
        if any(os.path.lexists(folder / name) for name in (COMMITS_NAME, STORES_NAME)):
            return folder
    raise CheckpointError(
        str(path),
        "no checkpoint",
        f"a folder with {COMMITS_NAME}/ and {STORES_NAME}, or a run folder with one at {RUN_SUBFOLDER}/",
    )


class CheckpointFolder:
    """A checkpoint folder, opened by ``open`` for its owner or by ``read`` for anybody.

    A context manager; ``close`` gives the lock up. The owner's methods assert that the lock is held, so that a forked
    child, which does not have it, cannot write. Every method raises CheckpointError for content that cannot be used and
    IoError for what the disk refuses.
    """

    def __init__(self, path: Path, disk: Disk, lock: Lock | None) -> None:
        self.path, self._disk, self._lock = path, disk, lock
        self._commits = path / COMMITS_NAME
        try:
            if not stat.S_ISDIR(os.lstat(self._commits).st_mode):
                raise CheckpointError(str(self._commits), "something that is no folder", "the folder of manifests")
        except FileNotFoundError:
            raise CheckpointError(str(self._commits), "nothing there", "the folder of manifests") from None

    @classmethod
    def open(cls, path: Path, *, create: bool = False, disk: Disk | None = None) -> CheckpointFolder:
        """Takes the exclusive lock. create: make what is missing; otherwise a run folder will do as well.

        Raises StoreLockedError, which says who has it, when the folder is in use, in this process or another one.
        """
        disk = disk or Disk()
        with _io_errors("open", path):
            if create:
                disk.make_folder(path)
            # The user may choose a folder by a link; nothing below it is followed.
            path = (path if create else locate(path)).resolve()
            lock = Lock(path / LOCK_NAME)
        try:
            if create:
                disk.make_folder(path / COMMITS_NAME)
                if not os.path.lexists(path / STORES_NAME):
                    disk.publish(path / STORES_NAME, _stores_json([]))
            return cls(path, disk, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def read(cls, path: Path) -> CheckpointFolder:
        """For reading only, beside a process that may be writing. ``path`` may be a run folder."""
        return cls(locate(path).resolve(), Disk(), None)

    @property
    def taken_over_from(self) -> Holder | None:
        """Whoever had the lock before and ended without giving it up: its last step may lack a commit."""
        return None if self._lock is None else self._lock.taken_over_from

    def close(self) -> None:
        """Gives the lock up; a second call does nothing."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def commits(self) -> list[int]:
        """The steps of all commits, ascending. Other files are not looked at."""
        with _io_errors("list", self._commits):
            names = os.listdir(self._commits)
        return sorted(int(match.group(1)) for name in names if (match := _MANIFEST.fullmatch(name)))

    def manifest_path(self, step: int) -> Path:
        return self._commits / manifest_name(step)

    def load(self, step: int | None = None) -> Manifest:
        """The commit of a step, or the newest. One that cannot be used is an error that names it, never passed over."""
        path = self.manifest_path(self._newest() if step is None else step)
        descriptor = _open_regular(path, os.O_RDONLY)
        try:
            return self._decode(descriptor, path)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def hold(self, step: int | None = None) -> Iterator[Manifest]:
        """The commit of a step, or the newest, which nobody retires as long as the block runs.

        Not for long: its slots stay taken. Holders are counted by flock, which every opener has of its own, so that
        several holds in one process are independent; a child forked meanwhile shares the hold until it ends.
        """
        path = self.manifest_path(self._newest() if step is None else step)
        descriptor = _open_shared(path)
        try:
            yield self._decode(descriptor, path)
        finally:
            os.close(descriptor)

    def publish(self, manifest: Manifest) -> Path:
        """Makes a commit durable; whatever its pages need must be durable before.

        A commit of the same step is replaced at once and whole, unless a reader holds it, which is a CheckpointError.
        """
        self._assert_owner()
        content = manifest.encode()
        path = self.manifest_path(manifest.header.step)
        with self._exclusively(path) as free:
            if not free:
                raise CheckpointError(
                    str(path), "a commit that a reader holds", "one that can be replaced", "Try later."
                )
            self._disk.publish(path, content)
        return path

    def retire(self, step: int) -> bool:
        """Removes a commit for good; its slots may be used again when this has returned True.

        False, with nothing changed, when a reader holds it. A commit that is not there counts as removed.
        """
        self._assert_owner()
        path = self.manifest_path(step)
        with self._exclusively(path) as free:
            if free and os.path.lexists(path):
                self._disk.remove(path)
            elif free:
                self._disk.sync_folder(self._commits)  # a removal whose sync failed is not durable yet
        return free

    def unfinished(self) -> list[Path]:
        """What unfinished publications left behind; while somebody else has the lock, also what is under way."""
        with _io_errors("list", self._commits):
            parts = [self._commits / name for name in os.listdir(self._commits) if name.endswith(PART_SUFFIX)]
        parts = [part for part in parts if _MANIFEST.fullmatch(part.name.removesuffix(PART_SUFFIX))]
        return sorted(part for part in [*parts, self.path / (STORES_NAME + PART_SUFFIX)] if os.path.lexists(part))

    def sweep(self) -> list[Path]:
        """Removes what unfinished publications left behind, and returns it. Files of other names stay."""
        self._assert_owner()
        found = self.unfinished()
        for part in found:
            self._disk.remove(part)
        return found

    def store_ids(self) -> list[str]:
        """Ids of the sets of slot files that belong to this folder: files of other sets are nobody's."""
        path = self.path / STORES_NAME
        if not os.path.lexists(path):
            return []
        content = _read_file(path, _STORES_MAX_BYTES)
        try:
            return _Stores.model_validate(parse_json(content)).store_ids
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise CheckpointError(str(path), f"{where} {repr(first['input'])[:80]}", first["msg"]) from error
        except ValueError as error:
            raise CheckpointError(str(path), f"text that is no JSON ({str(error)[:200]})", "a JSON object") from error

    def add_store_id(self, store_id: str) -> None:
        """Durable when it returns, so that slot files made afterwards are never orphans. Known ids are left alone."""
        self._write_store_ids([*self.store_ids(), store_id])

    def forget_store_id(self, store_id: str) -> None:
        """For a set whose files are gone; unknown ids are left alone."""
        self._write_store_ids([known for known in self.store_ids() if known != store_id])

    def _write_store_ids(self, ids: list[str]) -> None:
        self._assert_owner()
        unique = list(dict.fromkeys(ids))
        if unique != self.store_ids():
            self._disk.publish(self.path / STORES_NAME, _stores_json(unique))

    def _assert_owner(self) -> None:
        assert self._lock is not None, "the folder was opened for reading"
        assert self._lock.held, "the lock was given up, or belongs to the parent process"

    def _newest(self) -> int:
        steps = self.commits()
        if not steps:
            raise CheckpointError(str(self._commits), "no commit", "one or more", "Did a run get as far as its first?")
        return steps[-1]

    def _decode(self, descriptor: int, path: Path) -> Manifest:
        manifest = Manifest.decode(_read_all(descriptor, path, MAX_BYTES), str(path))
        if manifest_name(manifest.header.step) != path.name:
            raise CheckpointError(str(path), f"the manifest of step {manifest.header.step}", "the step of its name")
        return manifest

    @contextlib.contextmanager
    def _exclusively(self, path: Path) -> Iterator[bool]:
        """Whether no reader holds the manifest; while the block runs none can begin to. True where there is none."""
        if not os.path.lexists(path):
            yield True
            return
        try:
            descriptor = _open_regular(path, os.O_RDWR)  # flock over NFS wants it writable
        except CheckpointError:
            yield True  # a link, say: what is no manifest has no readers
            return
        try:
            yield _flock(descriptor, path, fcntl.LOCK_EX)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _io_errors(operation: str, path: Path) -> Iterator[None]:
    try:
        yield
    except IoError:
        raise
    except OSError as error:
        code = error.errno or errno.EIO
        raise IoError(operation, str(path), 0, 0, code, f"{operation} {path}: {os.strerror(code)}") from error


def _flock(descriptor: int, path: Path, operation: int) -> bool:
    """Takes the lock, or says False where somebody else's excludes it."""
    with _io_errors("lock", path):
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            return False
    return True


def _open_shared(path: Path) -> int:
    """A descriptor of the manifest at ``path`` with a shared lock, which keeps it from being retired."""
    deadline = time.monotonic() + _HOLD_SECONDS
    while time.monotonic() < deadline:
        descriptor = _open_regular(path, os.O_RDONLY)
        try:
            # The name may have gone to another file, or to none, while the lock was somebody else's.
            if _flock(descriptor, path, fcntl.LOCK_SH) and _names(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.01)
    raise CheckpointError(str(path), f"a commit locked for {_HOLD_SECONDS} s", "one that can be read", "Try again.")


def _names(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still names the file that is open."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _open_regular(path: Path, access: int) -> int:
    """A descriptor of a regular file; neither the file nor its folder may be a symbolic link out of here."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # O_NONBLOCK: opening a FIFO would wait for its other end.
            flags = access | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(path.name, flags, dir_fd=folder)
        finally:
            os.close(folder)
    except FileNotFoundError:
        raise CheckpointError(str(path), "no such file", "a file") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO):
            raise CheckpointError(str(path), "a symbolic link, or no regular file", "a regular file") from error
        raise IoError("open", str(path), 0, 0, error.errno or errno.EIO) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(str(path), "something that is no regular file", "a regular file")
    return descriptor


def _read_all(descriptor: int, path: Path, max_bytes: int) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > max_bytes:
        raise CheckpointError(str(path), f"{size} bytes", f"{max_bytes} or less")
    with _io_errors("read", path), os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read(size + 1)  # not max_bytes: the buffer is made as large as what is asked for


def _read_file(path: Path, max_bytes: int) -> bytes:
    descriptor = _open_regular(path, os.O_RDONLY)
    try:
        return _read_all(descriptor, path, max_bytes)
    finally:
        os.close(descriptor)
