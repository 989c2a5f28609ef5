"""What the drive gave to a store: bytes and the time in which they moved, reads and writes apart."""

from __future__ import annotations

import time
from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest

from .pool import PAGE, content, load, make_store, write

SECONDS = 0.05
SSD = native.Home.SSD


@pytest.fixture
def store(tmp_path: Path, backend: native.Backend) -> native.Store:
    """Each transfer takes ``SECONDS`` at least."""
    slow = native.FaultPlan(delay=1.0, delay_seconds=SECONDS)
    return make_store(tmp_path, frames=8, slots=(32,), backend=backend, faults=slow)


def test_transfers_of_one_direction_count_apart(store: native.Store) -> None:
    pages = [store.add_page(SSD, PAGE) for _ in range(3)]
    start = time.perf_counter()
    for index, page in enumerate(pages):
        write(store, page, content(index, PAGE))
    store.mover.drain()
    wrote = time.perf_counter() - start
    use = store.drive_use()
    assert use["read"] == use["mixed"] == (0, 0.0)
    assert use["write"][0] == 3 * PAGE
    assert SECONDS <= use["write"][1] <= wrote
    start = time.perf_counter()
    assert np.array_equal(load(store, pages)[1], content(1, PAGE))
    read = time.perf_counter() - start
    later = store.drive_use()
    assert later["write"] == use["write"]
    assert later["mixed"] == (0, 0.0)
    assert later["read"][0] == 3 * PAGE
    assert SECONDS <= later["read"][1] <= read


def test_time_in_which_nothing_moves_counts_for_nothing(store: native.Store) -> None:
    page = store.add_page(SSD, PAGE)
    write(store, page, content(0, PAGE))
    store.mover.drain()
    before = store.drive_use()
    time.sleep(0.05)
    assert store.drive_use() == before


def test_both_directions_at_once(store: native.Store) -> None:
    """A fetcher reads while the mover writes, each with an engine of its own."""
    first, second = store.add_page(SSD, PAGE), store.add_page(SSD, PAGE)
    write(store, first, content(0, PAGE))
    store.mover.drain()
    before = store.drive_use()
    fetcher = native.Fetcher(store, 2)
    target = np.zeros(PAGE, np.uint8)
    ticket = fetcher.fetch("a page", [(first, target.ctypes.data)])
    write(store, second, content(1, PAGE))
    store.mover.drain()
    ticket.wait(20.0)
    found = store.drive_use()
    assert sum(size for size, _ in found.values()) - sum(size for size, _ in before.values()) == 2 * PAGE
    assert found["mixed"][0] > 0
    assert found["mixed"][1] > 0


@pytest.mark.unsanitized  # all its transfers share one frame
def test_a_probe_is_not_counted(tmp_path: Path) -> None:
    store = make_store(tmp_path, frames=8, slots=(32,))
    assert store.probe_drive(0.02) is not None
    assert all(use == (0, 0.0) for use in store.drive_use().values())
