"""The page records of a manifest as a numpy array, and the checks that make them safe to use.

All checks are vectorised: a manifest of 500,000 pages (2 TB in pages of 4 MiB) is checked within a second.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from angelptm.checkpoint.header import Header, layouts_from_units
from angelptm.states.layout import UnitFormats, record_bytes
from angelptm.units.layout import ALIGN_ELEMENTS

NONE = 0xFFFFFFFF
"""As ``file``: the page was never written. As ``unit``: the page belongs to the buffers."""

EXTENT_BYTES = 4096
"""The content of a page is followed by zeros up to a multiple of this; the CRC covers them."""

PAGE_RECORD = np.dtype(
    [
        ("unit", "<u4"),
        ("kind", "u1"),
        ("dtype", "u1"),
        ("reserved", "<u2"),
        ("start", "<u8"),
        ("count", "<u8"),
        ("file", "<u4"),
        ("slot", "<u4"),
        ("crc", "<u4"),
        ("bytes", "<u4"),  # of the content, where the count does not say it: STATES; else 0
        ("version", "<u8"),
    ]
)
assert PAGE_RECORD.itemsize == 48

Array = npt.NDArray[Any]


class Kind(IntEnum):
    """What a page holds. The numbers are those of the file format; 1 (GRAD) is never stored. STATES are records, in
    which MASTER, EXP_AVG and EXP_AVG_SQ lie together in the formats that the header names for each parameter."""

    PARAM = 0
    MASTER = 2
    EXP_AVG = 3
    EXP_AVG_SQ = 4
    BUFFER = 5
    STATES = 6


class Dtype(IntEnum):
    """Type of the elements of a page. Elements of BYTES are bytes."""

    FP32 = 0
    BF16 = 1
    BYTES = 2

    @property
    def itemsize(self) -> int:
        return (4, 2, 1)[self]


_ITEMSIZES = np.array([4, 2, 1], np.uint64)


class BadRecordError(ValueError):
    """Records that cannot be used; ``found`` and ``expected`` are phrases for a CheckpointError."""

    def __init__(self, found: str, expected: str) -> None:
        self.found, self.expected = found, expected
        super().__init__(f"found {found}, expected {expected}")


def moment_kinds(optimizer: str) -> tuple[Kind, ...]:
    """The moments that an optimizer (adamw, sgd or lion) keeps."""
    return (Kind.EXP_AVG, Kind.EXP_AVG_SQ) if optimizer == "adamw" else (Kind.EXP_AVG,)


def kind_dtype(kind: Kind, precision: str) -> Dtype:
    """The type of the elements of a kind; ``precision`` is the header's."""
    if kind is Kind.PARAM and precision == "bf16":
        return Dtype.BF16
    return Dtype.BYTES if kind in (Kind.BUFFER, Kind.STATES) else Dtype.FP32


def state_kinds(header: Header) -> tuple[Kind, ...]:
    """The kinds of the pages that hold optimizer states."""
    return (Kind.STATES,) if header.has_records else (Kind.MASTER, *moment_kinds(header.optimizer.type))


def content_bytes(pages: Array) -> Array:
    """(pages,) uint64: the bytes of content of each page."""
    sizes: Array = pages["count"] * _ITEMSIZES[pages["dtype"]]
    return np.where(pages["kind"] == Kind.STATES, pages["bytes"].astype(np.uint64), sizes)


def extent_bytes(content: int) -> int:
    """Bytes of content rounded up to what is written, and what the CRC covers."""
    return -(-content // EXTENT_BYTES) * EXTENT_BYTES


def unit_bases(header: Header) -> Array:
    """(units,) uint64: where each unit starts when the element spaces of all units are laid one after the other."""
    ends = [0]
    for unit in header.units:
        ends.append(ends[-1] + unit.end)
    return np.array(ends[:-1], np.uint64)


def check_records(header: Header, pages: Array) -> None:
    """Raises BadRecordError for the first rule that the records break. Allocates in proportion to the records."""
    _check_fields(header, pages)
    _check_slots(header, pages)
    _check_sections(header, pages)
    _check_coverage(header, pages)
    _check_record_pages(header, pages)


def _refuse(bad: Array, pages: Array, field: str, expected: str) -> None:
    """Names the first record of which ``bad`` is true."""
    if bad.any():
        index = int(bad.argmax())
        raise BadRecordError(f"page record {index} with {field} {int(pages[field][index])}", expected)


def _check_fields(header: Header, pages: Array) -> None:
    kinds = [Kind.PARAM, *state_kinds(header), Kind.BUFFER]
    dtypes = np.full(256, 255, np.uint8)  # of each kind; 255 where the kind does not belong here
    for kind in kinds:
        dtypes[kind] = kind_dtype(kind, header.precision)
    names = ", ".join(f"{int(kind)} ({kind.name})" for kind in kinds)
    _refuse(pages["reserved"] != 0, pages, "reserved", "0")
    _refuse(dtypes[pages["kind"]] == 255, pages, "kind", f"one of {names} with {header.optimizer.type}")
    _refuse(
        pages["dtype"] != dtypes[pages["kind"]],
        pages,
        "dtype",
        f"0 (fp32) for states, {int(kind_dtype(Kind.PARAM, header.precision))} for PARAM in {header.precision}, "
        "2 (bytes) for BUFFER and STATES",
    )
    buffer = pages["kind"] == Kind.BUFFER
    _refuse(buffer & (pages["unit"] != NONE), pages, "unit", f"{NONE} for a BUFFER page")
    _refuse(~buffer & (pages["unit"] >= len(header.units)), pages, "unit", f"less than {len(header.units)} units")
    most = header.page_bytes // _ITEMSIZES[pages["dtype"]]
    _refuse(
        (pages["count"] < 1) | (pages["count"] > most), pages, "count", f"1 to {header.page_bytes} bytes of elements"
    )
    sized = pages["kind"] == Kind.STATES
    _refuse(~sized & (pages["bytes"] != 0), pages, "bytes", "0 in a page whose count says it")
    _refuse(sized & (pages["bytes"] > header.page_bytes), pages, "bytes", f"{header.page_bytes} or less")


def _check_slots(header: Header, pages: Array) -> None:
    absent = pages["file"] == NONE
    _refuse(absent & (pages["slot"] != 0), pages, "slot", "0 in a page that was never written")
    _refuse(absent & (pages["crc"] != 0), pages, "crc", "0 in a page that was never written")
    _refuse(
        ~absent & (pages["file"] >= len(header.files)), pages, "file", f"less than {len(header.files)} files, or {NONE}"
    )
    present = np.flatnonzero(~absent)
    if not len(present):
        return
    files, slots = pages["file"][present], pages["slot"][present]
    outside = np.zeros(len(pages), bool)
    outside[present] = slots >= np.array([file.slot_count for file in header.files], np.uint64)[files]
    _refuse(outside, pages, "slot", "less than the slot_count of its file")
    places = files.astype(np.uint64) << np.uint64(32) | slots
    order = np.argsort(places, kind="stable")
    same = np.flatnonzero(places[order][1:] == places[order][:-1])
    if len(same):
        first, second = sorted((int(present[order[same[0]]]), int(present[order[same[0] + 1]])))
        record = pages[second]
        raise BadRecordError(
            f"page records {first} and {second} in the same slot {int(record['slot'])} of file {int(record['file'])}",
            "a slot for each page",
        )


def _check_sections(header: Header, pages: Array) -> None:
    """Every page lies in one section of its unit, or in the buffer space. No sum here can overflow: counts are at most
    2**30 by now, and a start is compared before anything is added to it."""
    starts, counts, kinds = pages["start"], pages["count"], pages["kind"]
    buffer = kinds == Kind.BUFFER
    limit = np.uint64(header.buffer_bytes)
    _refuse(buffer & ((starts > limit) | (counts > limit - np.minimum(starts, limit))), pages, "start", _INSIDE)
    # One row more, for the buffers, whose unit is no index; their columns are not looked at.
    bounds = np.array(
        [(unit.trainable_elements, unit.frozen_offset, unit.end) for unit in header.units] + [(0, 0, 0)], np.uint64
    )
    trainable, frozen, end = bounds[np.minimum(pages["unit"], len(header.units))].T
    in_trainable = (starts < trainable) & (counts <= trainable - np.minimum(starts, trainable))
    in_frozen = (starts >= frozen) & (starts < end) & (counts <= end - np.minimum(starts, end))
    _refuse(
        ~buffer & ~in_trainable & ~((kinds == Kind.PARAM) & in_frozen),
        pages,
        "start",
        f"{_INSIDE}; only PARAM has a frozen one",
    )


_INSIDE = "a range inside one section of its unit, or inside the buffer space"


def _check_coverage(header: Header, pages: Array) -> None:
    """Pages of a kind are disjoint, and together they hold what a resume needs."""
    bases = unit_bases(header)
    params = [(unit, param) for index, unit in enumerate(header.units) for param in unit.params]
    offsets = np.array(
        [base + param.offset for base, unit in zip(bases.tolist(), header.units) for param in unit.params], np.uint64
    )
    sizes = np.array([param.numel for _, param in params], np.uint64)
    trainable = np.array([param.trainable for _, param in params], bool)
    split = np.array([param.trainable and param.formats.master == "split" for _, param in params], bool)
    for kind in (Kind.PARAM, *state_kinds(header)):
        spans = Spans(pages, kind, bases)
        wanted = np.flatnonzero(~trainable | split if kind is Kind.PARAM else trainable)
        missing = spans.missing(offsets[wanted], sizes[wanted])
        if missing.any():
            name = params[int(wanted[int(missing.argmax())])][1].name
            raise BadRecordError(f"{int(missing.max())} elements of {name!r} without {kind.name} pages", "all of them")
    missing = Spans(pages, Kind.BUFFER, bases).missing(
        np.array([buffer.offset for buffer in header.buffers], np.uint64),
        np.array([buffer.bytes for buffer in header.buffers], np.uint64),
    )
    if missing.any():
        name = header.buffers[int(missing.argmax())].name
        raise BadRecordError(f"bytes of the buffer {name!r} without BUFFER pages", "all of them")


def _check_record_pages(header: Header, pages: Array) -> None:
    """Records begin and end with whole blocks, and are as long as what they hold. They do not overlap by now, so the
    work is in proportion to records and parameters."""
    chosen = np.flatnonzero(pages["kind"] == Kind.STATES)
    if not len(chosen):
        return
    ends = pages["start"] + pages["count"]
    sections = np.array([unit.trainable_elements for unit in header.units] + [0], np.uint64)
    section_ends = sections[np.minimum(pages["unit"], len(header.units))]
    uneven = (pages["start"] % ALIGN_ELEMENTS != 0) | ((ends % ALIGN_ELEMENTS != 0) & (ends != section_ends))
    _refuse(
        (pages["kind"] == Kind.STATES) & uneven,
        pages,
        "start",
        f"records cut at multiples of {ALIGN_ELEMENTS} elements",
    )
    moments = len(moment_kinds(header.optimizer.type))
    formats = [UnitFormats(layout, moments) for layout in layouts_from_units(header.units)]
    for index in chosen.tolist():
        record = pages[index]
        runs = formats[int(record["unit"])].runs(int(record["start"]), int(record["count"]))
        if (size := record_bytes(runs, moments)) != record["bytes"]:
            raise BadRecordError(f"page record {index} with bytes {int(record['bytes'])}", f"{size} for what it holds")


class Spans:
    """The pages of one kind in order of the element space that ``unit_bases`` lays out.

    ``records`` (n,) indices of page records, ``starts`` and ``ends`` (n,) uint64. Raises BadRecordError when two
    overlap.
    """

    def __init__(self, pages: Array, kind: Kind, bases: Array) -> None:
        chosen = np.flatnonzero(pages["kind"] == kind)
        starts = pages["start"][chosen]
        if kind is not Kind.BUFFER:
            starts = starts + bases[pages["unit"][chosen]]
        order = np.argsort(starts, kind="stable")
        self.records: Array = chosen[order]
        self.starts: Array = starts[order]
        self.ends: Array = self.starts + pages["count"][self.records]
        over = np.flatnonzero(self.ends[:-1] > self.starts[1:])
        if len(over):
            first, second = sorted((int(self.records[over[0]]), int(self.records[over[0] + 1])))
            raise BadRecordError(f"{kind.name} page records {first} and {second} that overlap", "disjoint ranges")
        self._before = np.concatenate([np.zeros(1, np.uint64), np.cumsum(self.ends - self.starts, dtype=np.uint64)])

    def _covered_below(self, positions: Array) -> Array:
        """How many elements below each position lie in pages."""
        if not len(self.starts):
            return np.zeros(len(positions), np.uint64)
        index = np.searchsorted(self.starts, positions, side="right")
        last = np.maximum(index, 1) - 1  # the page that starts at or before the position
        inside = np.minimum(positions, self.ends[last]) - np.minimum(positions, self.starts[last])
        covered: Array = np.where(index > 0, self._before[last] + inside, np.uint64(0))
        return covered

    def missing(self, starts: Array, sizes: Array) -> Array:
        """(n,) uint64: how many elements of each range [start, start + size) lie in no page."""
        absent: Array = sizes - (self._covered_below(starts + sizes) - self._covered_below(starts))
        return absent

    def overlapping(self, start: int, size: int) -> slice:
        """Which of ``records`` hold some of the range."""
        first = int(np.searchsorted(self.ends, np.uint64(start), side="right"))
        last = int(np.searchsorted(self.starts, np.uint64(start + size), side="left"))
        return slice(first, last if size else first)
