"""Copies one commit to a folder of its own: manifest and pages, on any file system.

The copy goes on where a former attempt ended, however that ended. What is under way is written down in ``COPYING``
before the first page; then come the pages, a sync, the manifest, and last the removal of ``COPYING``. Pages that are
there are read back, and the CRCs of the source say which of them are right.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import io_engine
from angelptm.checkpoint.disk import PART_SUFFIX, Disk
from angelptm.checkpoint.folder import COMMITS_NAME, LOCK_NAME, STORES_NAME, CheckpointFolder
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.header import FileRecord
from angelptm.checkpoint.json_value import dump_json, parse_json
from angelptm.checkpoint.reader import DEPTH, CommitReader
from angelptm.checkpoint.records import EXTENT_BYTES, NONE, extent_bytes
from angelptm.checkpoint.slot_files import slot_file_name
from angelptm.errors import CheckpointError
from angelptm.sizes import format_bytes
from io_engine import AlignedBuffer, Ticket

MARKER_NAME = "COPYING"
"""In the destination as long as the copy is not complete."""

_MARKER_MAX_BYTES = 4096

Progress = Callable[[str, int, int], None]
"""(what is done: "checking" or "copying", pages done, pages)."""


@dataclass(frozen=True)
class Copied:
    """What a copy did: ``kept_pages`` were there already, ``bytes`` were written."""

    path: Path
    step: int
    copied_pages: int
    kept_pages: int
    bytes: int


class _Marker(BaseModel):
    """Content of the marker: the id of the new slot file, and which commit it gets."""

    model_config = ConfigDict(extra="forbid", strict=True)

    store_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    source: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    step: int


def copy_commit(
    reader: CommitReader,
    folder: Path,
    progress: Progress | None = None,
    *,
    disk: Disk | None = None,
    deadline_seconds: float = 120.0,
) -> Copied:
    """Makes ``folder`` a checkpoint folder that has the commit of ``reader`` and nothing else, its pages in one file.

    Every page is checked against its CRC as it is read. Raises CheckpointError when the folder holds anything but an
    unfinished copy of the same commit, and when there is too little space, with nothing changed; CorruptPageError and
    IoError. Memory: the reader's pages and as many again.
    """
    disk, report = disk or Disk(), progress or (lambda _what, _done, _total: None)
    _expect_copy_or_nothing(folder)
    source = reader.manifest
    _expect_space(folder, int((source.pages["file"] != NONE).sum()) * source.header.page_bytes)
    with CheckpointFolder.open(folder, create=True, disk=disk) as destination:
        marker = _begin(destination, source, disk)
        manifest = _rearranged(source, marker.store_id)
        path = destination.path / slot_file_name(marker.store_id, 0)
        there = os.path.lexists(path)
        stored = reader.stored()
        file = _open(path, len(stored) * source.header.page_bytes)
        disk.sync_folder(destination.path)
        missing = stored
        if there and stored:
            with CommitReader(manifest, [destination.path], deadline_seconds=deadline_seconds) as former:
                wrong = set()
                for done, (index, error) in enumerate(former.checked(former.stored()), 1):
                    report("checking", done, len(stored))
                    if error is not None:
                        wrong.add(index)
            missing = [index for index in stored if index in wrong]
        written = 0
        if stored:
            with io_engine.open([file], depth=DEPTH) as engine:
                written = _copy(reader, missing, manifest, engine, report, deadline_seconds)
                engine.sync(deadline_seconds)
        destination.publish(manifest)
        disk.remove(destination.path / MARKER_NAME)
    return Copied(folder, source.header.step, len(missing), len(stored) - len(missing), written)


def _copy(
    reader: CommitReader,
    missing: Sequence[int],
    manifest: Manifest,
    engine: io_engine.Engine,
    report: Progress,
    deadline_seconds: float,
) -> int:
    """Copies pages through a ring of buffers, reading ahead and writing behind; returns the bytes written."""
    page_bytes = manifest.header.page_bytes
    spare = deque(AlignedBuffer(page_bytes) for _ in range(min(DEPTH, len(missing))))
    flights: deque[tuple[Ticket, AlignedBuffer]] = deque()
    written = 0

    def land() -> None:
        ticket, buffer = flights.popleft()
        ticket.wait(deadline_seconds)
        spare.append(buffer)

    for done, (index, content) in enumerate(reader.pages(missing), 1):
        if not spare:
            land()
        buffer = spare.popleft()
        extent = extent_bytes(len(content))
        whole = np.frombuffer(buffer, np.uint8)
        whole[: len(content)] = content
        whole[len(content) : extent] = 0
        slot = int(manifest.pages["slot"][index])
        flights.append((engine.write(slot * page_bytes, buffer.view(0, extent)), buffer))
        written += extent
        report("copying", done, len(missing))
    while flights:
        land()
    return written


def _rearranged(source: Manifest, store_id: str) -> Manifest:
    """The same commit in one file, whose slots hold the stored pages in the order of their records."""
    pages = source.pages.copy()
    stored = np.flatnonzero(pages["file"] != NONE)
    pages["file"][stored] = 0
    pages["slot"][stored] = np.arange(len(stored))
    files = (FileRecord(name=slot_file_name(store_id, 0), slot_count=len(stored)),) if len(stored) else ()
    return Manifest(source.header.model_copy(update={"store_id": store_id, "files": files}), pages)


def _expect_copy_or_nothing(folder: Path) -> None:
    """Refuses a destination that holds anything that a copy does not make, before anything is made in it."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise CheckpointError(str(folder), "no folder", "a new or an empty one")
    names = set(os.listdir(folder)) - {LOCK_NAME, STORES_NAME, STORES_NAME + PART_SUFFIX, MARKER_NAME + PART_SUFFIX}
    if MARKER_NAME in names:
        store_id = _read_marker(folder / MARKER_NAME).store_id
        names -= {MARKER_NAME, COMMITS_NAME, slot_file_name(store_id, 0)}
    elif COMMITS_NAME in names and (folder / COMMITS_NAME).is_dir() and not os.listdir(folder / COMMITS_NAME):
        names.remove(COMMITS_NAME)
    if names:
        found = "a checkpoint" if COMMITS_NAME in names else min(names)
        raise CheckpointError(
            str(folder), f"{found} in it", "a new or an empty folder, or an unfinished copy", "Nothing was changed."
        )


def _begin(destination: CheckpointFolder, source: Manifest, disk: Disk) -> _Marker:
    """Writes down what is copied, or finds it written down. The folder's lock is held."""
    _expect_copy_or_nothing(destination.path)  # again, now that nobody else can change it
    path = destination.path / MARKER_NAME
    digest = hashlib.sha256(source.encode()).hexdigest()
    if os.path.lexists(path):
        marker = _read_marker(path)
        if marker.source != digest:
            raise CheckpointError(
                str(destination.path),
                f"an unfinished copy of another commit, of step {marker.step}",
                f"one of this commit of step {source.header.step}, or an empty folder",
                "Finish that copy, or remove the folder.",
            )
    else:
        marker = _Marker(store_id=uuid.uuid4().hex, source=digest, step=source.header.step)
        disk.publish(path, dump_json(marker.model_dump()))
    strangers = [one for one in destination.commits() if destination.load(one).header.store_id != marker.store_id]
    if strangers:
        raise CheckpointError(str(destination.path), f"a commit of step {strangers[0]}", "an unfinished copy")
    destination.sweep()
    destination.add_store_id(marker.store_id)
    return marker


def _read_marker(path: Path) -> _Marker:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _Marker.model_validate(parse_json(os.read(descriptor, _MARKER_MAX_BYTES)))
        finally:
            os.close(descriptor)
    except (ValidationError, ValueError, OSError) as error:
        raise CheckpointError(
            str(path), f"what is no record of a copy ({type(error).__name__})", "one", "Remove the folder."
        ) from error


def _expect_space(folder: Path, needed_bytes: int) -> None:
    """Refuses a file system without room for the pages; what an unfinished copy takes already counts as room."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    space = os.statvfs(existing)
    taken = sum(path.lstat().st_blocks * 512 for path in folder.glob("angelptm-*.pages")) if folder.is_dir() else 0
    available = space.f_bavail * space.f_frsize + taken
    if needed_bytes > available:
        raise CheckpointError(
            str(folder),
            f"{format_bytes(available)} ({available} bytes) free",
            f"{format_bytes(needed_bytes)} ({needed_bytes} bytes)",
            "Free disk space, or copy to another file system.",
        )


def _open(path: Path, size_bytes: int) -> io_engine.File:
    """The new slot file, its space reserved."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise CheckpointError(str(path), "a symbolic link, or no regular file", "the slot file of the copy")
    file = io_engine.open_file(path, create=True, allocate_bytes=size_bytes)
    if max(file.offset_alignment, file.memory_alignment) > EXTENT_BYTES:
        file = io_engine.open_file(path, direct=False)  # pages end at multiples of 4096 only
    return file
