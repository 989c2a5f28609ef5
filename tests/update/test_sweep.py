"""Gradients that wait in accumulators are applied once each, with the bits of the same kernel on plain arrays, by
threads that nobody waits for; parameters that are read while others are published stay what they are."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest

from angelptm import kernels
from io_engine.errors import IoError

from ..pages.pool import make_store, view
from .harness import BF16, DEADLINE, F32, HOST, SSD, fp32_states
from .swept import ADAMW, LION, MEAN, SGD, SUM, Swept, changed, on_host, sweep_options

ORDER = native.SweepOrder
Homes = list[tuple[native.Home, native.Home, native.Home | None]]
HOMES: dict[str, Homes] = {
    "host": on_host(5),
    "ssd": [(SSD, HOST, HOST)] * 5,
    "mixed": [(HOST, HOST, HOST), (SSD, HOST, HOST)] * 4,
}
RULES = {"adamw": ADAMW, "sgd": SGD, "lion": LION}


def hypers_of(rule: native.Rule, step: int, *, scales: tuple[float, float] = (1.0, 1.0)) -> list[native.Hyper]:
    """Those of two parameter groups; the learning rate of each step is its own."""
    lr = 1e-2 / step
    if rule == ADAMW:
        found = [
            kernels.adamw_hyper(lr, weight_decay=0.1, step=step),
            kernels.adamw_hyper(lr / 3, betas=(0.8, 0.99), weight_decay=0.02 * step, step=step),
        ]
    elif rule == SGD:
        found = [
            kernels.sgd_hyper(lr, 0.9, dampening=0.1, weight_decay=0.01, step=step),
            kernels.sgd_hyper(lr / 10, 0.5, nesterov=True, step=step),
        ]
    else:
        found = [kernels.lion_hyper(lr / 10), kernels.lion_hyper(lr / 100, weight_decay=0.1 * step)]
    return [changed(hyper, grad_scale=scale) for hyper, scale in zip(found, scales)]


@pytest.mark.parametrize("homes", HOMES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("from_step", [False, True], ids=["opened", "from_step"])
@pytest.mark.parametrize(
    ("threads", "ring_depth", "param_dtype"), [(1, 1, F32), (3, 2, BF16)], ids=["1-thread-fp32", "3-threads-bf16"]
)
def test_one_gradient_at_a_time_gives_the_bits_of_the_kernel(
    tmp_path: Path,
    backend: native.Backend,
    homes: str,
    rule: str,
    from_step: bool,
    threads: int,
    ring_depth: int,
    param_dtype: native.DType,
) -> None:
    """Would catch hyperparameters that are changed though nothing is collapsed, segments that get another's, gradient
    frames that are mixed up in the exchange, and elements in no segment that are touched."""
    spans = Swept(
        tmp_path,
        HOMES[homes],
        rule=RULES[rule],
        threads=threads,
        ring_depth=ring_depth,
        param_dtype=param_dtype,
        backend=backend,
        spare_frames=1,
    )
    for step in range(1, 5):
        spans.give(spans.all, hypers_of(RULES[rule], step, scales=(0.5, 1.0)), from_step=from_step)
        spans.wait()
        spans.settle(spans.all)
    spans.check()
    assert spans.sweep.produced(spans.all) == spans.sweep.published(spans.all) == [4] * len(spans.spans)
    spans.close()


@pytest.mark.parametrize("combine", [MEAN, SUM], ids=["mean", "sum"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["opened", "from_step", "both"])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_that_wait_together_are_applied_as_one_update(
    tmp_path: Path, combine: native.Combine, rule: str, kind: str, threads: int
) -> None:
    """Two to seven gradients of each span in segments of their own, so that elements have none, some or all of them;
    each with another learning rate, and those of a whole step with clip factors of their own. Would catch a sum that
    forgets a scale, elements with one gradient that are treated as those with several, and hyperparameters of another
    gradient or of too many."""
    spans = Swept(
        tmp_path,
        [*on_host(5), (SSD, HOST, HOST), *on_host(threads)],
        rule=RULES[rule],
        combine=combine,
        threads=threads,
        ring_depth=1,
        seed=5,
    )
    blockers, others = spans.all[-threads:], spans.all[:-threads]
    step = 0
    for rounds in (2, 4, 7):
        step += 1
        with spans.busy(blockers, hypers_of(RULES[rule], step)):
            before = spans.sweep.published(others)
            for index in range(rounds):
                step += 1
                from_step = kind == "from_step" or (kind == "both" and index % 2 == 0)
                # What goes into a sum that is opened has a scale of 1, as the sum has then.
                scales = (0.5 + 0.125 * index, 1 / (index + 3)) if from_step or index == 0 else (1.0, 1.0)
                for span in others:
                    spans.give([span], hypers_of(RULES[rule], step, scales=scales), from_step=from_step)
            assert spans.sweep.published(others) == before, "they waited together"
        spans.wait()
        spans.settle(others)
    spans.check()
    spans.close()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 5])
def test_averages_are_those_of_as_many_steps_with_the_mean(tmp_path: Path, rule: str, steps: int) -> None:
    """Against the kernel, step by step and without what is collapsed. Would catch a power or a geometric sum that is
    one off, and sizes of step that do not add up."""
    spans = Swept(tmp_path, on_host(2), rule=RULES[rule], ring_depth=1)
    target, whole = spans.spans[0], [(0, spans.spans[0].elements, 0)]
    first = hypers_of(RULES[rule], 1)
    spans.give([0], first, from_step=True, segments=whole)  # averages of zero would hide how much of them is kept
    spans.wait()
    spans.settle([0])
    plain = [array.copy() for array in target.expected] + [None, None]
    hypers = [changed(hypers_of(RULES[rule], step)[0], weight_decay=0.0) for step in range(2, 2 + steps)]
    total = np.zeros(target.elements, np.float32)
    with spans.busy([1], first):
        for hyper in hypers:
            spans.give([0], [hyper], from_step=False, segments=whole)
            total += spans.boxes[0].given[-1].grad
    spans.wait()
    mean = total / np.float32(steps)
    for hyper in hypers:
        kernels.step(hyper, *plain[:3], mean, target.expected_param.copy())
    for pages, expected in list(zip(target.states, plain))[1 : 1 + native.moment_count(RULES[rule])]:
        assert expected is not None
        np.testing.assert_allclose(spans.read(pages, F32), expected, rtol=2e-4, atol=1e-6)
    if rule == "lion":  # whose steps have one size each
        moved = np.abs(spans.read(target.states[0], F32) - target.expected[0])
        stride = min(1, 4 / steps) * sum(hyper.lr for hyper in hypers)  # of four steps at most
        np.testing.assert_allclose(moved, stride, rtol=1e-3)


def test_what_waits_is_told_to_who_opens_it(tmp_path: Path) -> None:
    """Would catch ranges of elements that have no gradient, to which something stale would be added."""
    spans = Swept(tmp_path, on_host(2), rule=SGD, ring_depth=1)
    hypers = hypers_of(SGD, 2)
    with spans.busy([1], hypers):
        assert spans.sweep.open([0]) == [[]]
        spans.sweep.put_back([0])
        spans.give([0], hypers, from_step=False, segments=[(3, 5, 0), (20, 10, 1)])
        spans.give([0], hypers, from_step=True, segments=[(6, 4, 1)])
        (ranges,) = spans.sweep.open([0])
        there = np.zeros(40, bool)
        for start, count in ranges:
            assert not there[start : start + count].any()
            there[start : start + count] = True
        assert np.flatnonzero(there).tolist() == [*range(3, 10), *range(20, 30)]
        spans.sweep.put_back([0])
    spans.wait()
    spans.settle([0])
    spans.check()
    spans.close()


@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
def test_box_that_is_put_back_is_what_it_was(tmp_path: Path, full: bool) -> None:
    """Would catch a gradient that was begun and given up, and is applied all the same, and one that waited and is
    lost."""
    spans = Swept(tmp_path, on_host(2), rule=ADAMW, ring_depth=1)
    with spans.busy([1], hypers_of(ADAMW, 1)):
        if full:
            spans.give([0], hypers_of(ADAMW, 2), from_step=False)
        ranges = spans.sweep.open([0])[0]
        assert bool(ranges) == full
        if not full:
            spans.put(spans.spans[0].grad, np.full(spans.spans[0].elements, 1e30, np.float32))
        spans.sweep.put_back([0])
        assert spans.sweep.open([0]) == [ranges]
        spans.sweep.put_back([0])
    spans.wait()
    assert spans.sweep.published([0]) == [int(full)]
    assert spans.sweep.utilisation()["spans"] == 1 + full, "no update without a gradient"
    spans.give([0], hypers_of(ADAMW, 3), from_step=False) if not full else None
    spans.wait()
    spans.settle([0])
    spans.check()
    spans.close()


@pytest.mark.parametrize("most_behind", [0, 1, 3])
def test_published_parameters_lack_no_more_gradients_than_they_may(tmp_path: Path, most_behind: int) -> None:
    """Would catch a bound that is one off, or that looks at some of the spans, and a gradient that is counted as
    published before it is counted as produced."""
    spans = Swept(tmp_path, HOMES["mixed"], rule=SGD, threads=2, spare_frames=2)
    stop, ahead = threading.Event(), list[tuple[int, int]]()

    def watch() -> None:
        while not stop.is_set():
            published = spans.sweep.published(spans.all)
            produced = spans.sweep.produced(spans.all)
            ahead.extend(pair for pair in zip(published, produced) if pair[0] > pair[1])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for step in range(1, 60):
            chosen = spans.random.sample(spans.all, 5)
            spans.sweep.wait_published(chosen, most_behind, "the bound")
            published = spans.sweep.published(chosen)
            assert all(made - there <= most_behind for made, there in zip(spans.sweep.produced(chosen), published))
            spans.give(chosen, hypers_of(SGD, step), from_step=True)
        spans.wait()
    finally:
        stop.set()
        watcher.join()
    assert ahead == []
    assert spans.sweep.published(spans.all) == spans.sweep.produced(spans.all)
    spans.close()


@pytest.mark.parametrize("most_behind", [0, 1, 2])
def test_bound_is_waited_for_as_long_as_it_is_broken(tmp_path: Path, most_behind: int) -> None:
    """Nothing is published while the thread is busy, so that a wait that returns too early or too late is seen."""
    spans = Swept(tmp_path, on_host(3), rule=SGD, ring_depth=1)
    with spans.busy([2], hypers_of(SGD, 1)):
        for _ in range(most_behind):
            spans.give([0], hypers_of(SGD, 2), from_step=True)
            spans.sweep.wait_published([0, 1], most_behind, "the bound")
        spans.give([0], hypers_of(SGD, 2), from_step=True)
        spans.sweep.wait_published([1], most_behind, "the bound")
        spans.sweep.wait_published([0, 1], most_behind + 1, "the bound")
        waiter = threading.Thread(target=spans.sweep.wait_published, args=([1, 0], most_behind, "the bound"))
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive()
    waiter.join(DEADLINE)
    assert not waiter.is_alive()
    spans.close()


def test_whoever_waits_a_while_is_told_whether_all_is_published(tmp_path: Path) -> None:
    spans = Swept(tmp_path, on_host(3), rule=SGD, ring_depth=1)
    with spans.busy([2], hypers_of(SGD, 1)):
        spans.give([0], hypers_of(SGD, 2), from_step=True)
        start = time.monotonic()
        assert not spans.sweep.wait_all_published([1, 0], 0.05)
        assert 0.05 <= time.monotonic() - start < DEADLINE
        assert not spans.sweep.wait_all_published([0], 0.0)
        assert spans.sweep.wait_all_published([1], 0.0)
    assert spans.sweep.wait_all_published([1, 0], DEADLINE)
    spans.close()


WAITS: dict[str, Callable[[native.Updater], None]] = {
    "open_empty": lambda updater: updater.open_empty([1, 0], "what is named"),
    "wait_published": lambda updater: updater.wait_published([0], 0, "what is named"),
    "wait_applied": lambda updater: updater.wait_applied([1, 0], [1, 1], "what is named"),
}


@pytest.mark.parametrize("wait", WAITS)
def test_wait_that_lasts_too_long_names_what_it_waits_for(tmp_path: Path, wait: str) -> None:
    """And leaves everything as it was: the boxes that it opened before are closed again."""
    spans = Swept(tmp_path, on_host(3), rule=SGD, ring_depth=1, deadline_seconds=1.0)
    spans.give([1], hypers_of(SGD, 1), from_step=True)
    spans.wait()
    spans.settle([1])
    with spans.busy([2], hypers_of(SGD, 1)):
        spans.give([0], hypers_of(SGD, 2), from_step=True)
        spans.sweep.open([0])  # from here on nobody takes what is in it
    start = time.monotonic()
    with pytest.raises(native.DeadlineError, match=r"^waited 1\.0+ s for what is named$"):
        WAITS[wait](spans.sweep)
    assert 0.9 < time.monotonic() - start < 10
    spans.sweep.put_back([0])
    WAITS[wait](spans.sweep)
    spans.sweep.open([2])
    if wait == "open_empty":
        spans.sweep.put_back([0, 1])
    spans.sweep.put_back([2])
    spans.wait()
    spans.settle([0])
    spans.check()
    spans.close()


def test_box_is_opened_when_it_is_empty_and_not_before(tmp_path: Path) -> None:
    """Would catch a box that is taken with gradients in it, which a gradient that is dropped would take along."""
    spans = Swept(tmp_path, on_host(2), rule=SGD, ring_depth=1)
    with spans.busy([1], hypers_of(SGD, 1)):
        spans.give([0], hypers_of(SGD, 2), from_step=True)
        waiter = threading.Thread(target=spans.sweep.open_empty, args=([0], "the box to be empty"))
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive()
    waiter.join(DEADLINE)
    assert not waiter.is_alive()
    spans.sweep.put_back([0])
    assert spans.sweep.open([0]) == [[]]
    spans.sweep.put_back([0])
    spans.wait()
    spans.settle([0])
    spans.check()
    spans.close()


ORDERS = {"round_robin": ORDER.ROUND_ROBIN, "most_gradients": ORDER.MOST_GRADIENTS, "next_needed": ORDER.NEXT_NEEDED}
# Spans 0 to 4 have gradients, and the thread comes from span 2, without any.
COUNTS = (2, 3, 0, 1, 3)
RANKS = (40, 10, 99, 20, 30)
POSITION = 15  # past the rank of span 1, which is the last one then
EXPECTED = {"round_robin": [3, 4, 0, 1], "most_gradients": [4, 1, 0, 3], "next_needed": [3, 4, 0, 1]}


@pytest.mark.parametrize("order", ORDERS)
def test_spans_are_taken_up_in_their_order(tmp_path: Path, order: str) -> None:
    """One thread that is stopped at each publication. Would catch an order that is not followed, and a tie or a
    position that is resolved the wrong way round."""
    spans = Swept(tmp_path, on_host(5), rule=SGD, ring_depth=1, order=ORDERS[order], ranks=RANKS)
    frames = [frame for frame, _ in spans.store.hold([spans.param_page(index) for index in spans.all])]
    spans.give([2], hypers_of(SGD, 1), from_step=True)
    spans.sweep.wait_published([2], 0, "the thread to be busy")
    for span, count in enumerate(COUNTS):
        for _ in range(count):
            spans.give([span], hypers_of(SGD, 2), from_step=True)
    spans.sweep.set_position(POSITION)
    found, last = [], 2
    before = spans.sweep.published(spans.all)
    for _ in EXPECTED[order]:
        spans.store.release_held([frames[last]])
        deadline = time.monotonic() + DEADLINE
        while (now := spans.sweep.published(spans.all)) == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        (last,) = (span for span in spans.all if now[span] != before[span])
        assert now[last] - before[last] == COUNTS[last], "all that waits is taken at once"
        found.append(last)
        before = now
    spans.store.release_held([frames[last]])
    spans.wait()
    assert found == EXPECTED[order]
    spans.close()


@pytest.mark.parametrize("order", ORDERS)
def test_no_span_waits_for_good_where_gradients_come_faster_than_updates(tmp_path: Path, order: str) -> None:
    """One thread with several spans in its ring, stopped at each publication until every span has a gradient again.
    Would catch a span that was taken up and is passed by whenever another one is ready too."""
    spans = Swept(tmp_path, on_host(4), rule=SGD, ring_depth=3, order=ORDERS[order], ranks=(1, 2, 3, 4))
    frames = [frame for frame, _ in spans.store.hold([spans.param_page(index) for index in spans.all])]
    before, rounds = spans.sweep.published(spans.all), 12
    for step in range(1, rounds + 1):
        spans.give(spans.all, hypers_of(SGD, step), from_step=True)
        deadline = time.monotonic() + DEADLINE
        while (now := spans.sweep.published(spans.all)) == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        (last,) = (span for span in spans.all if now[span] != before[span])
        before = now
        if step < rounds:
            ((newest, _),) = spans.store.hold([spans.param_page(last)])
            spans.store.release_held([frames[last]])
            frames[last] = newest
    assert min(before) > 0, before
    spans.store.release_held(frames)
    spans.wait()
    assert spans.sweep.published(spans.all) == [rounds] * 4
    spans.close()


def test_held_parameters_stay_while_others_are_published(tmp_path: Path) -> None:
    """One frame is read for the whole time, and of the spare ones one is enough. Would catch a frame that is written
    to while it is read, and one that is lost when it is read no more."""
    spans = Swept(tmp_path, on_host(2), rule=SGD, threads=2, spare_frames=1)
    ((frame, version),) = spans.store.hold([spans.param_page(0)])
    address = spans.store.mover.address(frame)
    size = spans.spans[0].elements * 4
    before = view(address, size).copy()
    for step in range(1, 20):
        spans.give(spans.all, hypers_of(SGD, step), from_step=True)
        spans.wait()
        ((newest, now),) = spans.store.hold([spans.param_page(0)])
        assert newest != frame
        assert now == version + step
        spans.settle(spans.all)
        assert np.array_equal(
            view(spans.store.mover.address(newest), size), spans.spans[0].expected_param.view(np.uint8)
        )
        spans.store.release_held([newest])
        assert np.array_equal(view(address, size), before)
    spans.store.release_held([frame])
    spans.check()
    spans.close()


@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
def test_box_is_in_one_hand_at_a_time(tmp_path: Path, full: bool) -> None:
    """Would catch two gradients that are written to the same pages, and one out of pages that a thread may take."""
    spans = Swept(tmp_path, on_host(2), rule=SGD, ring_depth=1)
    hypers, whole = hypers_of(SGD, 1), [(0, 10, 0)]
    with spans.busy([1], hypers):
        if full:
            spans.give([0], hypers, from_step=True)
        spans.sweep.open([0])
        with pytest.raises(RuntimeError, match="span 0: its box is held already"):
            spans.sweep.open([0])
        with pytest.raises(RuntimeError, match="span 0: its box is held already"):
            spans.sweep.hand_over([(0, whole)], hypers, from_step=True)
        spans.sweep.put_back([0])
        produced = spans.sweep.produced([0])
        with pytest.raises(RuntimeError, match=r"span 0: .* not held"):
            spans.sweep.hand_over([(0, whole)], hypers, from_step=False)
        assert spans.sweep.produced([0]) == produced, "what was refused is in no box and would be waited for"
        spans.sweep.open([0])
        spans.sweep.put_back([0])


def test_boxes_are_opened_all_or_none(tmp_path: Path) -> None:
    """A box that an open which failed had left held would never be taken, and a drain would wait for it."""
    spans = Swept(tmp_path, on_host(2), rule=SGD, ring_depth=1)
    hypers = hypers_of(SGD, 1)
    with pytest.raises(RuntimeError, match="span 0: its box is held already"):
        spans.sweep.open([0, 1, 0])
    with pytest.raises(ValueError, match="no span 2"):
        spans.sweep.open([0, 1, 2])
    for span in (0, 1):
        spans.give([span], hypers, from_step=True)
    spans.sweep.wait_applied([0, 1], [1, 1], "the updates")
    spans.close()


def test_spans_that_are_not_there_are_refused(tmp_path: Path) -> None:
    spans = Swept(tmp_path, on_host(2), rule=SGD, ring_depth=1)
    sweep = spans.sweep
    calls: list[Callable[[], object]] = [
        lambda: sweep.open([2]),
        lambda: sweep.open_empty([0, 2], "an empty box"),
        lambda: sweep.put_back([2]),
        lambda: sweep.wait_published([2], 0, "parameters"),
        lambda: sweep.wait_applied([2], [0], "an update"),
        lambda: sweep.are_applied([2], [0]),
        lambda: sweep.produced([2]),
        lambda: sweep.published([2]),
        lambda: sweep.used([2], [0]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no span 2"):
            call()
    with pytest.raises(ValueError, match="one count for each span"):
        sweep.are_applied([0, 1], [0])
    sweep.open_empty([0], "an empty box")  # the refused call has left nothing held
    sweep.put_back([0])


def test_sums_of_different_scales_are_refused(tmp_path: Path) -> None:
    """They were added up before anybody knew: the sum is of neither scale."""
    spans = Swept(tmp_path, on_host(2), rule=SGD, ring_depth=1)
    hypers = hypers_of(SGD, 1, scales=(0.5, 0.25))
    with spans.busy([1], hypers):
        spans.give([0], hypers, from_step=False, segments=[(0, 10, 0)])
        with pytest.raises(RuntimeError, match="different scales"):
            spans.give([0], hypers, from_step=False, segments=[(5, 10, 1)])
        spans.sweep.put_back([0])


ONE_SPARE = sweep_options(spare_frames=1)
Work = list[tuple[int, list[tuple[int, int, int]]]]


@pytest.mark.parametrize(
    ("work", "from_step", "what"),
    [
        ([(0, [])], True, "has elements"),
        ([(0, [])], False, "has elements"),
        ([(0, [(0, 10, 0), (10, 0, 0)])], True, "has elements"),
        ([(1, [(0, 10, 0)])], True, "span 1 has no pages for a step's gradient"),
        ([(2, [(0, 10, 0)])], True, "no span 2"),
        ([(0, [(0, 101, 0)])], True, "within their span"),
        ([(0, [(0, 10, 0), (9, 1, 0)])], True, "do not overlap"),
        ([(0, [(0, 10, 1)])], True, "no hyperparameters 1"),
    ],
)
def test_gradient_that_its_span_cannot_have_is_refused_before_anything_is_done(
    tmp_path: Path, work: Work, from_step: bool, what: str
) -> None:
    store = make_store(tmp_path, frames=20)
    updater = updater_of(store, steps=[True, False])
    hyper = kernels.sgd_hyper(0.5, step=1)
    with pytest.raises(ValueError, match=what):
        updater.hand_over([(0, [(0, 100, 0)]), *work], [hyper], from_step)
    with pytest.raises(ValueError, match="another rule"):
        updater.hand_over([(0, [(0, 100, 0)])], [kernels.lion_hyper(0.1)], True)
    assert updater.produced([0, 1]) == [0, 0]
    updater.hand_over([(0, [(0, 100, 0)])], [hyper], True)
    updater.wait_applied([0], [1], "the update")


def updater_of(
    store: native.Store, *, steps: list[bool], sweep: native.SweepOptions | None = ONE_SPARE
) -> native.Updater:
    """Spans of 100 elements on the host; ``steps``: whether each has pages for a step's gradient."""
    pages = [[store.add_page(HOST, 400) for _ in range(5)] for _ in steps]
    spans = [
        native.Span(
            elements=100,
            **fp32_states(100, ids[:1], ids[1:2], []),
            grad=ids[2:3],
            param=ids[3],
            device_param=None,
            step_grad=ids[4:5] if step else [],
        )
        for ids, step in zip(pages, steps)
    ]
    return native.Updater(
        store,
        threads=1,
        spans=spans,
        ring_depth=1,
        rule=SGD,
        grad_dtype=F32,
        param_dtype=F32,
        sweep=sweep,
    )


def test_gradients_are_submitted_or_swept_and_never_both(tmp_path: Path) -> None:
    store = make_store(tmp_path, frames=30)
    hyper = kernels.sgd_hyper(0.5, step=1)
    swept = updater_of(store, steps=[True])
    with pytest.raises(RuntimeError, match="accumulators"):
        swept.submit("x", [(0, [(0, 100, 0)])], [hyper])
    submitted = updater_of(store, steps=[True], sweep=None)
    for call in (
        lambda: submitted.open([0]),
        lambda: submitted.open_empty([0], "x"),
        lambda: submitted.put_back([0]),
        lambda: submitted.hand_over([(0, [(0, 100, 0)])], [hyper], True),
        lambda: submitted.wait_published([0], 0, "x"),
        lambda: submitted.wait_applied([0], [0], "x"),
        lambda: submitted.produced([0]),
        lambda: submitted.set_position(0),
    ):
        with pytest.raises(RuntimeError, match="submitted"):
            call()


@pytest.mark.parametrize(
    ("homes", "dtype"),
    [((HOST, SSD, HOST), F32), ((HOST, HOST, SSD), F32), ((HOST, HOST, None), F32), ((HOST, HOST, HOST), BF16)],
    ids=["gradients on the SSD", "parameters on the SSD", "parameters on the device", "gradients in bf16"],
)
def test_spans_whose_frames_cannot_be_exchanged_are_refused(
    tmp_path: Path, homes: tuple[native.Home, native.Home, native.Home | None], dtype: native.DType
) -> None:
    with pytest.raises(ValueError, match=r"sweep live in the host tier|added up are fp32"):
        Swept(tmp_path, [homes], rule=SGD, grad_dtype=dtype)


def test_too_few_frames_for_spare_ones_are_said_and_none_is_lost(tmp_path: Path) -> None:
    store = make_store(tmp_path, frames=12)
    for _ in range(3):
        with pytest.raises(native.TierCapacityError, match="host tier"):
            updater_of(store, steps=[], sweep=sweep_options(spare_frames=13))
        assert store.host_used_count == 0
    updater_of(store, steps=[True], sweep=sweep_options(spare_frames=5))
    assert store.host_used_count == 5, "the ring needs two"


AFTER: dict[str, Callable[[native.Updater], object]] = {
    "open": lambda updater: updater.open([1]),
    "open_empty": lambda updater: updater.open_empty([1], "x"),
    "hand_over": lambda updater: updater.hand_over([(1, [(0, 1, 0)])], hypers_of(ADAMW, 1), True),
    "wait_published": lambda updater: updater.wait_published([1], 100, "x"),
    "wait_applied": lambda updater: updater.wait_applied([1], [0], "x"),
}


def error_of(call: Callable[[native.Updater], object], updater: native.Updater) -> IoError:
    """Without its traceback, which would keep the updater."""
    try:
        call(updater)
    except IoError as error:
        return error.with_traceback(None)
    raise AssertionError("nothing was raised")


def first_error(spans: Swept) -> IoError:
    for _ in range(1000):
        try:
            spans.give(spans.all, hypers_of(ADAMW, 1), from_step=True)
            spans.wait()
        except IoError as error:
            return error.with_traceback(None)
    raise AssertionError("no update ever failed")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", ["read", "write"])
def test_update_that_fails_is_told_to_all_who_call_from_then_on(
    tmp_path: Path, backend: native.Backend, threads: int, op: str
) -> None:
    """And to who is waiting: nobody waits for the deadline. Would catch a failed flight that nobody hears of."""
    for seed in range(40):
        folder = tmp_path / str(seed)
        folder.mkdir()
        spans = Swept(
            folder,
            [(SSD, HOST, HOST)] * 4,
            threads=threads,
            spare_frames=1,
            backend=backend,
            faults=native.FaultPlan(seed=seed, eio=0.05),
            blank=True,
            deadline_seconds=60,
        )
        start = time.monotonic()
        error = first_error(spans)
        for call in AFTER.values():
            assert str(error_of(call, spans.sweep)) == str(error)
        spans.sweep.put_back([])
        assert time.monotonic() - start < 30
        spans.close()
        assert (error.errno, error.path) == (errno.EIO, str(folder / "0.pages"))
        if error.op == op:
            return
    raise AssertionError(f"no {op} ever failed")


def test_parameters_that_are_read_for_too_long_fail_the_update_and_lose_no_frame(tmp_path: Path) -> None:
    """Would catch a frame that is the page's and the ring's at once: when the updater is closed it would be free, and
    the next page's content would be written over the parameters."""
    spans = Swept(tmp_path, on_host(2), rule=SGD, spare_frames=0, deadline_seconds=0.2)
    ((frame, _),) = spans.store.hold([spans.param_page(0)])
    spans.give([0], hypers_of(SGD, 1), from_step=True)
    with pytest.raises(native.DeadlineError, match="nobody reads"):  # noqa: PT012
        for _ in range(1000):
            spans.sweep.open([1])
            spans.sweep.put_back([1])
            time.sleep(0.01)
    spans.store.release_held([frame])
    spans.close()


def test_closing_leaves_what_waits_and_loses_no_frame(tmp_path: Path) -> None:
    spans = Swept(tmp_path, on_host(3), rule=SGD, ring_depth=1)
    with spans.busy([2], hypers_of(SGD, 1)):
        spans.give([0], hypers_of(SGD, 1), from_step=True)
        spans.sweep.open([0, 1])
    spans.close()


def test_first_gradients_of_momentum_are_all_in_it(tmp_path: Path) -> None:
    """Where several came before the first update, whose momentum starts as the gradient."""
    spans = Swept(tmp_path, on_host(2), rule=SGD, ring_depth=1)
    target = spans.spans[0]
    hypers = [kernels.sgd_hyper(1e-2, 0.9, 0.2, step=step) for step in (1, 2, 3)]
    grad = spans.new_gradient(0)
    with spans.busy([1], hypers[:1] * 2):
        for hyper in hypers:
            spans.give([0], [hyper], from_step=False, segments=[(0, target.elements, 0)], grad=grad)
    spans.wait()
    master, momentum = target.expected[0].copy(), np.zeros(target.elements, np.float32)
    for hyper in hypers:
        kernels.step(hyper, master, momentum, None, grad, target.expected_param.copy())
    np.testing.assert_allclose(spans.read(target.states[1], F32), momentum, rtol=1e-5)
