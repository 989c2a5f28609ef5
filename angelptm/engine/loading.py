"""A load of pages that does not stay behind half done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import angelptm_native as native

from angelptm.pages import naming


@contextmanager
def loading(mover: native.PageMover, pages: Sequence[int], name_page: Callable[[int], str]) -> Iterator[None]:
    """Begins a load, and gives up what is left of it when the block raises: the mover has one load at a time.
    ``name_page`` says what a page holds, for messages."""
    try:
        with naming(name_page):
            mover.begin_load(pages)
            yield
    except BaseException:
        mover.end_load()
        raise
