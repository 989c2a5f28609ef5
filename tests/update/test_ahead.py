"""States that are read ahead of their gradients change no bit, stand in nobody's way, and are given up on demand."""

from __future__ import annotations

import errno
import gc
import os
import random
import time
from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from io_engine.errors import IoError

from .harness import DEADLINE, HOST, SSD, SpanCase, Spans, hypers_of

HOMES = [(SSD, HOST, SSD), (SSD, SSD, HOST), (SSD, HOST, None), (HOST, HOST, SSD), (SSD, SSD, SSD)]


def slow(seconds: float) -> native.FaultPlan:
    return native.FaultPlan(delay=1.0, delay_seconds=seconds)


def updater_of(spans: Spans) -> native.Updater:
    assert spans.updater is not None
    return spans.updater


def rewrite(spans: Spans, span: SpanCase, change: float) -> None:
    """Changes a span's masters behind the updater's back. Its next update publishes those that it does not update."""
    span.expected[0][:] += np.float32(change)
    span.expected_param[:] = span.expected[0]
    spans.put(span.states[0], span.expected[0])
    spans.store.mover.drain()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ring_depth", [2, 4])
def test_states_that_were_read_ahead_are_used(
    tmp_path: Path, backend: native.Backend, threads: int, ring_depth: int
) -> None:
    spans = Spans(tmp_path, HOMES, threads=threads, ring_depth=ring_depth, backend=backend)
    everything = list(range(len(HOMES)))
    spans.submit(everything).wait(DEADLINE)
    updater = updater_of(spans)
    for _ in range(3):
        updater.expect(everything)
        time.sleep(0.05)
        for index in everything:
            spans.submit([index]).wait(DEADLINE)
    assert updater.utilisation()["read_ahead"] >= 3 * min(len(HOMES), threads * (ring_depth - 1))
    spans.check()
    del updater
    spans.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_read_in_vain_while_expectations_stay(tmp_path: Path, threads: int) -> None:
    """Neither what is expected again while it is held, nor what was submitted before its states were read ahead."""
    homes = [(SSD, HOST, HOST)] * 6
    spans = Spans(tmp_path, homes, threads=threads, ring_depth=3)
    everything = list(range(len(homes)))
    spans.submit(everything).wait(DEADLINE)
    updater = updater_of(spans)
    before = updater.utilisation()["read_bytes"]
    rounds = 4
    for _ in range(rounds):
        updater.expect(everything)
        time.sleep(0.02)
        updater.expect(everything)
        for index in reversed(everything):  # those that no slot was left for first
            spans.submit([index]).wait(DEADLINE)
            time.sleep(0.01)
    updater.recall()
    found = updater.utilisation()
    assert found["read_bytes"] - before == rounds * state_bytes(spans)
    assert found["read_ahead"] >= rounds * 2 * threads
    spans.check()
    del updater
    spans.close()


def state_bytes(spans: Spans) -> int:
    """Of all spans, in whole blocks as they are read."""
    return sum(3 * -(-4 * span.elements // 4096) * 4096 for span in spans.spans)


def test_ring_of_one_span_reads_nothing_ahead(tmp_path: Path) -> None:
    spans = Spans(tmp_path, HOMES, ring_depth=1)
    for _ in range(2):
        updater_of(spans).expect(list(range(5)))
        spans.submit(list(range(5))).wait(DEADLINE)
    assert updater_of(spans).utilisation()["read_ahead"] == 0
    spans.check()
    spans.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_expected_spans_whose_gradients_never_come_block_no_others(tmp_path: Path, threads: int) -> None:
    spans = Spans(tmp_path, HOMES * 2, threads=threads, ring_depth=2)
    spans.submit(list(range(10))).wait(DEADLINE)
    updater_of(spans).expect([0, 1, 2, 3])
    time.sleep(0.05)
    for index in range(9, 3, -1):
        spans.submit([index]).wait(DEADLINE)
    spans.check()
    spans.close()


@pytest.mark.parametrize("pause", [0.0, 0.005, 0.05])
def test_what_was_recalled_can_be_written_by_others(tmp_path: Path, backend: native.Backend, pause: float) -> None:
    spans = Spans(tmp_path, HOMES, ring_depth=3, backend=backend, faults=slow(0.01))
    spans.submit(list(range(5))).wait(DEADLINE)
    for round_ in range(2):
        updater_of(spans).expect(list(range(5)))
        time.sleep(pause)
        updater_of(spans).recall()
        for span in spans.spans:
            rewrite(spans, span, 0.25 + round_)
        spans.store.mover.drain()
        spans.submit(list(range(5))).wait(DEADLINE)
    assert updater_of(spans).utilisation()["read_ahead"] == 0
    spans.check()
    spans.close()


def test_recall_returns_while_the_gradients_of_what_is_read_ahead_come(tmp_path: Path) -> None:
    """The last span that is read ahead may leave that state by being updated, not by being given up."""
    spans = Spans(tmp_path, [(SSD, HOST, HOST)] * 4, ring_depth=2, deadline_seconds=5.0, faults=slow(0.02))
    spans.submit([0, 1, 2, 3]).wait(DEADLINE)
    for _ in range(5):
        updater_of(spans).expect([0])
        time.sleep(0.005)
        ticket = spans.submit([0])
        start = time.monotonic()
        updater_of(spans).recall()
        assert time.monotonic() - start < 2.5, "it waited for its deadline"
        ticket.wait(DEADLINE)
    assert updater_of(spans).utilisation()["read_ahead"] == 5
    spans.check()
    spans.close()


@pytest.mark.parametrize("how", ["write", "discard"])
def test_write_without_recall_is_an_error_and_never_wrong_states(tmp_path: Path, how: str) -> None:
    spans = Spans(tmp_path, [(SSD, HOST, HOST)] * 2, ring_depth=2)
    spans.submit([0, 1]).wait(DEADLINE)
    before = [spans.store.page_version(page) for page in spans.spans[0].state_pages]
    updater_of(spans).expect([0])
    time.sleep(0.05)
    if how == "write":
        spans.put(spans.spans[0].states[0], np.zeros(spans.spans[0].elements, np.float32))
        spans.store.mover.drain()
        before[0] += 1
    else:
        spans.store.discard(spans.spans[0].states[1][0])
    with pytest.raises(RuntimeError, match="recall comes first"):
        spans.submit([0]).wait(DEADLINE)
    assert [spans.store.page_version(page) for page in spans.spans[0].state_pages] == before
    spans.close()


def test_published_ticket_is_done_before_the_states_are_written(tmp_path: Path) -> None:
    homes = [(SSD, HOST, None), (SSD, HOST, SSD)]
    spans = Spans(tmp_path, homes, faults=slow(0.1), fetch_frames=1)
    for index in range(2):
        done, published = spans.submit_for_both([index])
        published.wait(DEADLINE)
        assert not done.done()
        done.wait(DEADLINE)
    spans.check()
    spans.close()


def test_failed_update_ends_both_tickets(tmp_path: Path) -> None:
    faults = native.FaultPlan(eio=1.0)
    spans = Spans(tmp_path, [(SSD, HOST, HOST)] * 2, faults=faults, blank=True)
    for _ in range(2):
        for ticket in spans.submit_for_both([0]):
            with pytest.raises(IoError):
                ticket.wait(DEADLINE)
    spans.close()


def test_lowest_rank_is_published_first(tmp_path: Path) -> None:
    spans = Spans(tmp_path, [(SSD, HOST, None)] * 8, ring_depth=1, faults=slow(0.01))
    spans.submit(list(range(8))).wait(DEADLINE)
    first = spans.submit([0])  # keeps the only slot while the others queue
    ranks = {1: 5, 2: 1, 3: 5, 4: 0, 5: 9, 6: 1, 7: 2}
    tickets = {index: spans.submit_for_both([index], rank) for index, rank in ranks.items()}
    first.wait(DEADLINE)
    order: list[int] = []
    while len(order) < len(ranks):
        order += [
            index for index in sorted(ranks, key=ranks.__getitem__) if index not in order and tickets[index][0].done()
        ]
    assert order == sorted(ranks, key=lambda index: (ranks[index], index))
    spans.check()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("write_depth", [1, 2])
def test_no_more_spans_are_written_at_once_than_may_be(tmp_path: Path, threads: int, write_depth: int) -> None:
    spans = Spans(
        tmp_path, [(SSD, HOST, HOST)] * 10, threads=threads, ring_depth=4, write_depth=write_depth, faults=slow(0.005)
    )
    everything = list(range(10))
    spans.submit(everything).wait(DEADLINE)
    settled = spans.store.slot_used_count
    most = max(len(span.state_pages) for span in spans.spans)
    for _ in range(3):
        updater_of(spans).expect(everything)
        ticket = spans.submit(everything)
        ticket.wait(DEADLINE)
    assert spans.store.slot_peak_count <= settled + threads * write_depth * most
    spans.check()
    spans.close()


def test_error_in_what_is_read_ahead_travels_to_the_update_that_comes(tmp_path: Path, backend: native.Backend) -> None:
    """Attempts are counted: the masters' first writes pass, and a read or write soon after them fails."""
    met = 0
    for seed in range(40):
        folder = tmp_path / str(seed)
        folder.mkdir()
        faults = native.FaultPlan(seed=seed, eio=0.08)
        spans = Spans(folder, [(SSD, HOST, HOST)] * 3, ring_depth=3, backend=backend, faults=faults, blank=True)
        try:
            spans.submit([0, 1, 2]).wait(DEADLINE)
        except IoError:
            continue
        updater_of(spans).expect([0, 1])
        time.sleep(0.01)
        versions = [spans.store.page_version(page) for page in spans.spans[0].state_pages]
        try:
            spans.submit([0]).wait(DEADLINE)
        except IoError as error:
            assert error.errno == errno.EIO  # noqa: PT017
            met += error.op == "read"
            assert [spans.store.page_version(page) for page in spans.spans[0].state_pages] == versions
        spans.close()
    assert met > 0


def test_given_up_error_is_nobodys(tmp_path: Path) -> None:
    """What failed while it was read ahead and was then recalled fails no update by itself."""
    spans = Spans(tmp_path, [(SSD, HOST, HOST)] * 2, ring_depth=2, keep_files=True)
    spans.submit([0, 1]).wait(DEADLINE)
    for _ in range(20):
        updater_of(spans).expect([0, 1])
        updater_of(spans).recall()
        spans.submit([0, 1]).wait(DEADLINE)
    spans.check()
    spans.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_closing_while_states_are_read_ahead(
    tmp_path: Path, backend: native.Backend, threads: int, pause: float
) -> None:
    spans = Spans(tmp_path, HOMES * 2, threads=threads, ring_depth=3, backend=backend, faults=slow(0.05))
    spans.submit(list(range(10))).wait(DEADLINE)
    updater_of(spans).expect(list(range(10)))
    time.sleep(pause)
    ticket = spans.submit([0, 1])
    start = time.monotonic()
    spans.close()
    gc.collect()
    assert time.monotonic() - start < 5
    assert ticket.done()


def test_expectation_of_a_span_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    spans = Spans(tmp_path, HOMES)
    with pytest.raises(ValueError, match="no span 5"):
        updater_of(spans).expect([0, 5])
    updater_of(spans).expect([])
    updater_of(spans).recall()
    updater_of(spans).submit("x", [(0, [])], hypers_of(native.Rule.ADAMW, 1))[0].wait(DEADLINE)


MOST_EXAMPLES = 4 if "ANGELPTM_SANITIZED" in os.environ else 25
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "expect", "recall", "wait", "fetch", "ahead", "write", "pause"]),
        st.lists(st.integers(0, len(HOMES) - 1), min_size=1, max_size=4, unique=True),
        st.integers(0, 3),
    ),
    min_size=5,
    max_size=40,
)


@pytest.mark.parametrize("threads", [1, 2])
@settings(max_examples=MOST_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, seed=st.integers(0, 1000), ring_depth=st.integers(1, 4), fetch_frames=st.integers(1, 3))
def test_no_interleaving_changes_a_bit(
    tmp_path_factory: pytest.TempPathFactory,
    backend: native.Backend,
    threads: int,
    actions: list[tuple[str, list[int], int]],
    seed: int,
    ring_depth: int,
    fetch_frames: int,
) -> None:
    faults = native.FaultPlan(
        seed=seed, short_transfer=0.2, eintr=0.1, eagain=0.05, delay=0.3, delay_seconds=0.001, reorder=True
    )
    spans = Spans(
        tmp_path_factory.mktemp("spans"),
        HOMES,
        threads=threads,
        ring_depth=ring_depth,
        backend=backend,
        faults=faults,
        seed=seed,
        fetch_frames=fetch_frames,
    )
    assert spans.fetcher is not None
    updater, fetcher, chance = updater_of(spans), spans.fetcher, random.Random(seed)
    under_way: dict[int, native.Ticket] = {}
    fetches: list[tuple[int, np.ndarray, np.ndarray, native.Ticket]] = []
    for index in range(len(HOMES)):  # every parameter is published once
        under_way[index] = spans.submit([index])

    def settle(index: int) -> None:
        for one, found, expected, ticket in [fetch for fetch in fetches if fetch[0] == index]:
            ticket.wait(DEADLINE)
            assert np.array_equal(found, expected), one
        fetches[:] = [fetch for fetch in fetches if fetch[0] != index]
        if index in under_way:
            under_way.pop(index).wait(DEADLINE)

    for action, chosen, rank in actions:
        if action == "submit":
            for index in chosen:
                settle(index)
            ticket = spans.submit(chosen, rank)
            under_way.update(dict.fromkeys(chosen, ticket))
        elif action == "expect":
            updater.expect(chosen)
        elif action == "recall":
            updater.recall()
        elif action == "wait":
            settle(chosen[0])
        elif action == "ahead":
            fetcher.read_ahead([page for index in chosen if (page := spans.spans[index].param) is not None])
        elif action == "write":
            settle(chosen[0])
            updater.recall()
            fetcher.let_go()
            rewrite(spans, spans.spans[chosen[0]], rank)
            spans.submit(chosen[:1]).wait(DEADLINE)
        elif action == "pause":
            time.sleep(chance.random() * 0.003)
        else:
            for index in chosen:
                page = spans.spans[index].param
                if page is None:
                    continue
                expected = spans.spans[index].expected_param.view(np.uint8).copy()
                found = np.full(len(expected), 0xEE, np.uint8)
                ticket = fetcher.fetch(
                    "unit x", [(page, found.ctypes.data)], after=under_way.get(index), urgent=rank == 0
                )
                fetches.append((index, found, expected, ticket))
    for index in range(len(HOMES)):
        settle(index)
    updater.recall()
    fetcher.let_go()
    spans.submit(list(range(len(HOMES)))).wait(DEADLINE)
    spans.check()
    del updater, fetcher
    spans.close()
