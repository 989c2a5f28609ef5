"""Files that somebody else may have written: looked at before they are opened, read whole only when they are small."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from angelptm.errors import DataError


def regular_size_bytes(path: Path, expected: str) -> int:
    """Bytes of a file, links followed. DataError for what is none: opening a pipe hangs, a device never ends."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a byte 0 in the name
        raise DataError(str(path), getattr(error, "strerror", None) or str(error), expected) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(str(path), "no regular file", expected)
    return status.st_size


def read_whole(path: Path, limit_bytes: int, expected: str) -> bytes:
    """The content of a regular file of at most ``limit_bytes``."""
    size_bytes = regular_size_bytes(path, expected)
    if size_bytes > limit_bytes:
        raise DataError(str(path), f"{size_bytes} bytes", f"{expected}, of at most {limit_bytes} bytes")
    try:
        with path.open("rb") as file:
            return file.read(limit_bytes)
    except OSError as error:
        raise DataError(str(path), error.strerror or "an error", expected) from error


def parse_json(content: bytes, path: Path, expected: str) -> Any:
    """A JSON document in UTF-8. DataError too for one that is nested deeper than Python can follow."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(str(path), f"an unreadable file ({error})", expected) from error


def check_inside(path: Path, folder: Path) -> None:
    """DataError if links lead from the folder to a file outside it, whoever made them.

    Snapshots of the Hugging Face cache are the exception: they are links to the ``blobs`` of the same repository.
    """
    real = Path(os.path.realpath(path))
    home = Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs"
    if real.is_relative_to(home) or (home.parent.name == "snapshots" and real.parent == blobs):
        return
    raise DataError(
        str(path), f"a link to {real}", f"a file inside {folder}", "Copy the file, or name the other folder."
    )
