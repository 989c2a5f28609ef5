"""Pages, commits and slots against a dictionary model, under random operations, failed writes and crashes."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import angelptm_native as native
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from io_engine.errors import IoError

from .pool import content, make_store, view, write

PAGE = 16384
SIZES = [1, 100, 4096, 5000, PAGE - 1, PAGE]
SLOTS = (9, 6, 3)
HOST_PAGES, SSD_PAGES, COMMITS = 4, 6, 3
MOST_EXAMPLES = 2 if "ANGELPTM_SANITIZED" in os.environ else 12
FRAMES = HOST_PAGES + 5  # four for staging, one for the saver

Slot = tuple[int, int]
SLOW = {"delay": 0.3, "delay_seconds": 0.0005, "reorder": True, "short_transfer": 0.2}


@dataclass
class Page:
    """What a page must hold. ``coming`` is the content of a write behind that is not known to be done."""

    home: native.Home
    size: int
    content: bytes
    version: int = 0
    written: bool = False
    coming: bytes | None = None
    saved_in: Slot | None = None  # of a host page


@dataclass
class Record:
    page: Page  # as it was
    slot: Slot | None
    crc: int
    index: int | None  # of the page in its store; None for a buffer


@dataclass
class Commit:
    records: list[Record]
    slots: list[Slot] = field(default_factory=list)


def sectors(data: bytes) -> bytes:
    """What travels for a content: the rest of its last sector is zeros."""
    return data + bytes(-len(data) % 4096)


class Machine(RuleBasedStateMachine):
    def __init__(self, folder: Path, backend: native.Backend, faults: dict[str, Any]) -> None:
        super().__init__()
        self.folder, self.backend, self.faults = folder, backend, faults
        self.seeds = itertools.count(1)
        self.pages: list[Page] = []
        self.commits: list[Commit] = []
        # Rules may depend on these alone, which neither timing nor a fault changes.
        self.wrote = self.cut = self.drained = False
        self.broken = False  # a write behind failed: until the next start the mover refuses every other one
        for path in folder.glob("*.pages"):
            path.unlink()
        self.open(0)

    def open(self, seed: int) -> None:
        plan = native.FaultPlan(seed=seed, **self.faults) if self.faults else None
        self.store = make_store(
            self.folder,
            frames=FRAMES,
            slots=SLOTS,
            page_bytes=PAGE,
            backend=self.backend,
            faults=plan,
            keep_files=True,
        )
        self.saver = self.store.make_saver()
        self.steps = 0  # of this run
        self.drained = True
        self.broken = False

    @property
    def can_fail(self) -> bool:
        return "eio" in self.faults

    # What the store shows of writes behind.

    def observe(self, *, all_over: bool = False) -> None:
        for index, page in enumerate(self.pages):
            if page.coming is None:
                continue
            if self.store.page_version(index) == page.version + 1:
                page.content, page.version, page.written = page.coming, page.version + 1, True
                page.coming = None
            elif all_over:
                assert self.can_fail, "a write was lost without an error"
                page.coming = None

    def attempt(self, action: Callable[[], object], *, writes: bool = False) -> bool:
        """Whether it went well; if not, for a reason that the model knows."""
        try:
            action()
        except IoError as error:
            assert self.can_fail
            self.broken |= error.op == "write" and writes
            return False
        except native.TierCapacityError:
            # Every write that was under way is over, and the slots are still all taken.
            self.observe()
            assert self.store.slot_free_count == 0
            return False
        return True

    def drain(self) -> None:
        self.drained = True
        went_well = self.attempt(self.store.mover.drain, writes=True)
        assert not (went_well and self.broken), "a lost write is told again by every drain"
        self.observe(all_over=True)

    # Operations.

    @initialize(host=st.lists(st.sampled_from(SIZES), min_size=1), ssd=st.lists(st.sampled_from(SIZES), min_size=3))
    def some_pages(self, host: list[int], ssd: list[int]) -> None:
        for home, sizes in ((native.Home.HOST, host), (native.Home.SSD, ssd)):
            for size in sizes:
                self.add(home, size)

    @precondition(lambda self: len(self.pages) < HOST_PAGES + SSD_PAGES)
    @rule(home=st.sampled_from([native.Home.HOST, native.Home.SSD]), size=st.sampled_from(SIZES))
    def add(self, home: native.Home, size: int) -> None:
        most = HOST_PAGES if home == native.Home.HOST else SSD_PAGES
        if sum(page.home == home for page in self.pages) < most:
            assert self.store.add_page(home, size) == len(self.pages)
            self.pages.append(Page(home, size, bytes(size)))

    @precondition(lambda self: self.pages)
    @rule(which=st.lists(st.integers(0, 99), min_size=1, max_size=5))
    def write_behind(self, which: list[int]) -> None:
        for one in which:
            self.write_one_behind(one % len(self.pages))

    @precondition(lambda self: self.pages)
    @rule(rounds=st.integers(1, 2))
    def write_every_page_behind(self, rounds: int) -> None:
        for index in list(range(len(self.pages))) * rounds:
            self.write_one_behind(index)

    def write_one_behind(self, index: int) -> None:
        page = self.pages[index]
        self.wrote, self.drained = True, False
        data = content(next(self.seeds), page.size)
        went_well = self.attempt(lambda: write(self.store, index, data), writes=page.home == native.Home.SSD)
        self.observe()
        if page.home == native.Home.HOST:
            assert went_well or self.broken  # waiting for a staging frame may meet another page's failure
        assert page.coming is None or not went_well or self.can_fail
        if went_well:
            page.coming = data.tobytes()
        self.observe()

    @precondition(lambda self: any(page.home == native.Home.HOST for page in self.pages))
    @rule(which=st.integers(0, 99))
    def change_in_place(self, which: int) -> None:
        chosen = [index for index, page in enumerate(self.pages) if page.home == native.Home.HOST]
        index = chosen[which % len(chosen)]
        page = self.pages[index]
        page.content = content(next(self.seeds), page.size).tobytes()
        view(self.store.home_address(index), page.size)[:] = memoryview(page.content)
        self.store.publish_in_place(index)
        page.version, page.written = page.version + 1, True

    @precondition(lambda self: self.wrote)
    @rule(which=st.integers(0, 99))
    def discard(self, which: int) -> None:
        index = which % len(self.pages)
        page = self.pages[index]
        self.store.discard(index)
        if page.home == native.Home.HOST:
            return
        if page.coming is not None:
            assert self.can_fail or self.store.page_version(index) == page.version + 1
            page.coming, page.version = None, self.store.page_version(index)
        page.content, page.written = bytes(page.size), False
        self.observe()

    @precondition(lambda self: not self.drained)
    @rule()
    def settle(self) -> None:
        self.drain()
        pending = sum(page.coming is not None for page in self.pages)
        assert pending == 0
        assert self.store.slot_used_count == len(self.owners())

    def save(self, indices: list[int]) -> bool:
        went_well = self.attempt(lambda: self.saver.save(indices))
        captured = self.store.capture(indices)
        for index, (state, file, slot, _, _) in zip(indices, captured):
            if state == native.Captured.IN_SLOT:
                self.pages[index].saved_in = (file, slot)
                self.store.release_slots([(file, slot)])
            else:
                assert not went_well or not self.pages[index].written
        return went_well

    @precondition(lambda self: self.wrote)
    @rule(which=st.integers(0, 99))
    def save_a_page(self, which: int) -> None:
        chosen = [index for index, page in enumerate(self.pages) if page.home == native.Home.HOST and page.written]
        if chosen:
            self.save([chosen[which % len(chosen)]])

    @precondition(lambda self: self.wrote)
    @rule(buffer=st.sampled_from([0, 1, 5000, PAGE]))
    def commit(self, buffer: int) -> None:
        self.cut = True
        if len(self.commits) == COMMITS:
            self.retire(0)
        self.drain()
        commit = Commit([])
        everything = list(range(len(self.pages)))
        unsaved: list[int] = []
        for index, found in zip(everything, self.store.capture(everything)):
            self.record(commit, index, found, unsaved)
        went_well = self.save(unsaved)
        if went_well:
            left: list[int] = []
            for index, found in zip(unsaved, self.store.capture(unsaved)):
                self.record(commit, index, found, left)
            assert not left
            went_well = not buffer or self.attempt(lambda: self.save_buffer(commit, buffer))
        if went_well and self.attempt(self.saver.flush):
            self.commits.append(commit)
        else:
            self.store.release_slots(commit.slots)

    def save_buffer(self, commit: Commit, size: int) -> None:
        data = content(next(self.seeds), size)
        file, slot, crc = self.saver.save_bytes(data.ctypes.data, size)
        commit.slots.append((file, slot))
        commit.records.append(Record(Page(native.Home.SSD, size, data.tobytes()), (file, slot), crc, None))

    def record(
        self, commit: Commit, index: int, found: tuple[native.Captured, int, int, int, int], unsaved: list[int]
    ) -> None:
        state, file, slot, crc, version = found
        page = self.pages[index]
        assert version == page.version
        assert (state == native.Captured.ZEROS) == (not page.written)
        if state == native.Captured.UNSAVED:
            assert page.home == native.Home.HOST
            unsaved.append(index)
            return
        if state == native.Captured.IN_SLOT:
            commit.slots.append((file, slot))
        kept = Page(page.home, page.size, page.content, page.version, page.written)
        commit.records.append(Record(kept, (file, slot) if page.written else None, crc, index))

    @precondition(lambda self: self.cut)
    @rule(which=st.integers(0, 99))
    def retire(self, which: int) -> None:
        if self.commits:
            self.store.release_slots(self.commits.pop(which % len(self.commits)).slots)

    @precondition(lambda self: not self.drained)
    @rule(which=st.integers(0, 99), count=st.integers(1, 5))
    def load_and_give_up(self, which: int, count: int) -> None:
        self.attempt(lambda: self.store.mover.begin_load([(which + i) % len(self.pages) for i in range(count)]))
        self.attempt(self.store.mover.next_loaded, writes=True)
        self.attempt(self.store.mover.end_load)
        self.observe()

    @precondition(lambda self: self.steps >= 8)
    @rule(seed=st.integers(0, 2**20))
    def crash(self, seed: int) -> None:
        """The process ends as it is; a new one goes on from the newest commit."""
        del self.saver
        del self.store
        self.open(seed)
        for commit in self.commits:
            self.store.claim_slots(commit.slots)
        for index, page in enumerate(self.pages):
            assert self.store.add_page(page.home, page.size) == index
            self.pages[index] = Page(page.home, page.size, bytes(page.size))
        for record in self.commits[-1].records if self.commits else ():
            self.adopt(record)
        named = {slot for commit in self.commits for slot in commit.slots}
        assert self.store.slot_used_count == len(named), "what no commit names is free"

    @precondition(lambda self: self.cut)
    @rule(which=st.integers(0, 99))
    def go_back(self, which: int) -> None:
        """Without an end of the process: a commit's content takes the place of what came after it."""
        if self.commits:
            for record in self.commits[which % len(self.commits)].records:
                self.adopt(record)

    def adopt(self, record: Record) -> None:
        if record.index is None:
            return
        index, former = record.index, record.page
        page = self.pages[index]
        if record.slot is None:
            if page.home == native.Home.SSD:
                self.discard(index)
            return
        if page.home == native.Home.HOST:
            view(self.store.home_address(index), page.size)[:] = memoryview(self.pread(record.slot, page.size))
            self.store.publish_in_place(index)
            page.saved_in = record.slot
        self.store.adopt(index, *record.slot, record.crc, former.version)
        page.content, page.version, page.written, page.coming = former.content, former.version, True, None
        self.observe()

    # What holds after every step.

    def pread(self, slot: Slot, size: int) -> bytes:
        with open(self.folder / f"{slot[0]}.pages", "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, slot[1] * PAGE)

    def owners(self) -> Counter[Slot]:
        owners: Counter[Slot] = Counter(slot for commit in self.commits for slot in commit.slots)
        owners.update(page.saved_in for page in self.pages if page.saved_in is not None)
        captured = self.store.capture(list(range(len(self.pages))))
        held = [(file, slot) for state, file, slot, _, _ in captured if state == native.Captured.IN_SLOT]
        self.store.release_slots(held)
        owners.update(
            (file, slot)
            for page, (state, file, slot, _, _) in zip(self.pages, captured)
            if state == native.Captured.IN_SLOT and page.home == native.Home.SSD
        )
        return owners

    @invariant()
    def every_slot_has_as_many_references_as_owners(self) -> None:
        self.steps += 1
        owners = self.owners()
        under_way = sum(page.coming is not None for page in self.pages)
        reserved = 0
        for file, count in enumerate(SLOTS):
            for index in range(count):
                found = self.store.slot_reference_count(file, index)
                if found != owners[file, index]:
                    assert (found, owners[file, index]) == (1, 0), "only a write under way has a slot of nobody's"
                    reserved += 1
        assert reserved <= under_way
        assert self.store.slot_used_count == sum(1 for count in owners.values() if count) + reserved
        assert self.store.slot_used_count + self.store.slot_free_count == sum(SLOTS)
        homes = sum(page.home == native.Home.HOST for page in self.pages)
        assert homes + 1 <= self.store.host_used_count <= homes + 1 + under_way

    @invariant()
    def slots_of_commits_hold_what_was_committed(self) -> None:
        held: dict[Slot, bytes] = {}
        for commit in self.commits:
            for record in commit.records:
                if record.slot is None:
                    continue
                expected = sectors(record.page.content)
                assert held.setdefault(record.slot, expected) == expected, "one slot, two contents"
                found = self.pread(record.slot, len(expected))
                assert found == expected
                assert native.crc32c(found) == record.crc
        for index, page in enumerate(self.pages):
            if page.home == native.Home.SSD and page.coming is None and page.written:
                ((_, file, slot, crc, version),) = self.store.capture([index])
                self.store.release_slots([(file, slot)])
                expected = sectors(page.content)
                assert held.setdefault((file, slot), expected) == expected, "one slot, two contents"
                assert (version, crc) == (page.version, native.crc32c(expected))

    @invariant()
    def pages_hold_what_was_written_last(self) -> None:
        quiet = [index for index, page in enumerate(self.pages) if page.coming is None]
        found: dict[int, bytes] = {}

        def load() -> None:
            found.clear()
            self.store.mover.begin_load(quiet)
            while (loaded := self.store.mover.next_loaded()) is not None:
                found[quiet[loaded[0]]] = view(loaded[1], loaded[2]).tobytes()

        while not self.attempt(load, writes=True):
            assert self.can_fail
        assert found == {index: self.pages[index].content for index in quiet}
        assert all(self.store.page_version(index) == self.pages[index].version for index in quiet)
        self.observe()

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.drain()
        self.pages_hold_what_was_written_last()
        self.crash(1)
        self.every_slot_has_as_many_references_as_owners()
        self.slots_of_commits_hold_what_was_committed()
        self.pages_hold_what_was_written_last()
        while self.commits:
            self.retire(0)
        for index in range(len(self.pages)):
            self.store.discard(index)
        assert self.store.slot_used_count == len({page.saved_in for page in self.pages if page.saved_in is not None})


@pytest.mark.parametrize("faults", [{}, SLOW, {**SLOW, "eio": 0.03}], ids=["plain", "slow", "eio"])
def test_commits_keep_their_content_and_no_slot_is_lost(
    tmp_path: Path, backend: native.Backend, faults: dict[str, Any]
) -> None:
    run_state_machine_as_test(
        lambda: Machine(tmp_path, backend, faults),
        settings=settings(
            max_examples=MOST_EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
