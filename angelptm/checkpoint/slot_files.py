"""The files that hold a store's slots: their names, their size, and their removal.

A set of them has a random id, the store id; a checkpoint folder lists the ids that are its own, so that what an
interrupted run has left on the drives is known and reclaimed, and nothing else is.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path

from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.folder import STORES_NAME, CheckpointFolder
from io_engine.errors import IoError

_NAME = re.compile(r"angelptm-([0-9a-f]{32})-(\d{1,4})\.pages")


def slot_file_name(store_id: str, index: int) -> str:
    """The name of the ``index``-th file of a set."""
    return f"angelptm-{store_id}-{index}.pages"


def slot_files_in(folder: Path, store_id: str) -> list[Path]:
    """The files of a set that are in a folder, by index."""
    found = []
    for path in folder.glob(f"angelptm-{store_id}-*.pages") if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is not None and match.group(1) == store_id and path.is_file() and not path.is_symlink():
            found.append((int(match.group(2)), path))
    return [path for _, path in sorted(found)]


def slot_file_bytes(checkpoint_folder: Path, folders: Sequence[Path]) -> list[int]:
    """Disk space in each folder that slot files of a checkpoint folder's own sets take now."""
    if not (checkpoint_folder / STORES_NAME).is_file():
        return [0] * len(folders)  # there is no such folder, or what made it was killed before it had a store
    with CheckpointFolder.read(checkpoint_folder) as found:
        ids = found.store_ids()
    return [
        sum(path.stat().st_blocks * 512 for store_id in ids for path in slot_files_in(folder, store_id))
        for folder in folders
    ]


def remove_slot_files(store_id: str, folders: Sequence[Path], disk: Disk, *, beside_others: bool = False) -> list[Path]:
    """Removes a set's files from the folders; returns what is gone. ``beside_others``: they may be faster."""
    removed = []
    for folder in dict.fromkeys(folders):
        for path in slot_files_in(folder, store_id):
            try:
                disk.remove(path)
            except IoError as error:
                if not beside_others or error.errno != errno.ENOENT:
                    raise
            removed.append(path)
    return removed
