"""Memory that O_DIRECT and buffer registration accept."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np


class AlignedBuffer(mmap.mmap):
    """Anonymous page-aligned memory: a bytes-like object and a context manager.

    Page alignment (4096 bytes or more) satisfies every O_DIRECT memory alignment in use. The memory lives until
    ``close``, which raises BufferError while a view of it exists, for example in an unfinished ticket.
    """

    def __new__(cls, bytes: int) -> AlignedBuffer:
        if bytes <= 0:
            raise ValueError(f"an AlignedBuffer needs 1 byte or more, not {bytes}")
        buffer = super().__new__(cls, -1, bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                # Fewer, larger physical segments, so the block layer cuts a request into fewer pieces. Only advice.
                buffer.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                return buffer  # a kernel without transparent huge pages
        return buffer

    def __exit__(self, *error: object) -> None:
        try:
            self.close()
        except BufferError:
            # On the way of an error the frames of its traceback still hold views: that error is the one to tell.
            if error[0] is None:
                raise

    @property
    def address(self) -> int:
        """Address of the first byte; valid until ``close``."""
        return address_of(memoryview(self))

    def view(self, offset: int, bytes: int) -> memoryview:
        """The part [offset, offset + bytes), which keeps the buffer from being closed."""
        if offset < 0 or bytes < 0 or offset + bytes > len(self):
            raise ValueError(f"[{offset}, {offset + bytes}) is not inside a buffer of {len(self)} bytes")
        return memoryview(self)[offset : offset + bytes]


def byte_view(buffer: Any) -> memoryview:
    """A one-dimensional view of the bytes of any contiguous bytes-like object; it keeps the object's memory alive."""
    view = memoryview(buffer)
    if not view.contiguous:
        raise ValueError("a buffer must be contiguous")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def address_of(view: memoryview) -> int:
    """Address of a view's first byte, read-only views included (which ctypes would refuse)."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if len(view) else 0
