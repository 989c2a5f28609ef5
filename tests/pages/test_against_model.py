"""The store against a dictionary of pages, under random operations and few frames."""

from __future__ import annotations

import random
from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest

from .pool import PAGE, content, load, make_store, slots_in_files, view, write

SURVIVABLE = native.FaultPlan(
    seed=3, short_transfer=0.3, eintr=0.2, eagain=0.05, delay=0.1, delay_seconds=0.001, reorder=True
)


class Model:
    """What every page must hold; ``random`` decides what happens next."""

    def __init__(self, store: native.Store, seed: int, homes: list[native.Home]) -> None:
        self.store, self.random, self.seed = store, random.Random(seed), seed * 1000
        sizes = [self.random.choice([1, 100, 4096, 5000, PAGE - 1, PAGE]) for _ in homes]
        self.pages = [store.add_page(home, size) for home, size in zip(homes, sizes, strict=True)]
        self.content = {page: np.zeros(size, np.uint8) for page, size in zip(self.pages, sizes, strict=True)}
        self.versions = dict.fromkeys(self.pages, 0)
        self.on_ssd = {page for page, home in zip(self.pages, homes, strict=True) if home == native.Home.SSD}
        self.written: set[int] = set()

    def write(self, page: int) -> None:
        self.seed += 1
        data = content(self.seed, len(self.content[page]))
        write(self.store, page, data)
        self.content[page], self.versions[page] = data, self.versions[page] + 1
        self.written.add(page)

    def step(self) -> None:
        page = self.random.choice(self.pages)
        match self.random.choice(["write", "write", "write", "load", "change", "discard", "give up", "drain", "frame"]):
            case "write":
                self.write(page)
            case "load":
                self.check(self.random.choices(self.pages, k=self.random.randint(1, 6)))
            case "change" if page in self.on_ssd:  # read, modify, write back the very frame that was read into
                self.store.mover.begin_load([page])
                loaded = self.store.mover.next_loaded()
                assert loaded is not None
                frame = self.store.mover.take_loaded()
                view(self.store.mover.address(frame), 1)[0] ^= 0xFF
                self.store.mover.write_behind(page, frame)
                self.content[page] = self.content[page].copy()
                self.content[page][0] ^= 0xFF
                self.versions[page] += 1
                self.written.add(page)
            case "discard":
                self.store.discard(page)
                if page in self.on_ssd:
                    self.content[page] = np.zeros_like(self.content[page])
                    self.written.discard(page)
            case "give up":
                self.store.mover.begin_load(self.random.choices(self.pages, k=4))
                for _ in range(self.random.randint(0, 3)):
                    self.store.mover.next_loaded()
                self.store.mover.end_load()
            case "drain":
                self.store.mover.drain()
                self.account()
            case "frame":
                self.store.mover.release(self.store.mover.staging_frame())

    def check(self, pages: list[int]) -> None:
        for page, found in zip(pages, load(self.store, pages), strict=True):
            assert np.array_equal(found, self.content[page])

    def account(self) -> None:
        """One slot for each written SSD page and no other, one frame for each host page and no other."""
        assert self.store.slot_used_count == len(self.written & self.on_ssd)
        assert self.store.host_used_count == len(self.pages) - len(self.on_ssd)
        assert {page: self.store.page_version(page) for page in self.pages} == self.versions


@pytest.mark.parametrize("frames", [2, 3, 12])
@pytest.mark.parametrize("faults", [None, SURVIVABLE], ids=["plain", "faults"])
def test_pages_hold_what_was_written_last_whatever_happened_between(
    tmp_path: Path, backend: native.Backend, frames: int, faults: native.FaultPlan | None
) -> None:
    for seed in range(3):
        homes = [native.Home.SSD] * 9 + [native.Home.HOST] * 3
        # One slot more than pages: every write finds one only because each publish gives the former one back.
        store = make_store(tmp_path, frames=3 + frames, slots=(7, 2, 1), backend=backend, faults=faults)
        model = Model(store, seed, homes)
        for _ in range(250):
            model.step()
        model.check(model.pages)
        store.mover.drain()
        model.account()
        assert store.host_peak_count <= 3 + frames
        assert store.slot_peak_count <= 10
        for page in model.pages:
            store.discard(page)
        assert store.slot_used_count == 0


def test_unwritten_pages_read_as_zeros_even_from_used_frames_and_slots(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, frames=3, slots=(4,), backend=backend)
    full = store.add_page(native.Home.SSD, PAGE)
    for seed in range(4):
        write(store, full, content(seed, PAGE))
    fresh = [store.add_page(native.Home.SSD, size) for size in (1, 5000, PAGE)]
    assert not any(found.any() for found in load(store, fresh))
    before = store.mover.read_bytes
    load(store, fresh)
    assert store.mover.read_bytes == before
    store.discard(full)
    assert not load(store, [full])[0].any()
    assert not load(store, [store.add_page(native.Home.HOST, PAGE)])[0].any()


def test_former_content_is_never_overwritten_in_place(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, frames=4, slots=(2,), backend=backend)
    page = store.add_page(native.Home.SSD, PAGE)
    write(store, page, content(1, PAGE))
    store.mover.drain()
    assert (store.slot_used_count, store.slot_peak_count) == (1, 1)
    write(store, page, content(2, PAGE))
    store.mover.drain()
    assert (store.slot_used_count, store.slot_peak_count) == (1, 2)
    assert np.array_equal(load(store, [page])[0], content(2, PAGE))


def test_pages_with_content_are_counted_once_however_often_they_are_written(
    tmp_path: Path, backend: native.Backend
) -> None:
    store = make_store(tmp_path, frames=4, slots=(4,), backend=backend)
    pages = [store.add_page(native.Home.SSD, PAGE) for _ in range(2)]
    on_host = store.add_page(native.Home.HOST, PAGE)
    for page in (*pages, *pages, on_host):
        write(store, page, content(1, PAGE))
    store.mover.drain()
    assert store.ssd_page_peak_count == 2
    store.discard(pages[0])
    store.discard(pages[0])
    write(store, pages[0], content(2, PAGE))
    store.mover.drain()
    assert store.ssd_page_peak_count == 2


def test_only_whole_sectors_of_the_content_travel(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, backend=backend)
    page = store.add_page(native.Home.SSD, 5000)
    write(store, page, content(1, 5000))
    load(store, [page])
    assert (store.mover.written_bytes, store.mover.read_bytes) == (8192, 8192)


def test_slots_are_dealt_to_the_files_by_weight(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, slots=(30, 30), weights=(1.0, 3.0), backend=backend)
    pages = [store.add_page(native.Home.SSD, 4096) for _ in range(40)]
    for page in pages:
        write(store, page, content(page, 4096) | 1)
    store.mover.drain()
    first, second = ([slot[0] for slot in slots] for slots in slots_in_files(tmp_path))
    assert (np.count_nonzero(first), np.count_nonzero(second)) == (10, 30)
    for page, found in zip(pages, load(store, pages), strict=True):
        assert np.array_equal(found, content(page, 4096) | 1)


def test_full_file_passes_its_turn_on(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, slots=(3, 30), weights=(9.0, 1.0), backend=backend)
    pages = [store.add_page(native.Home.SSD, 4096) for _ in range(33)]
    for page in pages:
        write(store, page, content(page, 4096))
    store.mover.drain()
    assert store.slot_used_count == store.slot_count == 33
    with pytest.raises(native.TierCapacityError, match="33 slots"):
        write(store, pages[0], content(0, 4096))
    assert store.host_used_count == 0


def test_files_have_no_name_once_they_are_open(tmp_path: Path, backend: native.Backend) -> None:
    folder = tmp_path / "slots"
    folder.mkdir()
    store = make_store(folder, slots=(2, 2), backend=backend)
    assert list(folder.iterdir()) == []
    assert store.slot_count == 4
