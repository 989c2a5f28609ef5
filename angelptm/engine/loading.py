"""A load of pages that does not stay behind half done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import angelptm_native as native


@contextmanager
def loading(mover: native.PageMover, pages: Sequence[int]) -> Iterator[None]:
    """Begins a load, and gives up what is left of it when the block raises: the mover has one load at a time."""
    try:
        mover.begin_load(pages)
        yield
    except BaseException:
        mover.end_load()
        raise
