"""The updater gives the bits of the same kernel on plain arrays, wherever the pages live."""

from __future__ import annotations

from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest

from angelptm import kernels

from .harness import BF16, DEADLINE, F32, HOST, SSD, Spans

Homes = list[tuple[native.Home, native.Home, native.Home | None]]
HOMES: dict[str, Homes] = {
    "host": [(HOST, HOST, HOST)] * 5,
    "ssd": [(SSD, SSD, SSD)] * 5,
    "device": [(SSD, SSD, None), (HOST, HOST, None)] * 3,
    "mixed": [(HOST, SSD, HOST), (SSD, HOST, HOST), (SSD, SSD, HOST), (HOST, HOST, SSD), (SSD, HOST, None)] * 2,
}
SURVIVABLE = native.FaultPlan(
    seed=7, short_transfer=0.4, eintr=0.2, eagain=0.05, delay=0.1, delay_seconds=0.001, reorder=True
)


def train(spans: Spans, steps: int) -> None:
    """Units of two spans each, all under way at once; one step waits for the last."""
    units = [list(range(first, min(first + 2, len(spans.spans)))) for first in range(0, len(spans.spans), 2)]
    for _ in range(steps):
        for ticket in [spans.submit(unit) for unit in units]:
            ticket.wait(DEADLINE)
            assert ticket.done()


@pytest.mark.parametrize("homes", HOMES)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (BF16, BF16)], ids=["fp32", "mixed", "bf16"])
def test_updates_are_bit_equal_to_the_kernel_on_arrays(
    tmp_path: Path, backend: native.Backend, homes: str, dtypes: tuple[native.DType, native.DType]
) -> None:
    spans = Spans(tmp_path, HOMES[homes], grad_dtype=dtypes[0], param_dtype=dtypes[1], backend=backend)
    train(spans, 3)
    spans.check()
    spans.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ring_depth", [1, 2, 3, 4])
@pytest.mark.parametrize("faults", [None, SURVIVABLE], ids=["plain", "faults"])
def test_threads_ring_and_survivable_faults_change_no_bit(
    tmp_path: Path, backend: native.Backend, threads: int, ring_depth: int, faults: native.FaultPlan | None
) -> None:
    spans = Spans(
        tmp_path,
        HOMES["mixed"],
        threads=threads,
        ring_depth=ring_depth,
        backend=backend,
        faults=faults,
        param_dtype=BF16,
    )
    train(spans, 3)
    spans.check()
    assert spans.updater is not None
    facts = spans.updater.utilisation()
    assert facts["spans"] == 3 * len(spans.spans)
    assert facts["failed_count"] == 0
    assert (facts["resumed_count"] > 0, facts["retried_count"] > 0) == (faults is not None, faults is not None)
    spans.close()


@pytest.mark.parametrize("rule", [native.Rule.SGD, native.Rule.LION])
def test_rules_with_one_moment_keep_one(tmp_path: Path, rule: native.Rule) -> None:
    spans = Spans(tmp_path, HOMES["ssd"] + HOMES["host"], rule=rule)
    train(spans, 3)
    spans.check()
    spans.close()


def test_gradient_slots_are_given_back_once_taken(tmp_path: Path) -> None:
    spans = Spans(tmp_path, HOMES["ssd"])
    train(spans, 1)
    for span in spans.spans:
        assert not spans.read(span.grad, F32).any()
    assert spans.store.slot_used_count == sum(len(span.state_pages) + 1 for span in spans.spans)


def test_elements_in_no_segment_keep_their_state_and_are_published(tmp_path: Path) -> None:
    spans = Spans(tmp_path, [(SSD, SSD, SSD)], param_dtype=BF16)
    span = spans.spans[0]
    before = span.expected[0].copy()
    span.segments = [(100, 50, 0)]
    train(spans, 1)
    spans.check()
    changed = np.flatnonzero(spans.read(span.states[0], F32) != before)
    assert set(changed) == set(range(100, 150))
    assert np.array_equal(spans.read([span.param or 0], BF16), span.expected_param)
    assert span.expected_param.any()


def test_pages_count_one_version_for_each_update(tmp_path: Path) -> None:
    spans = Spans(tmp_path, [(SSD, SSD, HOST), (HOST, HOST, SSD)])
    pages = [page for span in spans.spans for page in [*span.state_pages, span.param or 0]]
    before = [spans.store.page_version(page) for page in pages]
    train(spans, 4)
    assert [spans.store.page_version(page) for page in pages] == [version + 4 for version in before]


def test_unit_without_spans_is_done_at_once(tmp_path: Path) -> None:
    spans = Spans(tmp_path, HOMES["host"])
    assert spans.updater is not None
    assert all(ticket.done() for ticket in spans.updater.submit("nothing", [], [kernels.adamw_hyper(0.1, step=1)]))
