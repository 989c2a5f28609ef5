"""The element space of a unit. Pure data: neither torch nor the native module is imported here.

A unit is one flat run of elements, the same for every kind of page: element ``e`` of PARAM, GRAD, MASTER, EXP_AVG and
EXP_AVG_SQ belongs to the same parameter. Trainable parameters come first and frozen ones start on a page of their own,
since frozen pages have neither gradients nor states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from angelptm.states.formats import FP32, StateFormats

ALIGN_ELEMENTS = 128
"""Parameters start at multiples of this: 256 bytes in bf16, 512 in fp32."""


def align_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class ParamLayout:
    """One parameter's place in its unit.

    ``owners`` are the (module name, attribute) pairs that hold it; more than one means tied. ``offset`` counts elements
    from the unit's start. ``states`` are the formats of its optimizer states, if it is trained.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    trainable: bool
    owners: tuple[tuple[str, str], ...]
    states: StateFormats = FP32

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class UnitLayout:
    """A unit: its parameters in order of offset, and the sizes of its two sections in elements."""

    name: str
    index: int
    params: tuple[ParamLayout, ...]
    trainable_elements: int
    frozen_offset: int
    frozen_elements: int

    @property
    def numel(self) -> int:
        return sum(param.numel for param in self.params)


class ParamSpec(NamedTuple):
    """A parameter before it has a place; the fields are those of ParamLayout."""

    name: str
    shape: tuple[int, ...]
    trainable: bool
    owners: tuple[tuple[str, str], ...]
    states: StateFormats = FP32


def pack(name: str, index: int, params: Sequence[ParamSpec], page_elements: int) -> UnitLayout:
    """Lays parameters back to back in the order given.

    ``page_elements`` is the number of elements of a PARAM page, where the frozen section must start.
    """
    placed: list[ParamLayout] = []

    def place(trainable: bool, start: int) -> int:
        offset = start
        for spec in params:
            if spec.trainable is trainable:
                placed.append(ParamLayout(spec.name, spec.shape, offset, trainable, spec.owners, spec.states))
                offset = align_up(offset + math.prod(spec.shape), ALIGN_ELEMENTS)
        return offset

    trainable_elements = place(True, 0)
    frozen_offset = align_up(trainable_elements, page_elements)
    frozen_elements = place(False, frozen_offset) - frozen_offset
    return UnitLayout(name, index, tuple(placed), trainable_elements, frozen_offset, frozen_elements)


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + count) of a parameter, ``at`` elements after the start of the run they are in."""

    param: ParamLayout
    start: int
    count: int
    at: int


def leaves_of(layout: UnitLayout) -> list[ParamLayout]:
    """The parameter of each of a unit's leaves: one for each owner of each parameter."""
    return [param for param in layout.params for _ in param.owners]


def segments_of(layout: UnitLayout, start: int, count: int) -> list[Segment]:
    """What of which parameters lies in ``count`` elements of the unit from ``start`` on, in order."""
    found = []
    for param in layout.params:
        first, last = max(start, param.offset), min(start + count, param.end)
        if first < last:
            found.append(Segment(param, first - param.offset, last - first, first - start))
    return found


def name_elements(layout: UnitLayout, start: int, count: int) -> str:
    """``h.0.ln_1.weight[0:768], h.0.ln_1.bias[0:768] and 3 more``: for messages."""
    segments = segments_of(layout, start, count)
    named = [f"{one.param.name}[{one.start}:{one.start + one.count}]" for one in segments[:3]]
    rest = f" and {len(segments) - 3} more" if len(segments) > 3 else ""
    return (", ".join(named) or f"the space between parameters of {layout.name}") + rest
