"""An updater that cannot go on says so in every ticket, loses no frame and no slot, and always ends."""

from __future__ import annotations

import copy
import errno
import gc
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import angelptm_native as native
import numpy as np
import pytest

from angelptm import kernels
from io_engine.errors import IoError

from ..pages.pool import PAGE, load, make_store
from .harness import DEADLINE, F32, HOST, SSD, Spans, fp32_states, hypers_of

ALONE = [(SSD, HOST, HOST), (SSD, HOST, None), (SSD, HOST, HOST)] * 3


def load_through_faults(spans: Spans, pages: list[int]) -> np.ndarray:
    for _ in range(1000):
        try:
            return np.concatenate(load(spans.store, pages))
        except IoError:
            continue
    raise AssertionError("no read ever succeeded")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("fault", "number"), [("eio", errno.EIO), ("enospc", errno.ENOSPC)])
def test_error_travels_in_the_ticket_of_its_unit_and_in_all_later_ones(
    tmp_path: Path, backend: native.Backend, threads: int, fault: str, number: int
) -> None:
    faults = native.FaultPlan(seed=11, **{fault: 0.01})
    spans = Spans(tmp_path, ALONE, threads=threads, backend=backend, faults=faults, blank=True)
    published = [copy.deepcopy(span) for span in spans.spans]
    errors: list[IoError] = []
    for _ in range(100):
        tickets = [(index, spans.submit([index])) for index in range(len(spans.spans))]
        for index, ticket in tickets:
            try:
                ticket.wait(DEADLINE)
                published[index] = copy.deepcopy(spans.spans[index])
            except IoError as error:
                errors.append(error)
            assert ticket.done()
        if errors:
            break
    assert errors
    for error in errors:
        assert (error.errno, error.path) == (number, str(tmp_path / "0.pages"))
        assert error.op in ("read", "write")
        assert error.bytes > 0
    for index in range(len(spans.spans)):
        with pytest.raises(IoError) as later:
            spans.submit([index]).wait(DEADLINE)
        assert later.value.errno == number
    for span, former in zip(spans.spans, published, strict=True):
        for pages, expected in zip(span.states, former.expected, strict=True):
            assert np.array_equal(load_through_faults(spans, pages), expected.view(np.uint8))
        if span.param is not None:
            assert np.array_equal(load_through_faults(spans, [span.param]), former.expected_param.view(np.uint8))
    written = sum(len(span.state_pages) for span in spans.spans if spans.store.page_version(span.states[0][0]) > 0)
    assert spans.store.slot_used_count == written
    spans.close()


def test_slots_that_run_out_fail_the_unit_and_are_all_given_back(tmp_path: Path) -> None:
    store = make_store(tmp_path, frames=16, slots=(4,))  # three states live there: a second version needs three more
    ids = [store.add_page(native.Home.SSD, PAGE) for _ in range(3)]
    grad, param = (store.add_page(native.Home.HOST, PAGE) for _ in range(2))
    span = native.Span(
        elements=PAGE // 4,
        **fp32_states(PAGE // 4, ids[:1], ids[1:2], ids[2:]),
        grad=[grad],
        param=param,
        device_param=None,
    )
    updater = native.Updater(
        store, threads=1, spans=[span], ring_depth=1, rule=native.Rule.ADAMW, grad_dtype=F32, param_dtype=F32
    )
    work = [(0, [(0, PAGE // 4, 0)])]
    updater.submit("first", work, hypers_of(native.Rule.ADAMW, 1))[0].wait(DEADLINE)
    assert store.slot_used_count == 3
    with pytest.raises(native.TierCapacityError, match="ssd tier"):
        updater.submit("second", work, hypers_of(native.Rule.ADAMW, 2))[0].wait(DEADLINE)
    assert store.slot_used_count == 3
    assert [store.page_version(page) for page in [*ids, param]] == [1] * 4
    del updater
    assert store.host_used_count == 2


def test_closing_ends_what_is_in_flight_and_fails_what_is_queued(tmp_path: Path, backend: native.Backend) -> None:
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.1)
    spans = Spans(tmp_path, ALONE * 3, ring_depth=1, backend=backend, faults=slow, blank=True)
    tickets = [spans.submit([index]) for index in range(len(spans.spans))]
    time.sleep(0.02)
    start = time.monotonic()
    spans.close()
    assert time.monotonic() - start < 5
    assert all(ticket.done() for ticket in tickets)
    closed = 0
    for ticket in tickets:
        try:
            ticket.wait(0)
        except RuntimeError as error:
            assert "closed" in str(error)  # noqa: PT017
            closed += 1
    assert 0 < closed < len(tickets)


def test_other_threads_run_while_an_updater_ends(tmp_path: Path) -> None:
    """It waits for what is in flight, and must not keep the interpreter from others meanwhile."""
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.4)
    spans = Spans(tmp_path, ALONE[:1], faults=slow, blank=True)
    spans.submit([0])
    time.sleep(0.02)
    moments: list[float] = []
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(0.002):
            moments.append(time.monotonic())

    other = threading.Thread(target=tick)
    other.start()
    start = time.monotonic()
    spans.updater = None
    end = time.monotonic()
    ended.set()
    other.join()
    assert end - start > 0.2, "there was something to wait for"
    assert sum(start < moment < end for moment in moments) >= 5


def test_ticket_that_is_not_done_in_time_names_what_was_waited_for(tmp_path: Path) -> None:
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.2)
    spans = Spans(tmp_path, ALONE[:1], faults=slow, blank=True)
    ticket = spans.submit([0])
    with pytest.raises(native.DeadlineError, match="the update of unit x"):
        ticket.wait(0.01)
    with pytest.raises(native.DeadlineError):
        ticket.wait(math.nan)
    assert not ticket.done()
    ticket.wait(math.inf)
    spans.check()


def test_store_outlives_the_updater_that_uses_it(tmp_path: Path) -> None:
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.05)
    spans = Spans(tmp_path, [(SSD, HOST, HOST)] * 3, faults=slow, blank=True)
    tickets = [spans.submit([index]) for index in range(3)]
    updater = spans.updater
    del spans
    gc.collect()
    for ticket in tickets:
        ticket.wait(DEADLINE)
    assert updater is not None


EXIT = """
import sys
from pathlib import Path
import angelptm_native as native
from tests.update.harness import HOST, SSD, Spans

faults = native.FaultPlan(seed=1, **{faults})
spans = Spans(Path(sys.argv[1]), [(SSD, HOST, HOST)] * 20, threads=2, faults=faults, blank=True)
tickets = [spans.submit([index]) for index in range(20)]
print("submitted", flush=True)
{end}
"""


EIO, SLOW = "{'eio': 1.0}", "{'delay': 1.0, 'delay_seconds': 0.3}"


@pytest.mark.unsanitized
@pytest.mark.parametrize(
    ("faults", "end"),
    [(EIO, ""), (SLOW, "raise SystemExit(0)"), (SLOW, "del spans, tickets")],
    ids=["eio", "exit", "del"],
)
def test_process_ends_though_updates_failed_or_are_under_way(tmp_path: Path, faults: str, end: str) -> None:
    code = EXIT.format(faults=faults, end=end)
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "submitted\n", "")


def span_options(store: native.Store) -> dict[str, Any]:
    """A span of 100 elements with AdamW's states, all on the host."""
    ids = [store.add_page(native.Home.HOST, 400) for _ in range(5)]
    return {
        "elements": 100,
        **fp32_states(100, ids[:1], ids[1:2], ids[2:3]),
        "grad": ids[3:4],
        "param": ids[4],
        "device_param": None,
    }


def run_of(start: int, count: int, *, offset: int = 0, scales: int = 0, **formats: Any) -> native.StateRun:
    """With places in all of a span's three state pages."""
    places = {
        kind: native.StatePlace(page, offset if page == 0 else 0, scales)
        for page, kind in enumerate(("master", "exp_avg", "exp_avg_sq"))
    }
    return native.StateRun(start=start, count=count, **places, **formats)


def updater_of(store: native.Store, *spans: dict[str, Any], **options: Any) -> native.Updater:
    given = {"threads": 1, "ring_depth": 1, "rule": native.Rule.ADAMW, "grad_dtype": F32, "param_dtype": F32, **options}
    return native.Updater(store, spans=[native.Span(**span) for span in spans], **given)


@pytest.mark.parametrize("options", [{"threads": 2, "ring_depth": 3}, {"ring_depth": 6}])
def test_pool_that_is_too_small_for_the_ring_keeps_all_its_frames(tmp_path: Path, options: dict[str, Any]) -> None:
    store = make_store(tmp_path, frames=10)
    span = span_options(store)
    for _ in range(3):
        with pytest.raises(native.TierCapacityError, match="ring"):
            updater_of(store, span, **options)
        assert store.host_used_count == 5
    updater_of(store, span, ring_depth=5)
    assert store.host_used_count == 5


@pytest.mark.parametrize(
    "change",
    [
        {"elements": 0},
        {"elements": 101},
        {"elements": PAGE},
        {"states": []},
        {"states": [0, 1]},
        {"runs": []},
        {"runs": [run_of(0, 99)]},
        {"runs": [run_of(0, 101)]},
        {"runs": [run_of(0, 50), run_of(51, 49)]},
        {"runs": [run_of(0, 100, offset=4)]},
        {"runs": [run_of(0, 100, offset=2**32 - 4)]},
        {"runs": [run_of(0, 100, exp_avg_format=native.MomentFormat.INT8, scales=400)]},
        {"grad": []},
        {"param": None},
        {"device_param": 4096},
    ],
)
def test_span_whose_pages_do_not_hold_it_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    store = make_store(tmp_path, frames=8)
    with pytest.raises(ValueError, match="span"):
        updater_of(store, {**span_options(store), **change})
    assert store.host_used_count == 5


def test_split_masters_of_fp32_parameters_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, frames=8)
    runs = [run_of(0, 100, master_format=native.MasterFormat.SPLIT)]
    with pytest.raises(ValueError, match="only masters of bf16 parameters can be split"):
        updater_of(store, {**span_options(store), "runs": runs})
    assert store.host_used_count == 5


@pytest.mark.parametrize("change", [{"threads": 0}, {"ring_depth": 0}, {"threads": 10**6}, {"ring_depth": 10**9}])
def test_updater_without_threads_or_ring_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    store = make_store(tmp_path, frames=8)
    span = span_options(store)
    with pytest.raises(ValueError, match="updater"):
        updater_of(store, span, **change)
    with pytest.raises(IndexError):
        updater_of(store, {**span, "states": [77]})


@pytest.mark.parametrize(
    "work",
    [
        [(1, [(0, 10, 0)])],
        [(0, [(0, 101, 0)])],
        [(0, [(2**63, 2**63, 0)])],
        [(0, [(0, 10, 0), (9, 1, 0)])],
        [(0, [(50, 10, 0), (0, 10, 0)])],
        [(0, [(0, 10, 2)])],
    ],
)
def test_work_outside_its_span_is_refused_before_anything_is_queued(
    tmp_path: Path, work: list[tuple[int, list[tuple[int, int, int]]]]
) -> None:
    store = make_store(tmp_path, frames=8)
    updater = updater_of(store, span_options(store))
    with pytest.raises(ValueError, match=r"span|segments|hyperparameters"):
        updater.submit("x", [*work], hypers_of(native.Rule.ADAMW, 1))
    with pytest.raises(ValueError, match="rule"):
        updater.submit("x", [(0, [(0, 100, 0)])], [kernels.lion_hyper(0.1)])
    updater.submit("x", [(0, [(0, 100, 0)])], hypers_of(native.Rule.ADAMW, 1))[0].wait(DEADLINE)
    assert updater.utilisation()["spans"] == 1


def test_span_is_not_updated_twice_at_a_time(tmp_path: Path) -> None:
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.1)
    spans = Spans(tmp_path, ALONE[:2], threads=2, faults=slow, blank=True)
    updater, hypers = spans.updater, hypers_of(native.Rule.ADAMW, 1)
    assert updater is not None
    ticket = updater.submit("x", [(0, [])], hypers)[0]
    for work in ([(0, [])], [(1, []), (0, [])], [(1, []), (1, [])]):
        with pytest.raises(RuntimeError, match="before its last update is done"):
            updater.submit("x", work, hypers)
    ticket.wait(DEADLINE)
    for _ in range(2):
        updater.submit("x", [(0, []), (1, [])], hypers)[0].wait(DEADLINE)
