"""What fails says what failed, keeps the former content, and takes no frame and no slot with it."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import angelptm_native as native
import numpy as np
import pytest

from io_engine.errors import IoError

from .pool import PAGE, content, load, make_store, slots_in_files, view, write


def fails(**faults: Any) -> native.FaultPlan:
    return native.FaultPlan(seed=5, **faults)


def until_error(action: Callable[[], object]) -> IoError:
    for _ in range(200):
        try:
            action()
        except IoError as error:
            return error
    raise AssertionError("no fault was met")


@pytest.mark.parametrize(("fault", "number"), [("eio", errno.EIO), ("enospc", errno.ENOSPC)])
def test_failed_write_surfaces_with_its_facts_and_the_former_content_stays(
    tmp_path: Path, backend: native.Backend, fault: str, number: int
) -> None:
    store = make_store(tmp_path, frames=4, slots=(8,), backend=backend, faults=fails(**{fault: 0.05}))
    pages = [store.add_page(native.Home.SSD, PAGE) for _ in range(5)]
    published: dict[int, np.ndarray] = {page: np.zeros(PAGE, np.uint8) for page in pages}
    seed = 0

    def write_one() -> None:
        nonlocal seed
        seed += 1
        page = pages[seed % len(pages)]
        before = store.page_version(page)
        write(store, page, content(seed, PAGE))
        store.mover.drain()
        assert store.page_version(page) == before + 1
        published[page] = content(seed, PAGE)

    error = until_error(write_one)
    assert (error.op, error.path, error.errno) == ("write", str(tmp_path / "0.pages"), number)
    assert error.offset % PAGE == 0
    assert 0 <= error.offset < 8 * PAGE
    assert error.bytes == PAGE
    # Nothing is lost silently: who goes on is told again.
    with pytest.raises(IoError):
        write(store, pages[0], content(0, PAGE))
    with pytest.raises(IoError):
        store.mover.drain()
    assert store.host_used_count == 0
    assert store.slot_used_count == sum(data.any() for data in published.values())
    # Reading may fail by the same fault; what it yields is the former content.
    for page in pages:
        while True:
            try:
                (found,) = load(store, [page])
            except IoError:
                continue
            assert np.array_equal(found, published[page])
            break
    assert store.host_used_count == 0


def test_load_tells_of_a_lost_write_before_it_hands_former_content_out(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, backend=backend, faults=fails(enospc=1.0))
    page = store.add_page(native.Home.SSD, PAGE)
    write(store, page, content(1, PAGE))
    with pytest.raises(IoError) as told:
        load(store, [page])
    assert told.value.errno == errno.ENOSPC
    assert not load(store, [page])[0].any()
    assert (store.host_used_count, store.slot_used_count) == (0, 0)


def test_failed_read_spoils_neither_the_page_nor_later_loads(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, frames=4, backend=backend, faults=fails(eio=0.2))
    pages = []
    while len(pages) < 6:
        page = store.add_page(native.Home.SSD, PAGE)
        try:
            write(store, page, content(page, PAGE))
            store.mover.drain()
        except IoError:  # with this seed the first writes pass
            break
        pages.append(page)
    assert pages
    outcomes: set[object] = set()
    for _ in range(60):
        try:
            for page, found in zip(pages, load(store, pages), strict=True):
                assert np.array_equal(found, content(page, PAGE))
            outcomes.add("whole")
        except IoError as error:
            outcomes.add(("failed", error.op, error.errno, error.bytes))
        assert store.host_used_count == 0  # a load that throws is over, without end_load
    assert outcomes == {"whole", ("failed", "read", errno.EIO, PAGE)}


def test_survivable_faults_change_nothing_and_are_counted_by_nobody_else(
    tmp_path: Path, backend: native.Backend
) -> None:
    plan = native.FaultPlan(seed=1, short_transfer=0.7, eintr=0.2, eagain=0.05, reorder=True)
    store = make_store(tmp_path, frames=3, slots=(12, 12), backend=backend, faults=plan)
    pages = [store.add_page(native.Home.SSD, PAGE) for _ in range(20)]
    for page in pages:
        write(store, page, content(page, PAGE))
    for page, found in zip(pages, load(store, pages), strict=True):
        assert np.array_equal(found, content(page, PAGE))
    assert store.mover.read_bytes == store.mover.written_bytes == 20 * PAGE


def test_write_that_is_refused_gives_its_frame_back(tmp_path: Path) -> None:
    store = make_store(tmp_path, frames=2, slots=(1,))
    page = store.add_page(native.Home.SSD, PAGE)
    write(store, page, content(1, PAGE))
    store.mover.drain()
    for _ in range(5):  # the only slot holds the former content, which may not be overwritten
        with pytest.raises(native.TierCapacityError, match="ssd tier"):
            write(store, page, content(2, PAGE))
        with pytest.raises(IndexError):
            store.mover.write_behind(99, store.mover.staging_frame())
    assert store.host_used_count == 0
    assert np.array_equal(load(store, [page])[0], content(1, PAGE))


def test_write_waits_for_a_slot_that_a_write_under_way_will_free(tmp_path: Path, backend: native.Backend) -> None:
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.01)
    store = make_store(tmp_path, frames=4, slots=(3,), backend=backend, faults=slow)
    pages = [store.add_page(native.Home.SSD, PAGE) for _ in range(2)]
    for seed in range(8):
        write(store, pages[seed % 2], content(seed, PAGE))
    for page, seed in zip(pages, (6, 7), strict=True):
        assert np.array_equal(load(store, [page])[0], content(seed, PAGE))


def test_discard_holds_though_the_page_is_being_written(tmp_path: Path, backend: native.Backend) -> None:
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.02)
    store = make_store(tmp_path, backend=backend, faults=slow)
    page = store.add_page(native.Home.SSD, PAGE)
    write(store, page, content(1, PAGE))
    store.discard(page)
    store.mover.drain()
    assert store.slot_used_count == 0
    assert not load(store, [page])[0].any()


def test_page_that_is_rewritten_while_it_is_read_ahead_arrives_whole(tmp_path: Path) -> None:
    """A slot may not be given to another write while it is still read from. Here reads take several attempts, each
    of them slow, so that there would be time for one write to free the slot and for another to fill it."""
    slow = native.FaultPlan(seed=2, short_transfer=0.5, delay=0.5, delay_seconds=0.004)
    store = make_store(tmp_path, frames=8, slots=(3,), faults=slow)
    one, two = (store.add_page(native.Home.SSD, PAGE) for _ in range(2))
    write(store, one, content(1, PAGE))
    store.mover.drain()
    for seed in range(2, 30):
        store.mover.begin_load([one])
        write(store, one, content(seed, PAGE))
        write(store, two, content(100 + seed, PAGE))
        write(store, two, content(200 + seed, PAGE))
        loaded = store.mover.next_loaded()
        assert loaded is not None
        assert np.array_equal(view(loaded[1], PAGE), content(seed - 1, PAGE))
        store.mover.end_load()
        store.mover.drain()


def test_host_page_exchanged_during_a_load_shows_its_new_content(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    pages = [store.add_page(native.Home.HOST, PAGE) for _ in range(2)]
    store.mover.begin_load(pages)
    write(store, pages[1], content(1, PAGE))
    write(store, pages[0], content(2, PAGE))  # takes over the frame that page 1 had
    found = []
    while (loaded := store.mover.next_loaded()) is not None:
        found.append(view(loaded[1], PAGE).copy())
    assert np.array_equal(found[0], content(2, PAGE))
    assert np.array_equal(found[1], content(1, PAGE))


def test_device_that_does_not_answer_is_named_when_the_deadline_passes(tmp_path: Path) -> None:
    stuck = native.FaultPlan(delay=1.0, delay_seconds=0.6)
    store = make_store(tmp_path, deadline_seconds=0.05, faults=stuck)
    page = store.add_page(native.Home.SSD, PAGE)
    write(store, page, content(1, PAGE))
    start = time.monotonic()
    with pytest.raises(IoError) as caught:
        store.mover.drain()
    assert time.monotonic() - start < 0.5
    assert (caught.value.op, caught.value.errno) == ("write", errno.ETIMEDOUT)
    assert "0.pages" in str(caught.value)
    assert store.host_used_count == 1  # still the kernel's
    time.sleep(0.7)
    store.mover.drain()
    assert np.array_equal(next(slot for slot in slots_in_files(tmp_path)[0] if slot.any()), content(1, PAGE))
    assert store.host_used_count == 0


def test_few_frames_are_refused_by_name_and_none_is_lost(tmp_path: Path) -> None:
    store = make_store(tmp_path, frames=2)
    page = store.add_page(native.Home.SSD, PAGE)
    frames = [store.mover.staging_frame() for _ in range(2)]
    assert store.mover.try_staging_frame() is None
    for attempt in (
        store.mover.staging_frame,
        lambda: store.mover.begin_load([page]),
        lambda: store.add_page(native.Home.HOST, 1),
    ):
        with pytest.raises(native.TierCapacityError, match="host tier"):
            attempt()
    for frame in frames:
        store.mover.release(frame)
    with pytest.raises(RuntimeError, match="not taken"):
        store.mover.release(frames[0])
    assert store.host_used_count == 0
    assert not load(store, [page])[0].any()


@pytest.mark.parametrize("home", [native.Home.HOST, native.Home.SSD])
@pytest.mark.parametrize("size", [0, PAGE + 1])
def test_page_content_outside_its_frame_is_refused(tmp_path: Path, home: native.Home, size: int) -> None:
    store = make_store(tmp_path)
    with pytest.raises(ValueError, match="bytes of content"):
        store.add_page(home, size)
    assert (store.host_used_count, store.page_count) == (0, 0)


def test_publishing_in_place_is_refused_where_there_is_no_place(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    page = store.add_page(native.Home.SSD, PAGE)
    with pytest.raises(RuntimeError, match="tier"):
        store.publish_in_place(page)
    with pytest.raises(ValueError, match="host tier"):
        store.home_address(page)
    assert not load(store, [page])[0].any()


@pytest.mark.parametrize("page_bytes", [0, 1000, 4096 + 512, 2**31])
def test_page_size_that_is_not_whole_sectors_is_refused(tmp_path: Path, page_bytes: int) -> None:
    with pytest.raises(ValueError, match="page_bytes"):
        make_store(tmp_path, page_bytes=page_bytes)
    assert list(tmp_path.iterdir()) == []


def test_load_begun_before_the_last_is_finished_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    pages = [store.add_page(native.Home.SSD, PAGE) for _ in range(2)]
    store.mover.begin_load(pages)
    with pytest.raises(RuntimeError, match="unfinished"):
        store.mover.begin_load(pages)
    with pytest.raises(RuntimeError, match="staging frame to take"):
        store.mover.take_loaded()
    store.mover.end_load()
    assert store.mover.next_loaded() is None
    with pytest.raises(IndexError):
        store.mover.begin_load([0, 77])
    assert len(load(store, pages)) == 2


def test_python_runs_on_while_another_thread_waits_for_the_disk(tmp_path: Path) -> None:
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.4)
    store = make_store(tmp_path, faults=slow)
    write(store, store.add_page(native.Home.SSD, PAGE), content(1, PAGE))
    waiting = threading.Thread(target=store.mover.drain)
    asking = threading.Thread(target=lambda: store.mover.read_bytes)
    start = time.monotonic()
    waiting.start()
    time.sleep(0.05)
    asking.start()  # waits for the mover, and must not keep this thread from running meanwhile
    time.sleep(0.05)
    assert time.monotonic() - start < 0.3
    assert waiting.is_alive()
    waiting.join()
    asking.join()


@pytest.mark.parametrize("seconds", [math.inf, 1e300])
def test_wait_without_a_sensible_end_still_waits(tmp_path: Path, seconds: float) -> None:
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.05)
    store = make_store(tmp_path, deadline_seconds=seconds, faults=slow)
    page = store.add_page(native.Home.SSD, PAGE)
    write(store, page, content(1, PAGE))
    assert np.array_equal(load(store, [page])[0], content(1, PAGE))
