"""Where the states of a span lie on its pages. Pure functions, the same for a run, its plan and its commits.

Where all states of a model are fp32, each kind has pages of its own: MASTER, EXP_AVG, EXP_AVG_SQ. Otherwise a span has
records: pages of kind STATES, on which everything about an element is together, so that one read and one write carry
it. A record begins at some element of a unit and has, for each run of elements in the same formats, the sections
master, exp_avg, exp_avg_sq and scales, each at a multiple of 64 bytes. It is a function of the unit's parameters and of
its own first element and element count alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from angelptm.states.formats import BLOCK8, FP32, StateFormats
from angelptm.units.layout import ALIGN_ELEMENTS, UnitLayout, align_up

STATE_KINDS = ("MASTER", "EXP_AVG", "EXP_AVG_SQ")
RECORD_KIND = "STATES"
LEAF_ELEMENTS = 16384
"""PARAM pages hold a multiple of this: the leaves of the tree over which gradient norms are formed (GRAD_BLOCK)."""

_SECTION_ALIGN = 64
_ITEMSIZE = 4
_SPARE = 1 / 64  # of a record's room: for parameters in formats of more bytes than most


def state_kinds(moment_count: int, compact: bool) -> tuple[str, ...]:
    """Kinds of the state pages of a model."""
    return (RECORD_KIND,) if compact else STATE_KINDS[: 1 + moment_count]


def splits_masters(layouts: Iterable[UnitLayout]) -> bool:
    """Whether a master of the model is a parameter and a remainder, so that neither is anything without the other."""
    return any(param.trainable and param.states.master == "split" for layout in layouts for param in layout.params)


@dataclass(frozen=True)
class Place:
    """Bytes from the start of the state page of that index; ``scales`` those of an int8 moment."""

    page: int
    offset: int
    scales: int = 0


@dataclass(frozen=True)
class StateRun:
    """Elements [start, start + count) of a span, with ``moments`` as many as the rule keeps."""

    start: int
    count: int
    formats: StateFormats
    master: Place
    moments: tuple[Place, ...]


@dataclass(frozen=True)
class StatePage:
    """Elements [start, start + count) of a span, of one kind: "MASTER", ..., or "STATES"."""

    kind: str
    start: int
    count: int
    bytes: int


@dataclass(frozen=True)
class SpanStates:
    """A span's state pages in order of kind, and what lies where on them."""

    pages: tuple[StatePage, ...]
    runs: tuple[StateRun, ...]

    @property
    def has_split_masters(self) -> bool:
        return any(run.formats.master == "split" for run in self.runs)


class UnitFormats:
    """Runs of a unit's trainable elements in the same formats. A gap belongs to the parameter before it."""

    def __init__(self, layout: UnitLayout, moment_count: int) -> None:
        self.moment_count = moment_count
        self._starts: list[int] = []
        self._formats: list[StateFormats] = []
        for param in layout.params:
            formats = param.states.of_rule(moment_count)
            if param.trainable and (not self._formats or self._formats[-1] != formats):
                self._starts.append(param.offset if self._starts else 0)
                self._formats.append(formats)

    def runs(self, start: int, count: int) -> list[tuple[int, StateFormats]]:
        """(elements, formats) of the runs that ``count`` elements from ``start`` on consist of."""
        found = []
        index, end = bisect_right(self._starts, start) - 1, start + count
        while start < end:
            last = index + 1 == len(self._starts)
            stop = end if last else min(end, self._starts[index + 1])
            found.append((stop - start, self._formats[index]))
            start, index = stop, index + 1
        return found


@lru_cache(maxsize=65536)
def _sections(formats: StateFormats, count: int, moment_count: int, offset: int) -> tuple[tuple[int, ...], int]:
    """Where the sections of a run begin in a record that is filled up to ``offset``, and where the last one ends."""
    starts = []
    for size in formats.section_bytes(count, moment_count):
        offset = align_up(offset, _SECTION_ALIGN)
        starts.append(offset)
        offset += size
    return tuple(starts), offset


def record_bytes(runs: Iterable[tuple[int, StateFormats]], moment_count: int) -> int:
    """Bytes of a record of these runs of elements."""
    offset = 0
    for count, formats in runs:
        offset = _sections(formats, count, moment_count, offset)[1]
    return offset


def record_runs(formats: UnitFormats, first: int, count: int, page: int = 0, start: int = 0) -> tuple[StateRun, ...]:
    """What lies where in the record of ``count`` elements of a unit from ``first`` on: runs that begin at ``start``."""
    found, offset = [], 0
    for part, own in formats.runs(first, count):
        begins, offset = _sections(own, part, formats.moment_count, offset)
        scales = iter(begins[1 + formats.moment_count :])
        moments = tuple(
            Place(page, begins[1 + number], next(scales) if form == "int8" else 0)
            for number, form in enumerate(own.moments(formats.moment_count))
        )
        found.append(StateRun(start, part, own, Place(page, begins[0]), moments))
        start += part
    return tuple(found)


def _fitting(formats: StateFormats, most: int, moment_count: int, offset: int, page_bytes: int) -> int:
    """How many of ``most`` elements have room behind ``offset``: all, or a multiple of ALIGN_ELEMENTS."""
    if _sections(formats, most, moment_count, offset)[1] <= page_bytes:
        return most
    per_block = sum(formats.section_bytes(ALIGN_ELEMENTS, moment_count))
    count = max(0, (page_bytes - offset) // per_block * ALIGN_ELEMENTS)
    while count and _sections(formats, count, moment_count, offset)[1] > page_bytes:
        count -= ALIGN_ELEMENTS
    return count


def record_counts(formats: UnitFormats, first: int, elements: int, page_bytes: int) -> list[int]:
    """How many elements each record page of a span has: as many as fit, one page after the other."""
    counts, offset, held = [], 0, 0
    for left, own in formats.runs(first, elements):
        while left:
            part = _fitting(own, left, formats.moment_count, offset, page_bytes)
            if part:
                offset = _sections(own, part, formats.moment_count, offset)[1]
                held, left = held + part, left - part
            if left:
                counts.append(held)
                offset = held = 0
    return [*counts, held]


def states_of(
    formats: UnitFormats, first: int, elements: int, *, page_bytes: int, page_elements: int, compact: bool
) -> SpanStates:
    """The states of the span of a unit that begins at element ``first``."""
    if compact:
        pages: list[StatePage] = []
        runs: list[StateRun] = []
        start = 0
        for number, count in enumerate(record_counts(formats, first, elements, page_bytes)):
            size = record_bytes(formats.runs(first + start, count), formats.moment_count)
            pages.append(StatePage(RECORD_KIND, start, count, size))
            runs += record_runs(formats, first + start, count, number, start)
            start += count
        return SpanStates(tuple(pages), tuple(runs))
    return _separate_states(elements, formats.moment_count, elements_on_page(page_elements, _ITEMSIZE, page_bytes))


@lru_cache(maxsize=4096)
def _separate_states(elements: int, moment_count: int, step: int) -> SpanStates:
    """Pages of each kind of their own, all fp32."""
    starts = range(0, elements, step)
    pages = [
        StatePage(kind, start, min(step, elements - start), min(step, elements - start) * _ITEMSIZE)
        for kind in STATE_KINDS[: 1 + moment_count]
        for start in starts
    ]
    runs = [
        StateRun(
            start,
            min(step, elements - start),
            FP32,
            Place(number, 0),
            tuple(Place(number + moment * len(starts), 0) for moment in range(1, 1 + moment_count)),
        )
        for number, start in enumerate(starts)
    ]
    return SpanStates(tuple(pages), tuple(runs))


def elements_on_page(page_elements: int, itemsize: int, page_bytes: int) -> int:
    """How many elements of that size a page holds, so that pages divide a span of ``page_elements`` evenly."""
    return page_elements // -(-page_elements * itemsize // page_bytes)


def choose_page_elements(
    sizes: Sequence[tuple[int, StateFormats]],
    *,
    page_bytes: int,
    param_itemsize: int,
    grad_itemsize: int,
    moment_count: int,
) -> int:
    """How many elements a PARAM page has, which is a span. ``sizes``: (elements, formats) of the trainable parameters.

    As many as fit, where all states are fp32. With records, what fits is often just too much for a whole number of
    record pages, because of the scales; then the PARAM page is not quite full and no record page nearly empty: that
    number of elements whose pages of all kinds have the fewest bytes for each.
    """
    most = page_bytes // param_itemsize
    moved = [(count, formats.of_rule(moment_count)) for count, formats in sizes]
    if not are_records(moved):
        return most
    total = sum(count for count, _ in moved)
    block_bytes = sum(count * sum(one.section_bytes(BLOCK8, moment_count)) for count, one in moved) / total
    spare = _SPARE if len({formats for _, formats in moved}) > 1 else 0.0
    on_record = int(page_bytes / block_bytes) * BLOCK8
    step = LEAF_ELEMENTS * max(1, grad_itemsize // param_itemsize)

    def frames(elements: int) -> int:
        return 1 + math.ceil(elements * grad_itemsize / page_bytes) + math.ceil(elements * (1 + spare) / on_record)

    return min(range(most, 0, -step), key=lambda elements: (frames(elements) / elements, -elements))


def are_records(sizes: Sequence[tuple[int, StateFormats]]) -> bool:
    return any(count > 0 and formats != FP32 for count, formats in sizes)


@dataclass(frozen=True)
class Piece:
    """One kind of state of elements [start, start + count) of a span, as it lies on one of its pages: in ``format``, at
    ``offset`` and, for int8, with scales at ``scales``."""

    kind: str
    start: int
    count: int
    format: str
    offset: int
    scales: int = 0


def pieces_on(states: SpanStates, page: int) -> list[Piece]:
    """What the state page of that index holds."""
    return _pieces(states.runs, page)


def record_pieces(formats: UnitFormats, first: int, count: int) -> list[Piece]:
    """What the record of ``count`` elements of a unit from ``first`` on holds; their start counts from ``first``."""
    return _pieces(record_runs(formats, first, count), 0)


def _pieces(runs: Iterable[StateRun], page: int) -> list[Piece]:
    found = []
    for run in runs:
        formats = (run.formats.master, *run.formats.moments(len(run.moments)))
        for kind, form, place in zip(STATE_KINDS, formats, (run.master, *run.moments)):
            if place.page == page:
                found.append(Piece(kind, run.start, run.count, form, place.offset, place.scales))
    return found
