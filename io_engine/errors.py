"""The error of every backend."""

from __future__ import annotations

import os
from errno import ENODATA


class IoError(OSError):
    """An input or output that the operating system, or a deadline, did not let finish.

    ``op`` is one of read, write, open, allocate, sync, setup. ``offset`` and ``bytes`` are the part of the file that
    was not transferred. ``errno`` is the operating system's number; ENODATA stands for the end of the file and
    ETIMEDOUT for a deadline. The text holds all of it.
    """

    def __init__(self, op: str, path: str, offset: int, bytes: int, errno: int, text: str = "") -> None:
        reason = "end of file" if errno == ENODATA else os.strerror(errno)
        text = text or f"{op} {path} at offset {offset}, {bytes} bytes: {reason} (errno {errno})"
        super().__init__(errno, text)
        self.op, self.path, self.offset, self.bytes, self.text = op, path, offset, bytes, text

    def __reduce__(self) -> tuple[type[IoError], tuple[str, str, int, int, int | None, str]]:
        return type(self), (self.op, self.path, self.offset, self.bytes, self.errno, self.text)

    def __str__(self) -> str:
        return self.text
