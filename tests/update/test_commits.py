"""The updater beside commits: no slot that one pins is written to, and nothing that a crash tore is computed with."""

from __future__ import annotations

import os
from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest

from angelptm.errors import CorruptPageError

from ..pages.pool import PAGE, load
from .harness import DEADLINE, SSD, Spans

ALL_ON_SSD = [(SSD, SSD, SSD)] * 2


def in_slots(spans: Spans, pages: list[int]) -> list[tuple[int, int]]:
    """The slots of the pages' content; one reference on each is the caller's now."""
    captured = spans.store.capture(pages)
    assert all(state == native.Captured.IN_SLOT for state, *_ in captured)
    return [(file, slot) for _, file, slot, _, _ in captured]


def contents(folder: Path, slots: list[tuple[int, int]]) -> list[bytes]:
    with (folder / "0.pages").open("rb", buffering=0) as file:
        return [os.pread(file.fileno(), PAGE, slot * PAGE) for _, slot in slots]


def test_captured_states_stay_as_they_were_through_later_updates(tmp_path: Path, backend: native.Backend) -> None:
    spans = Spans(tmp_path, ALL_ON_SSD, threads=2, backend=backend, keep_files=True, spare_slots=20)
    spans.submit([0, 1]).wait(DEADLINE)
    pages = [page for span in spans.spans for page in span.state_pages]
    slots = in_slots(spans, pages)
    before = contents(tmp_path, slots)
    for _ in range(4):
        spans.submit([0, 1]).wait(DEADLINE)
    spans.check()
    assert contents(tmp_path, slots) == before
    assert all(spans.store.slot_reference_count(*slot) == 1 for slot in slots)
    spans.store.release_slots(slots)
    spans.close()


def test_capture_while_updates_are_published_takes_whole_versions(tmp_path: Path, backend: native.Backend) -> None:
    """A reference is taken either before the new slot is entered or after: never on a slot that was given away."""
    spans = Spans(tmp_path, ALL_ON_SSD, threads=2, backend=backend, keep_files=True, spare_slots=40)
    pages = [page for span in spans.spans for page in span.state_pages]
    spans.submit([0, 1]).wait(DEADLINE)
    seen: dict[tuple[int, int], int] = {}
    for _ in range(5):
        ticket = spans.submit([0, 1])
        done = False
        while not done:
            done = ticket.done()
            captured = spans.store.capture(pages)
            slots = [(file, slot) for _, file, slot, _, _ in captured]
            assert len(set(slots)) == len(pages)
            with (tmp_path / "0.pages").open("rb", buffering=0) as file:
                for page, (_, _, slot, crc, version) in zip(pages, captured, strict=True):
                    size = next(span.elements * 4 for span in spans.spans if page in span.state_pages)
                    assert native.crc32c(os.pread(file.fileno(), -(-size // 4096) * 4096, slot * PAGE)) == crc
                    seen[page, version] = crc
            spans.store.release_slots(slots)
        ticket.wait(DEADLINE)
    assert len(seen) >= 5 * len(pages)
    spans.check()
    spans.close()


@pytest.mark.parametrize("half", ["first", "second"])
def test_torn_write_is_met_by_the_next_update(tmp_path: Path, backend: native.Backend, half: str) -> None:
    """Half of the sectors have what the slot held before: every byte was written at some time, and none is random."""
    spans = Spans(tmp_path, ALL_ON_SSD, backend=backend, keep_files=True)
    spans.submit([0]).wait(DEADLINE)
    page = spans.spans[0].states[1][0]
    (former,) = in_slots(spans, [page])
    spans.submit([0]).wait(DEADLINE)
    (current,) = in_slots(spans, [page])
    assert former != current
    part = slice(0, PAGE // 2) if half == "first" else slice(PAGE // 2, PAGE)
    old = contents(tmp_path, [former])[0][part]
    assert old != contents(tmp_path, [current])[0][part]
    with (tmp_path / "0.pages").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), old, current[1] * PAGE + part.start)
    spans.store.release_slots([former, current])
    with pytest.raises(CorruptPageError) as caught:
        spans.submit([0]).wait(DEADLINE)
    assert (caught.value.page, caught.value.offset) == (page, current[1] * PAGE)
    with pytest.raises((CorruptPageError, native.StoppedError)):
        spans.submit([1]).wait(DEADLINE)
    spans.close()


def test_slots_that_a_capture_leaves_too_few_of_fail_the_update_and_keep_its_content(
    tmp_path: Path, backend: native.Backend
) -> None:
    spans = Spans(tmp_path, ALL_ON_SSD, backend=backend)
    spans.submit([0, 1]).wait(DEADLINE)
    pages = [page for span in spans.spans for page in [*span.state_pages, span.param] if page is not None]
    held: list[tuple[int, int]] = []
    expected = load(spans.store, pages)
    failed = False
    for _ in range(20):  # as if commits were made and never retired
        held += in_slots(spans, pages)
        try:
            spans.submit([0, 1]).wait(DEADLINE)
        except native.TierCapacityError as error:
            assert "ssd tier" in str(error)  # noqa: PT017
            failed = True
            break
        expected = load(spans.store, pages)
    assert failed
    # The span that found enough slots may have moved on, as a whole; the other one stays as it was, as a whole.
    moved = [not np.array_equal(found, former) for found, former in zip(load(spans.store, pages), expected)]
    per_span = len(pages) // 2
    assert any(moved[:per_span]) + any(moved[per_span:]) <= 1
    for part in (moved[:per_span], moved[per_span:]):
        assert all(part) or not any(part)
    current = in_slots(spans, pages)
    owned = len({*held, *current})
    grads = sum(spans.store.page_written(page) for span in spans.spans for page in span.grad)
    assert spans.store.slot_used_count == owned + grads, "slots reserved for what failed are free again"
    spans.store.release_slots(held + current)
    spans.close()
