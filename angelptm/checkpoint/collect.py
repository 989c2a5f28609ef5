"""Gives back disk space that no commit needs. Only files of the folder's own sets are ever touched."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from angelptm.checkpoint.copying import MARKER_NAME
from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.opened import open_reader
from angelptm.checkpoint.slot_files import slot_file_name, slot_files_in
from angelptm.errors import CheckpointError
from io_engine.errors import IoError

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


@dataclass
class Collected:
    """What was removed and freed, or would be. ``held_steps``: commits beyond ``keep`` that a reader holds."""

    kept_steps: list[int] = field(default_factory=list)
    removed_steps: list[int] = field(default_factory=list)
    held_steps: list[int] = field(default_factory=list)
    removed_files: list[tuple[Path, int]] = field(default_factory=list)
    punched_files: list[tuple[Path, int]] = field(default_factory=list)

    @property
    def freed_bytes(self) -> int:
        return sum(size for _, size in [*self.removed_files, *self.punched_files])


def collect(
    path: Path, ssd_folders: Sequence[Path], *, keep: int | None, dry_run: bool = False, disk: Disk | None = None
) -> Collected:
    """Removes commits beyond the newest ``keep`` (None keeps all), what unfinished publications left, and slot files of
    sets without a commit; gives back slots that no commit names, which a run reserves again when it opens the files.

    Raises StoreLockedError while a run uses the folder; CheckpointError, with nothing changed, when a manifest does not
    decode or a slot file is missing, as what is free is not known then; IoError.
    """
    assert keep is None or keep >= 1, "the newest commit stays"
    disk = disk or Disk()
    with CheckpointFolder.open(path, disk=disk) as folder:
        if os.path.lexists(folder.path / MARKER_NAME):
            raise CheckpointError(
                str(folder.path), "an unfinished copy", "a complete one", "Finish the copy, or remove the folder."
            )
        folders = list(dict.fromkeys([folder.path, *(Path(one).resolve() for one in ssd_folders)]))
        manifests = {step: folder.load(step) for step in folder.commits()}
        steps = sorted(manifests)
        result = Collected()
        keeping = steps[-keep:] if keep is not None else steps
        files = {step: _files_of(folder, manifests[step], folders) for step in keeping}
        _slots_in_use(manifests, files)  # raises while nothing is changed
        for step in steps[: len(steps) - len(keeping)]:
            if dry_run or folder.retire(step):
                result.removed_steps.append(step)
            else:
                result.held_steps.append(step)
                files[step] = _files_of(folder, manifests[step], folders)
        result.kept_steps = keeping
        in_use = _slots_in_use(manifests, files)
        result.removed_files += [(one, _taken(one)) for one in folder.unfinished()]
        if not dry_run:
            folder.sweep()
        live = {manifests[step].header.store_id: step for step in files}
        for store_id in folder.store_ids():
            if store_id in live:
                continue
            # The id stays on the list: the set may have files in folders that were not named.
            for one in (one for place in folders for one in slot_files_in(place, store_id)):
                result.removed_files.append((one, _taken(one)))
                if not dry_run:
                    disk.remove(one)
        for one, slots, page_bytes in in_use:
            freed = _free_bytes(one, len(slots) * page_bytes) if dry_run else _punch(one, slots, page_bytes)
            if freed:
                result.punched_files.append((one, freed))
    return result


def _files_of(folder: CheckpointFolder, manifest: Manifest, folders: Sequence[Path]) -> dict[str, Path]:
    """The slot files of a commit by name; only those of the folder's own sets."""
    header = manifest.header
    with open_reader(folder, manifest, folders[1:]) as reader:  # which looks at names, kinds and sizes
        found = {header.files[index].name: path for index, path in reader.paths.items()}
    for index, file in enumerate(header.files):
        if file.name != slot_file_name(header.store_id, index) or header.store_id not in folder.store_ids():
            raise CheckpointError(
                str(folder.manifest_path(header.step)), f"slot file {file.name}", "one of this folder's own sets"
            )
    return found


def _slots_in_use(
    manifests: dict[int, Manifest], files: dict[int, dict[str, Path]]
) -> list[tuple[Path, set[int], int]]:
    """(file, slots that the commits of ``files`` name, bytes of a slot) of each file."""
    used: dict[Path, tuple[set[int], int]] = {}
    for step in files:
        manifest = manifests[step]
        for index, file in enumerate(manifest.header.files):
            if file.name in files[step]:
                slots, page_bytes = used.setdefault(files[step][file.name], (set(), manifest.header.page_bytes))
                if page_bytes != manifest.header.page_bytes:
                    raise CheckpointError(
                        str(files[step][file.name]), "commits that have it in slots of two sizes", "one size"
                    )
                slots.update(manifest.pages["slot"][manifest.pages["file"] == index].tolist())
    return [(path, slots, page_bytes) for path, (slots, page_bytes) in used.items()]


def _taken(path: Path) -> int:
    return path.lstat().st_blocks * 512


def _free_bytes(path: Path, used_bytes: int) -> int:
    """What ``_punch`` would free: a slot that a commit names is there as a whole."""
    return max(0, _taken(path) - used_bytes)


def _punch(path: Path, slots: set[int], page_bytes: int) -> int:
    """Gives back what the file holds outside of ``slots``; the bytes that this freed. The file keeps its size."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise CheckpointError(str(path), "no regular file", "a slot file")
        end = before.st_size // page_bytes  # what follows the last whole slot is not ours to judge
        ordered = np.array(sorted(slots), np.int64)
        starts, ends = np.concatenate([[0], ordered + 1]), np.concatenate([ordered, [end]])
        for first, last in zip(starts.tolist(), ends.tolist()):
            if first < last:
                _punch_hole(descriptor, path, first * page_bytes, (last - first) * page_bytes)
        os.fsync(descriptor)
        return (before.st_blocks - os.fstat(descriptor).st_blocks) * 512
    finally:
        os.close(descriptor)


def _punch_hole(descriptor: int, path: Path, offset: int, size: int) -> None:
    assert offset >= 0
    assert size > 0
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or libc.fallocate  # musl has only the latter, with 64 bits
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while call(descriptor, _KEEP_SIZE | _PUNCH_HOLE, offset, size) != 0:
        code = ctypes.get_errno() or errno.EIO
        if code != errno.EINTR:
            raise IoError("punch", str(path), offset, size, code)
