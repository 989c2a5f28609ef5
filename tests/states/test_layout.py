"""Where states lie on pages: everything once, nothing on top of anything, as much as fits."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from angelptm.states.formats import BLOCK8, FP32, StateFormats
from angelptm.states.layout import (
    LEAF_ELEMENTS,
    STATE_KINDS,
    SpanStates,
    UnitFormats,
    choose_page_elements,
    elements_on_page,
    pieces_on,
    record_bytes,
    record_pieces,
    states_of,
)
from angelptm.units import ParamSpec, UnitLayout, pack

PAGE = 65536
SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)

formats = st.builds(
    StateFormats,
    st.sampled_from(["fp32", "split"]),
    st.sampled_from(["fp32", "bf16", "int8"]),
    st.sampled_from(["fp32", "bf16", "int8"]),
)


@st.composite
def spans(draw: st.DrawFn) -> tuple[UnitLayout, int, int, int]:
    """A unit, its rule's number of moments, and a span: first element and count."""
    sizes = st.one_of(st.integers(1, 400), st.integers(1, 60_000))
    params = draw(st.lists(st.tuples(sizes, formats), min_size=1, max_size=8))
    specs = [ParamSpec(f"p{i}", (size,), True, (("", f"p{i}"),), states) for i, (size, states) in enumerate(params)]
    layout = pack("unit", 0, specs, LEAF_ELEMENTS)
    index = draw(st.integers(0, (layout.trainable_elements - 1) // LEAF_ELEMENTS))
    count = min(LEAF_ELEMENTS, layout.trainable_elements - index * LEAF_ELEMENTS)
    return layout, draw(st.sampled_from([1, 2])), index * LEAF_ELEMENTS, count


def records_of(layout: UnitLayout, moments: int, first: int, count: int) -> SpanStates:
    return states_of(
        UnitFormats(layout, moments), first, count, page_bytes=PAGE, page_elements=LEAF_ELEMENTS, compact=True
    )


@SETTINGS
@given(spans())
def test_every_state_of_every_element_has_one_place_in_a_record(span: tuple[UnitLayout, int, int, int]) -> None:
    _, moments, _, count = span
    states = records_of(*span)
    assert [page.start for page in states.pages] == [
        sum(p.count for p in states.pages[:i]) for i in range(len(states.pages))
    ]
    assert sum(page.count for page in states.pages) == count
    covered = dict.fromkeys(STATE_KINDS[: 1 + moments], 0)
    for number, page in enumerate(states.pages):
        assert 0 < page.bytes <= PAGE
        taken = []
        for piece in pieces_on(states, number):
            assert page.start <= piece.start < piece.start + piece.count <= page.start + page.count
            assert piece.start == covered[piece.kind], "in order, without a gap"
            covered[piece.kind] += piece.count
            size = {"fp32": 4, "split": 2, "bf16": 2, "int8": 1}[piece.format] * piece.count
            taken.append((piece.offset, piece.offset + size))
            if piece.format == "int8":
                assert (piece.start - page.start) % BLOCK8 == 0
                taken.append((piece.scales, piece.scales + 4 * math.ceil(piece.count / BLOCK8)))
        taken.sort()
        assert all(start % 64 == 0 for start, _ in taken)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
        assert taken[-1][1] == page.bytes
    assert set(covered.values()) == {count}


@SETTINGS
@given(spans())
def test_formats_are_those_of_the_parameters(span: tuple[UnitLayout, int, int, int]) -> None:
    layout, moments, first, count = span
    states = records_of(*span)
    for param in layout.params:
        low, high = max(first, param.offset) - first, min(first + count, param.end) - first
        own = param.states.of_rule(moments)
        for run in states.runs:
            if run.start < high and low < run.start + run.count:
                assert run.formats == own
                assert len(run.moments) == moments


@SETTINGS
@given(spans())
def test_a_record_is_known_from_its_first_element_and_its_count_alone(span: tuple[UnitLayout, int, int, int]) -> None:
    """As a commit knows it."""
    layout, moments, first, _ = span
    states, formats = records_of(*span), UnitFormats(layout, moments)
    for number, page in enumerate(states.pages):
        assert record_bytes(formats.runs(first + page.start, page.count), moments) == page.bytes
        alone = record_pieces(formats, first + page.start, page.count)
        for one, other in zip(alone, pieces_on(states, number), strict=True):
            assert one.start + page.start == other.start
            assert (one.kind, one.count, one.format, one.offset, one.scales) == (
                other.kind, other.count, other.format, other.offset, other.scales,
            )  # fmt: skip


@SETTINGS
@given(spans())
def test_pages_are_filled_as_far_as_a_block_fits(span: tuple[UnitLayout, int, int, int]) -> None:
    moments = span[1]
    for page in records_of(*span).pages[:-1]:
        assert page.bytes > PAGE - 12 * BLOCK8 - 4 * moments - 5 * 64


def test_separate_states_have_pages_of_each_kind() -> None:
    layout = pack("unit", 0, [ParamSpec("p", (40_000,), True, (("", "p"),))], 32768)
    states = states_of(UnitFormats(layout, 2), 0, 32768, page_bytes=PAGE, page_elements=32768, compact=False)
    assert [(page.kind, page.start, page.count) for page in states.pages] == [
        (kind, start, 16384) for kind in STATE_KINDS for start in (0, 16384)
    ]
    assert [(run.master.page, *(one.page for one in run.moments)) for run in states.runs] == [(0, 2, 4), (1, 3, 5)]


@SETTINGS
@given(
    st.lists(st.tuples(st.integers(1, 10**7), formats), min_size=1, max_size=5),
    st.sampled_from([2**16, 2**20, 2**22, 2**24]),
    st.sampled_from([2, 4]),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 2]),
)
def test_pages_hold_whole_leaves_and_as_many_elements_as_pay(
    sizes: list[tuple[int, StateFormats]], page_bytes: int, param_itemsize: int, grad_itemsize: int, moments: int
) -> None:
    most = page_bytes // param_itemsize
    found = choose_page_elements(
        sizes,
        page_bytes=page_bytes,
        param_itemsize=param_itemsize,
        grad_itemsize=grad_itemsize,
        moment_count=moments,
    )
    assert 0 < found <= most
    assert found % LEAF_ELEMENTS == 0
    assert elements_on_page(found, grad_itemsize, page_bytes) % LEAF_ELEMENTS == 0
    assert elements_on_page(found, grad_itemsize, page_bytes) * grad_itemsize <= page_bytes
    if all(one.of_rule(moments) == FP32 for _, one in sizes):
        assert found == most


def test_int8_beside_split_masters_takes_two_record_pages_and_almost_all_of_a_param_page() -> None:
    page = 2**22
    sizes = [(10**8, StateFormats("split", "int8", "int8")), (10**5, StateFormats("split", "fp32", "fp32"))]
    found = choose_page_elements(sizes, page_bytes=page, param_itemsize=2, grad_itemsize=2, moment_count=2)
    assert 0.96 * page / 2 < found < page / 2
    layout = pack("unit", 0, [ParamSpec("p", (found,), True, (("", "p"),), sizes[0][1])], found)
    states = states_of(UnitFormats(layout, 2), 0, found, page_bytes=page, page_elements=found, compact=True)
    assert len(states.pages) == 2
    assert sum(one.bytes for one in states.pages) / found < 4.07
