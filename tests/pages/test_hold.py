"""A host page that is held keeps its frame; what is published meanwhile goes to another one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest

from .pool import PAGE, content, make_store, view

HOST, SSD = native.Home.HOST, native.Home.SSD


def test_held_page_is_its_newest_content(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    pages = [store.add_page(HOST, PAGE) for _ in range(3)]
    for version in range(1, 4):
        for page in pages:
            view(store.home_address(page), PAGE)[:] = content(10 * version + page, PAGE)
            store.publish_in_place(page)
        held = store.hold(pages)
        assert [now for _, now in held] == [store.page_version(page) for page in pages] == [version] * 3
        for page, (frame, _) in zip(pages, held):
            assert store.mover.address(frame) == store.home_address(page)
            assert np.array_equal(view(store.mover.address(frame), PAGE), content(10 * version + page, PAGE))
        store.release_held([frame for frame, _ in held])


def test_page_is_held_by_several_at_a_time(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    page = store.add_page(HOST, PAGE)
    assert store.hold([page, page]) + store.hold([page]) == [(store.hold([page])[0][0], 0)] * 3
    assert store.host_used_count == 1, "who reads takes no frame"


def test_page_that_has_no_frame_of_the_pool_is_not_held(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    block = ctypes.create_string_buffer(2 * PAGE)
    aligned = -(-ctypes.addressof(block) // PAGE) * PAGE
    for page in (store.add_page(SSD, PAGE), store.add_page_at(aligned, PAGE)):
        with pytest.raises(ValueError, match="held lives in the host"):
            store.hold([page])
    with pytest.raises(IndexError):
        store.hold([store.page_count])


def test_frame_that_is_not_held_is_not_released(tmp_path: Path) -> None:
    """Counted below zero, a frame would look read for good."""
    store = make_store(tmp_path)
    page = store.add_page(HOST, PAGE)
    ((frame, _),) = store.hold([page])
    store.release_held([frame])
    for wrong in (frame, 10**6):
        with pytest.raises(ValueError, match=f"frame {wrong} is not held"):
            store.release_held([wrong])
