"""The fetcher brings the newest content to where it is asked for, holds no more frames than it may, and always ends."""

from __future__ import annotations

import errno
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import angelptm_native as native
import numpy as np
import pytest

from angelptm.errors import CorruptPageError
from io_engine.errors import IoError

from ..update.harness import HOST, SSD, Spans
from .pool import PAGE, content, flip, load, make_store, slot_of, view, write

DEADLINE = 20.0
SURVIVABLE = {"short_transfer": 0.3, "eintr": 0.2, "eagain": 0.05, "delay": 0.3, "delay_seconds": 0.002}


def slow(seconds: float, **others: Any) -> native.FaultPlan:
    return native.FaultPlan(seed=3, delay=1.0, delay_seconds=seconds, **others)


_TARGETS: list[np.ndarray] = []  # kept, since a fetch that a failing test leaves open writes to its own


class Fetch:
    """A fetch, and the memory that it fills."""

    def __init__(self, fetcher: native.Fetcher, pages: Sequence[int], **options: Any) -> None:
        self.found = [np.full(PAGE, 0xEE, np.uint8) for _ in pages]
        _TARGETS.extend(self.found)
        items = [(page, target.ctypes.data) for page, target in zip(pages, self.found, strict=True)]
        self.ticket = fetcher.fetch("unit x, which is fetched", items, **options)

    def wait(self) -> list[np.ndarray]:
        self.ticket.wait(DEADLINE)
        return self.found


def ssd_pages(store: native.Store, count: int, first_seed: int = 0) -> list[int]:
    pages = [store.add_page(SSD, PAGE) for _ in range(count)]
    for index, page in enumerate(pages):
        write(store, page, content(first_seed + index, PAGE))
    store.mover.drain()
    return pages


def until(condition: Any) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.001)


@pytest.mark.parametrize("most_frames", [1, 2, 5])
@pytest.mark.parametrize(
    "faults", [None, native.FaultPlan(seed=9, reorder=True, **SURVIVABLE)], ids=["plain", "faults"]
)
def test_fetched_content_is_what_was_written_last(
    tmp_path: Path, backend: native.Backend, most_frames: int, faults: native.FaultPlan | None
) -> None:
    store = make_store(tmp_path, frames=16, slots=(32,), backend=backend, faults=faults)
    sizes = [PAGE, 1, 4096, 5000, PAGE - 1]
    homes = [HOST, SSD] * 5
    pages = [store.add_page(home, size) for home, size in zip(homes, sizes * 2, strict=True)]
    expected = {}
    for page, size in zip(pages, sizes * 2, strict=True):
        expected[page] = np.zeros(size, np.uint8)
        if page % 3 == 0:  # the others were never written
            continue
        for seed in (page, page + 100):
            expected[page] = content(seed, size)
            write(store, page, expected[page])
    store.mover.drain()
    homes_used = store.host_used_count
    fetcher = native.Fetcher(store, most_frames)
    for pages_asked in (pages, pages[::-1], [pages[1]] * 4):
        for page, found in zip(pages_asked, Fetch(fetcher, pages_asked).wait(), strict=True):
            assert np.array_equal(found[: len(expected[page])], expected[page])
            assert (found[len(expected[page]) :] == 0xEE).all(), "nothing is written behind the content"
    assert store.host_used_count == homes_used
    assert fetcher.totals["copied_bytes"] == 2 * sum(map(len, expected.values())) + 4 * len(expected[pages[1]])
    assert fetcher.totals["handed_over_bytes"] == 0
    assert Fetch(fetcher, []).ticket.done()


def test_unknown_page_is_refused_and_the_fetcher_goes_on(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (page,) = ssd_pages(store, 1)
    fetcher = native.Fetcher(store, 2)
    with pytest.raises(IndexError):
        Fetch(fetcher, [page, 77])
    with pytest.raises(IndexError):
        fetcher.read_ahead([page, 77])
    assert np.array_equal(Fetch(fetcher, [page]).wait()[0], content(0, PAGE))
    with pytest.raises(ValueError, match="staging frame"):
        native.Fetcher(store, 0)


def test_urgent_fetch_goes_before_what_is_queued(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, frames=4, backend=backend, slots=(32,), faults=slow(0.005))
    pages = ssd_pages(store, 12)
    fetcher = native.Fetcher(store, 1)
    queued = Fetch(fetcher, pages[:11])
    urgent = Fetch(fetcher, pages[11:], urgent=True)
    assert np.array_equal(urgent.wait()[0], content(11, PAGE))
    assert not queued.ticket.done()
    for seed, found in enumerate(queued.wait()):
        assert np.array_equal(found, content(seed, PAGE))


def test_what_is_read_ahead_is_read_once(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, backend=backend)
    pages = ssd_pages(store, 4)
    fetcher = native.Fetcher(store, 4)
    fetcher.read_ahead(pages)  # one more than there are frames for it: one is left to fetches
    until(lambda: fetcher.totals["read_bytes"] == 3 * PAGE)
    assert store.host_used_count == 3
    for seed, found in enumerate(Fetch(fetcher, pages[:3]).wait()):
        assert np.array_equal(found, content(seed, PAGE))
    until(lambda: fetcher.totals["read_bytes"] == 4 * PAGE)  # its turn came when a frame was free
    assert np.array_equal(Fetch(fetcher, pages[3:]).wait()[0], content(3, PAGE))
    assert fetcher.totals["read_bytes"] == 4 * PAGE
    assert store.host_used_count == 0


def test_what_is_read_ahead_gives_way_to_a_fetch(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, backend=backend)
    pages = ssd_pages(store, 4)
    fetcher = native.Fetcher(store, 3)
    fetcher.read_ahead(pages[:2])
    until(lambda: fetcher.totals["read_bytes"] == 2 * PAGE)
    for seed, found in enumerate(Fetch(fetcher, pages[2:]).wait(), start=2):
        assert np.array_equal(found, content(seed, PAGE))


def test_read_ahead_content_that_was_replaced_is_dropped(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, backend=backend)
    pages = ssd_pages(store, 3)
    fetcher = native.Fetcher(store, 3)
    fetcher.read_ahead(pages[:2])
    until(lambda: fetcher.totals["read_bytes"] == 2 * PAGE)
    write(store, pages[0], content(50, PAGE))
    store.mover.drain()
    store.discard(pages[1])  # which keeps its version
    assert np.array_equal(Fetch(fetcher, pages[:1]).wait()[0], content(50, PAGE))
    assert not Fetch(fetcher, pages[1:2]).wait()[0].any()
    # Nor does it keep a frame from what is read ahead next.
    fetcher.read_ahead(pages[:2])
    write(store, pages[0], content(51, PAGE))
    store.mover.drain()
    before = fetcher.totals["read_bytes"]
    fetcher.read_ahead([pages[0], pages[2]])
    until(lambda: fetcher.totals["read_bytes"] >= before + 2 * PAGE)
    assert np.array_equal(Fetch(fetcher, pages[:1]).wait()[0], content(51, PAGE))


def test_content_of_a_commit_with_the_same_version_replaces_what_was_read_ahead(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    pages = ssd_pages(store, 2)
    fetcher = native.Fetcher(store, 2)
    fetcher.read_ahead(pages[:1])
    until(lambda: fetcher.totals["read_bytes"] == PAGE)
    ((_, file, index, crc, version),) = store.capture(pages[1:])
    assert version == store.page_version(pages[0])
    store.adopt(pages[0], file, index, crc, version)
    assert np.array_equal(Fetch(fetcher, pages[:1]).wait()[0], content(1, PAGE))


def test_let_go_returns_every_frame_also_of_reads_under_way(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, backend=backend, faults=slow(0.03))
    pages = ssd_pages(store, 3)
    fetcher = native.Fetcher(store, 3)
    for pause in (0.0, 0.01, 0.1):
        fetcher.read_ahead(pages)
        time.sleep(pause)
        fetcher.let_go()
        until(lambda: store.host_used_count == 0)
    assert np.array_equal(Fetch(fetcher, pages[:1]).wait()[0], content(0, PAGE))


@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_closing_fails_what_is_queued_and_returns_every_frame(
    tmp_path: Path, backend: native.Backend, pause: float
) -> None:
    store = make_store(tmp_path, backend=backend, faults=slow(0.05))
    pages = ssd_pages(store, 6)
    fetcher = native.Fetcher(store, 3)
    fetches = [Fetch(fetcher, [page]) for page in pages]
    fetcher.read_ahead(pages)
    time.sleep(pause)
    start = time.monotonic()
    del fetcher
    gc.collect()
    assert time.monotonic() - start < 5
    assert store.host_used_count == 0
    closed = 0
    for seed, fetch in enumerate(fetches):
        assert fetch.ticket.done()
        try:
            assert np.array_equal(fetch.wait()[0], content(seed, PAGE))
        except RuntimeError as error:
            assert "closed" in str(error)  # noqa: PT017
            closed += 1
    assert closed > 0


def test_corrupt_page_is_told_in_the_ticket(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, backend=backend, keep_files=True)
    pages = ssd_pages(store, 3)
    ((_, _, index, _, _),) = store.capture(pages[1:2])
    with (tmp_path / "0.pages").open("r+b", buffering=0) as file:
        file.seek(index * PAGE + 77)
        byte = file.read(1)[0]
        file.seek(index * PAGE + 77)
        file.write(bytes([byte ^ 1]))
    fetcher = native.Fetcher(store, 2)
    with pytest.raises(CorruptPageError) as caught:
        Fetch(fetcher, pages).wait()
    assert (caught.value.page, caught.value.offset) == (pages[1], index * PAGE)
    assert np.array_equal(Fetch(fetcher, pages[2:]).wait()[0], content(2, PAGE))
    fetcher.let_go()
    until(lambda: store.host_used_count == 0)


def test_read_error_is_told_in_the_ticket_and_the_next_fetch_reads_anew(
    tmp_path: Path, backend: native.Backend
) -> None:
    store = make_store(tmp_path, backend=backend, slots=(64,), faults=native.FaultPlan(seed=5, eio=0.2))
    pages: list[int] = []
    while len(pages) < 8:
        page = store.add_page(SSD, PAGE)
        frame = store.mover.staging_frame()
        view(store.mover.address(frame), PAGE)[:] = content(page, PAGE)
        saver = store.make_saver()
        try:
            file, index, crc = saver.save_bytes(store.mover.address(frame), PAGE)
            saver.flush()
        except IoError:
            store.mover.release(frame)
            continue
        store.mover.release(frame)
        store.adopt(page, file, index, crc, 1)
        pages.append(page)
    used = store.host_used_count
    fetcher = native.Fetcher(store, 3)
    failed = 0
    for _ in range(60):
        fetcher.read_ahead(pages)
        fetch = Fetch(fetcher, pages)
        try:
            for page, found in zip(pages, fetch.wait(), strict=True):
                assert np.array_equal(found, content(page, PAGE))
        except IoError as error:
            assert (error.op, error.errno) == ("read", errno.EIO)  # noqa: PT017
            failed += 1
    assert 0 < failed < 60
    fetcher.let_go()
    until(lambda: store.host_used_count == used)


def test_device_that_does_not_answer_ends_every_fetch(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, backend=backend, deadline_seconds=0.1, faults=slow(0.6))
    pages = []
    for seed in range(2):
        page = store.add_page(SSD, PAGE)
        frame = store.mover.staging_frame()
        view(store.mover.address(frame), PAGE)[:] = content(seed, PAGE)
        store.mover.write_behind(page, frame)
        pages.append(page)
    until(lambda: _drained(store))
    fetcher = native.Fetcher(store, 1)
    for fetch in (Fetch(fetcher, pages), Fetch(fetcher, pages)):
        with pytest.raises(IoError, match="unfinished"):
            fetch.wait()


def _drained(store: native.Store) -> bool:
    try:
        store.mover.drain()
    except IoError:
        return False
    return True


def test_fetcher_takes_the_frames_of_writes_that_are_done(tmp_path: Path, backend: native.Backend) -> None:
    """The mover holds all frames until somebody asks it to look."""
    store = make_store(tmp_path, frames=4, slots=(32,), backend=backend, queue_depth=8)
    (read,) = ssd_pages(store, 1)
    written = [store.add_page(SSD, PAGE) for _ in range(4)]
    fetcher = native.Fetcher(store, 2)
    for page in written:
        write(store, page, content(page, PAGE))
    assert store.host_used_count == 4
    assert np.array_equal(Fetch(fetcher, [read]).wait()[0], content(0, PAGE))


# With an updater.


def spans_of(folder: Path, **options: Any) -> Spans:
    homes = [(SSD, HOST, SSD), (SSD, HOST, HOST), (SSD, HOST, SSD), (HOST, HOST, SSD)]
    return Spans(folder, homes, fetch_frames=options.pop("fetch_frames", 2), **options)


def params_of(spans: Spans, index: int) -> int:
    page = spans.spans[index].param
    assert page is not None
    return page


def assert_param(spans: Spans, index: int, found: np.ndarray) -> None:
    expected = spans.spans[index].expected_param.view(np.uint8)
    assert np.array_equal(found[: len(expected)], expected)


@pytest.mark.parametrize("fetch_frames", [1, 3])
def test_fetch_waits_for_the_update_under_way_and_others_pass(
    tmp_path: Path, backend: native.Backend, fetch_frames: int
) -> None:
    spans = spans_of(tmp_path, backend=backend, faults=slow(0.1), fetch_frames=fetch_frames)
    spans.submit([0, 1, 2, 3]).wait(DEADLINE)
    assert spans.fetcher is not None
    before = spans.spans[2].expected_param.copy()
    spans.fetcher.read_ahead([params_of(spans, 0)])
    time.sleep(0.15)  # read ahead, and held: it shall not stand in the way either
    ticket = spans.submit([0, 1])
    behind = Fetch(spans.fetcher, [params_of(spans, 0), params_of(spans, 1)], after=ticket)
    passes = Fetch(spans.fetcher, [params_of(spans, 2)])
    found = passes.wait()[0]
    assert np.array_equal(found[: before.nbytes], before.view(np.uint8))
    for index, found in enumerate(behind.wait()):
        assert_param(spans, index, found)
    ticket.wait(DEADLINE)
    spans.check()
    spans.close()


def test_passed_content_of_a_page_that_is_waited_for_keeps_no_frame(tmp_path: Path) -> None:
    spans = spans_of(tmp_path, faults=slow(0.1), fetch_frames=1, ring_depth=1)
    spans.submit([0, 1, 2, 3]).wait(DEADLINE)
    assert spans.fetcher is not None
    spans.fetcher.let_go()
    spans.fetcher.read_ahead([params_of(spans, 0)])
    time.sleep(0.15)
    spans.submit([1])  # reads and writes take 0.2 s at least, and then come those of the other
    ticket = spans.submit([0])
    behind = Fetch(spans.fetcher, [params_of(spans, 0)], after=ticket)
    passes = Fetch(spans.fetcher, [params_of(spans, 2)])
    assert_param(spans, 2, passes.wait()[0])
    assert not behind.ticket.done(), "what has passed kept the only frame"
    assert_param(spans, 0, behind.wait()[0])


def test_new_parameters_are_handed_over_and_kept(tmp_path: Path, backend: native.Backend) -> None:
    spans = spans_of(tmp_path, backend=backend, fetch_frames=2)
    assert spans.fetcher is not None
    for _ in range(3):
        ticket = spans.submit([0, 2])
        early = Fetch(spans.fetcher, [params_of(spans, 0)], after=ticket)
        assert_param(spans, 0, early.wait()[0])
        ticket.wait(DEADLINE)
        assert_param(spans, 2, Fetch(spans.fetcher, [params_of(spans, 2)]).wait()[0])
    assert spans.fetcher.totals["read_bytes"] == 0
    assert spans.fetcher.totals["handed_over_bytes"] == spans.fetcher.totals["copied_bytes"] > 0
    spans.submit([1, 3]).wait(DEADLINE)
    spans.check()
    spans.close()


def test_kept_page_gives_way_to_one_that_is_needed_sooner(tmp_path: Path) -> None:
    spans = spans_of(tmp_path, fetch_frames=1)
    assert spans.fetcher is not None
    spans.submit([0], rank=5).wait(DEADLINE)
    spans.submit([2], rank=1).wait(DEADLINE)  # sooner: displaces it
    spans.submit([3], rank=7).wait(DEADLINE)  # later: is not kept
    for index, read in ((2, 0), (0, 1), (3, 2)):
        assert_param(spans, index, Fetch(spans.fetcher, [params_of(spans, index)]).wait()[0])
        used = sum(-(-spans.spans[one].expected_param.nbytes // 4096) * 4096 for one in (0, 3)[:read])
        assert spans.fetcher.totals["read_bytes"] == used
    spans.close()


@pytest.mark.parametrize("param", [SSD, HOST], ids=["ssd", "host"])
def test_update_that_cannot_read_its_states_fails_the_fetch_that_waits_for_it(
    tmp_path: Path, backend: native.Backend, param: native.Home
) -> None:
    spans = Spans(tmp_path, [(SSD, HOST, param)] * 3, backend=backend, keep_files=True, fetch_frames=2)
    assert spans.fetcher is not None
    spans.submit([0, 1, 2]).wait(DEADLINE)
    page = spans.spans[1].state_pages[0]
    file, start, _ = slot_of(spans.store, page)
    flip(tmp_path / f"{file}.pages", start + 77)
    ticket = spans.submit([1])
    with pytest.raises(CorruptPageError) as caught:
        Fetch(spans.fetcher, [params_of(spans, 1)], after=ticket).ticket.wait(2.0)
    assert caught.value.page == page
    spans.close()


@pytest.mark.parametrize("param", [SSD, HOST], ids=["ssd", "host"])
def test_error_of_the_update_becomes_that_of_the_fetch(
    tmp_path: Path, backend: native.Backend, param: native.Home
) -> None:
    faults = native.FaultPlan(seed=1, eio=1.0, delay=1.0, delay_seconds=0.05)
    spans = Spans(tmp_path, [(SSD, HOST, param)] * 3, backend=backend, faults=faults, blank=True, fetch_frames=2)
    assert spans.fetcher is not None
    tickets = [spans.submit([0]), spans.submit([1]), spans.submit([2])]
    fetches = [Fetch(spans.fetcher, [params_of(spans, index)], after=ticket) for index, ticket in enumerate(tickets)]
    for ticket in tickets:  # blank states need no read, and nothing can be written
        with pytest.raises(IoError):
            ticket.wait(DEADLINE)
    for index, fetch in enumerate(fetches):
        try:
            fetch.ticket.wait(2.0)  # and not when its own deadline passes
        except IoError:
            continue
        assert_param(spans, index, fetch.found[0])  # handed over before the write failed
    # What is refused from here on never begins: its parameters are what they were.
    ticket = spans.submit([1])
    with pytest.raises(IoError):
        Fetch(spans.fetcher, [params_of(spans, 1)], after=ticket).ticket.wait(2.0)
    with pytest.raises(IoError):
        ticket.wait(DEADLINE)
    assert not Fetch(spans.fetcher, [params_of(spans, 1)]).wait()[0][: spans.spans[1].elements * 4].any()
    spans.close()


def test_update_that_is_closed_ends_the_fetch_that_waits_for_it(tmp_path: Path) -> None:
    spans = Spans(tmp_path, [(SSD, HOST, SSD)] * 6, ring_depth=1, faults=slow(0.1), fetch_frames=2)
    assert spans.fetcher is not None
    fetches = []
    for index in range(6):
        ticket = spans.submit([index])
        fetches.append(Fetch(spans.fetcher, [params_of(spans, index)], after=ticket))
    spans.updater = None
    gc.collect()
    closed = 0
    for fetch in fetches:
        try:
            fetch.ticket.wait(2.0)
        except RuntimeError as error:
            assert "closed" in str(error)  # noqa: PT017
            closed += 1
    assert closed > 0


def test_loaded_and_fetched_content_agree_while_both_go_on(tmp_path: Path, backend: native.Backend) -> None:
    faults = native.FaultPlan(seed=2, reorder=True, **SURVIVABLE)
    store = make_store(tmp_path, frames=6, slots=(64,), backend=backend, faults=faults)
    pages = ssd_pages(store, 10)
    fetcher = native.Fetcher(store, 2)
    for round_ in range(15):
        fetch = Fetch(fetcher, pages[round_ % 5 :], urgent=round_ % 2 == 0)
        other = pages[round_ % 5]
        loaded = load(store, pages[:3])
        for seed, found in enumerate(fetch.wait(), start=round_ % 5):
            assert np.array_equal(found, content(seed, PAGE))
        assert np.array_equal(loaded[2], content(2, PAGE))
        write(store, other, content(pages.index(other), PAGE))
        fetcher.read_ahead(pages[5:])
    fetcher.let_go()
    store.mover.drain()
    until(lambda: store.host_used_count == 0)
