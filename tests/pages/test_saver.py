"""What commits write and hold: slots of their own, counted by reference, also when the device fails or is late."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest

from io_engine.errors import IoError

from .pool import PAGE, content, load, make_store, view, write

HOST, SSD = native.Home.HOST, native.Home.SSD
LATE = native.FaultPlan(delay=1.0, delay_seconds=0.25)
DEADLINE = 0.05


def late_store(folder: Path) -> native.Store:
    return make_store(folder, deadline_seconds=DEADLINE, faults=LATE, keep_files=True)


def fill(store: native.Store, page: int, data: np.ndarray) -> None:
    view(store.home_address(page), len(data))[:] = data
    store.publish_in_place(page)


def slot_content(folder: Path, file: int, slot: int, size: int) -> np.ndarray:
    return np.fromfile(folder / f"{file}.pages", np.uint8, size, offset=slot * PAGE)


def missed(error: pytest.ExceptionInfo[IoError], op: str) -> None:
    assert (error.value.op, error.value.errno) == (op, errno.ETIMEDOUT)


def settle(saver: native.PageSaver) -> None:
    """Returns when what missed its deadline is over: a quarter of a second, more on a busy host."""
    for _ in range(100):
        if error_of(saver.save, []) is None:
            return
        time.sleep(0.05)
    raise AssertionError("a late write never ended")


def error_of(action: Callable[..., object], *arguments: object) -> IoError | None:
    try:
        action(*arguments)
    except IoError as error:
        return error
    return None


def states(store: native.Store, pages: list[int]) -> list[native.Captured]:
    captured = store.capture(pages)
    store.release_slots([(file, slot) for state, file, slot, _, _ in captured if state == native.Captured.IN_SLOT])
    return [state for state, *_ in captured]


def test_saved_pages_and_bytes_are_in_their_slots(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, frames=9, slots=(10, 10), backend=backend, keep_files=True)
    saver = store.make_saver()
    pages = [store.add_page(HOST, size) for size in (1, 4096, 5000, PAGE - 1, PAGE, 7)]
    sizes = [1, 4096, 5000, PAGE - 1, PAGE, 7]
    for page, size in zip(pages, sizes, strict=True):
        fill(store, page, content(page, size))
    assert states(store, pages) == [native.Captured.UNSAVED] * 6
    saver.save(pages)
    data = content(99, 4097)
    file, slot, crc = saver.save_bytes(data.ctypes.data, len(data))
    saver.flush()
    assert native.crc32c(slot_content(tmp_path, file, slot, 8192)) == crc
    assert np.array_equal(slot_content(tmp_path, file, slot, 4097), data)
    for (state, file, slot, crc, version), page, size in zip(store.capture(pages), pages, sizes, strict=True):
        assert (state, version) == (native.Captured.IN_SLOT, 1)
        whole = slot_content(tmp_path, file, slot, -(-size // 4096) * 4096)
        assert np.array_equal(whole[:size], content(page, size))
        assert not whole[size:].any()
        assert native.crc32c(whole) == crc
        assert store.slot_reference_count(file, slot) == 2
    assert store.slot_used_count == 7


def test_bytes_after_a_missed_deadline_are_not_told_to_be_written_before_they_are(tmp_path: Path) -> None:
    """The end of the first write must not be taken for that of the second."""
    store = late_store(tmp_path)
    saver = store.make_saver()
    first, second = content(1, PAGE), content(2, PAGE)
    with pytest.raises(IoError) as told:
        saver.save_bytes(first.ctypes.data, PAGE)
    missed(told, "write")
    time.sleep(0.3)
    with pytest.raises(IoError) as told:
        saver.save_bytes(second.ctypes.data, PAGE)
    missed(told, "write")
    settle(saver)
    assert store.slot_used_count == 0


def test_staging_frame_is_not_filled_while_a_late_write_reads_it(tmp_path: Path) -> None:
    store = late_store(tmp_path)
    saver = store.make_saver()
    for seed in range(2):
        data = content(seed, PAGE)
        with pytest.raises(IoError) as told:
            saver.save_bytes(data.ctypes.data, PAGE)
        missed(told, "write")
    assert store.slot_used_count == 1, "the second waited for the first, and was not begun"


def test_pages_saved_too_late_are_not_saved_and_their_slots_are_free_again(tmp_path: Path) -> None:
    """After the error the page may be changed while the kernel still reads it: that is no version of it."""
    store = late_store(tmp_path)
    saver = store.make_saver()
    pages = [store.add_page(HOST, PAGE) for _ in range(3)]
    for page in pages:
        fill(store, page, content(page, PAGE))
    with pytest.raises(IoError) as told:
        saver.save(pages)
    missed(told, "write")
    assert store.slot_used_count == 3, "the kernel may still write to them"
    settle(saver)
    assert states(store, pages) == [native.Captured.UNSAVED] * 3
    assert store.slot_used_count == 0


def test_flush_that_missed_its_deadline_spoils_no_later_call(tmp_path: Path) -> None:
    store = late_store(tmp_path)
    saver = store.make_saver()
    page = store.add_page(HOST, PAGE)
    with pytest.raises(IoError) as told:
        saver.flush()
    missed(told, "sync")
    with pytest.raises(IoError, match="deadline"):  # The flush is still under way, or the write is.
        saver.save([page])
    settle(saver)
    with pytest.raises(IoError) as told:
        saver.save([page])
    missed(told, "write")
    settle(saver)
    with pytest.raises(IoError) as told:
        saver.flush()
    missed(told, "sync")


def test_after_a_refused_flush_no_other_one_succeeds(tmp_path: Path) -> None:
    """The kernel tells a lost write-back once, and a second flush would be told that all is well."""
    refused = 0
    for seed in range(40):
        saver = make_store(tmp_path, slots=(2, 2), faults=native.FaultPlan(seed=seed, eio=0.3)).make_saver()
        outcomes = [error_of(saver.flush) for _ in range(5)]
        errors = [error for error in outcomes if error is not None]
        if errors:
            refused += 1
            assert {(error.op, error.errno) for error in errors} == {("sync", errno.EIO)}
            assert None not in outcomes[outcomes.index(errors[0]) :]
            assert len({str(error) for error in errors}) == 1
    assert refused > 5


def test_page_that_cannot_be_saved_does_not_leave_the_others_under_way(tmp_path: Path) -> None:
    store = make_store(tmp_path, slots=(4,), frames=8)
    saver = store.make_saver()
    on_ssd = store.add_page(SSD, PAGE)
    pages = [store.add_page(HOST, PAGE) for _ in range(5)]
    for page in pages:
        fill(store, page, content(page, PAGE))
    with pytest.raises(RuntimeError, match="host pages"):
        saver.save([pages[0], on_ssd, pages[1]])
    with pytest.raises(IndexError):
        saver.save([pages[1], 99])
    assert states(store, pages[:3]) == [native.Captured.IN_SLOT, native.Captured.IN_SLOT, native.Captured.UNSAVED]
    saver.flush()
    with pytest.raises(native.TierCapacityError, match="4 slots"):
        saver.save(pages[2:])
    assert states(store, pages) == [native.Captured.IN_SLOT] * 4 + [native.Captured.UNSAVED]
    data = content(1, PAGE)
    with pytest.raises(native.TierCapacityError, match="4 slots"):
        saver.save_bytes(data.ctypes.data, PAGE)
    for size in (0, PAGE + 1):
        with pytest.raises(ValueError, match="slot holds"):
            saver.save_bytes(data.ctypes.data, size)
    saver.flush()


def test_failed_save_keeps_the_former_copy_and_takes_no_slot(tmp_path: Path, backend: native.Backend) -> None:
    failed = 0
    for seed in range(6):
        faults = native.FaultPlan(seed=seed, eio=0.15)
        store = make_store(tmp_path, backend=backend, frames=9, faults=faults, keep_files=True)
        saver = store.make_saver()
        pages = [store.add_page(HOST, PAGE) for _ in range(6)]
        kept: dict[int, tuple[int, int]] = {}
        for step in range(4):
            for page in pages:
                fill(store, page, content(10 * step + page, PAGE))
            if (error := error_of(saver.save, pages)) is not None:
                assert (error.op, error.errno) == ("write", errno.EIO)
                failed += 1
            for page, (state, file, slot, crc, version) in zip(pages, store.capture(pages), strict=True):
                assert version == step + 1
                if state == native.Captured.IN_SLOT:
                    kept[page] = (file, slot)
                    assert native.crc32c(slot_content(tmp_path, file, slot, PAGE)) == crc
                    store.release_slots([(file, slot)])
            assert store.slot_used_count == len(kept)
            assert all(store.slot_reference_count(*slot) == 1 for slot in kept.values())
    assert failed > 3


def test_slot_is_free_when_its_last_owner_lets_it_go(tmp_path: Path) -> None:
    store = make_store(tmp_path, slots=(3, 2))
    with pytest.raises(ValueError, match="no slot 2 in file 1"):
        store.claim_slots([(0, 0), (1, 2)])
    with pytest.raises(ValueError, match="no slot 0 in file 2"):
        store.claim_slots([(2, 0)])
    assert store.slot_used_count == 0
    store.claim_slots([(0, 1), (1, 0), (0, 1)])
    store.claim_slots([(0, 1)])
    store.claim_slots([])
    assert [store.slot_reference_count(0, index) for index in range(3)] == [0, 3, 0]
    assert (store.slot_used_count, store.slot_free_count, store.slot_peak_count) == (2, 3, 2)
    pages = [store.add_page(SSD, PAGE) for _ in range(3)]
    for page in pages:
        write(store, page, content(page, PAGE))
    store.mover.drain()
    assert store.slot_free_count == 0
    store.release_slots([(0, 1), (0, 1)])
    assert store.slot_free_count == 0
    store.release_slots([(0, 1)])
    assert (store.slot_free_count, store.slot_reference_count(0, 1)) == (1, 0)
    with pytest.raises(RuntimeError, match="not taken"):
        store.release_slots([(0, 1)])
    with pytest.raises(RuntimeError, match="no such slot"):
        store.slot_reference_count(0, 3)
    store.release_slots([(1, 0)])
    for page in pages:
        store.discard(page)
    assert store.slot_used_count == 0


def test_adopted_content_is_not_replaced_by_a_write_under_way(tmp_path: Path, backend: native.Backend) -> None:
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.02)
    store = make_store(tmp_path, backend=backend, faults=slow)
    page = store.add_page(SSD, PAGE)
    write(store, page, content(1, PAGE))
    store.mover.drain()
    ((_, file, slot, crc, version),) = store.capture([page])
    write(store, page, content(2, PAGE))
    store.adopt(page, file, slot, crc, version)
    store.mover.drain()
    assert np.array_equal(load(store, [page])[0], content(1, PAGE))
    assert (store.page_version(page), store.slot_reference_count(file, slot), store.slot_used_count) == (1, 2, 1)


def test_refused_adoption_takes_no_reference(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    page = store.add_page(SSD, PAGE)
    store.claim_slots([(0, 3)])
    with pytest.raises(IndexError):
        store.adopt(page + 1, 0, 3, 0, 1)
    for slot in (4, 16):
        with pytest.raises(RuntimeError, match="slot"):
            store.adopt(page, 0, slot, 0, 1)
    assert store.slot_reference_count(0, 3) == 1
    assert store.slot_used_count == 1
    assert not store.page_written(page)


def test_captured_content_stays_when_the_page_moves_on(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, backend=backend, keep_files=True)
    page = store.add_page(SSD, PAGE)
    for seed in range(3):
        write(store, page, content(seed, PAGE))
        store.mover.drain()
        with pytest.raises(IndexError):
            store.capture([page, 99])
        store.capture([page, page])
    for seed in range(10, 20):
        write(store, page, content(seed, PAGE))
    store.mover.drain()
    counts = {slot: store.slot_reference_count(0, slot) for slot in range(16)}
    assert sorted(counts.values()) == [0] * 12 + [1, 2, 2, 2]
    pinned = [slot_content(tmp_path, 0, slot, PAGE) for slot, count in counts.items() if count == 2]
    for seed in range(3):
        assert any(np.array_equal(found, content(seed, PAGE)) for found in pinned)
