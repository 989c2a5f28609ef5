"""A model in pages, before they have homes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from angelptm.plan.shares import Share, owners_of
from angelptm.states.layout import (
    SpanStates,
    UnitFormats,
    are_records,
    choose_page_elements,
    elements_on_page,
    states_of,
)
from angelptm.units.layout import UnitLayout


@dataclass(frozen=True)
class Demand:
    """Page counts of a model: what the placement is decided from."""

    param_pages: int
    grad_pages: int
    state_pages: int
    span_state_pages: int  # of the largest span, all kinds of state together
    span_grad_pages: int
    full_span_pages: int  # of all kinds, of a span that fills its pages: no span has more, whatever the page size


def param_pages(layout: UnitLayout, page_elements: int) -> int:
    return math.ceil(layout.trainable_elements / page_elements) + math.ceil(layout.frozen_elements / page_elements)


@dataclass(frozen=True)
class Shape:
    """A model in pages, before they have homes: each unit's spans as (elements, pages of gradients, states).

    ``owners``: the rank of each PARAM page of each unit, those of the frozen section behind the spans'; demands are
    those of ``share``.
    """

    layouts: Sequence[UnitLayout]
    page_bytes: int
    page_elements: int
    compact: bool
    spans: list[list[tuple[int, int, SpanStates]]]
    full_span_pages: int
    owners: list[tuple[int, ...]]
    share: Share

    def is_mine(self, unit: int, page: int) -> bool:
        return self.owners[unit][page] == self.share.index

    @property
    def all_param_pages(self) -> int:
        """Of all ranks: what the device has when every unit is there."""
        return sum(map(len, self.owners))

    @property
    def _own_spans(self) -> list[tuple[int, int, SpanStates]]:
        return [
            span for unit, spans in enumerate(self.spans) for page, span in enumerate(spans) if self.is_mine(unit, page)
        ]

    @property
    def demand(self) -> Demand:
        spans = self._own_spans
        return Demand(
            param_pages=sum(owners.count(self.share.index) for owners in self.owners),
            grad_pages=sum(grads for _, grads, _ in spans),
            state_pages=sum(self.state_pages),
            span_state_pages=max(self.state_pages, default=0),
            span_grad_pages=max((grads for _, grads, _ in spans), default=0),
            full_span_pages=self.full_span_pages,
        )

    @property
    def state_pages(self) -> list[int]:
        """Pages of all kinds of state of each span."""
        return [len(states.pages) for _, _, states in self._own_spans]


def shape_of(
    layouts: Sequence[UnitLayout],
    page_bytes: int,
    param_itemsize: int,
    grad_itemsize: int,
    moment_count: int,
    share: Share,
) -> Shape:
    params = [(param.numel, param.states) for layout in layouts for param in layout.params if param.trainable]
    page_elements = choose_page_elements(
        params,
        page_bytes=page_bytes,
        param_itemsize=param_itemsize,
        grad_itemsize=grad_itemsize,
        moment_count=moment_count,
    )
    compact = are_records([(count, formats.of_rule(moment_count)) for count, formats in params])
    grad_step = elements_on_page(page_elements, grad_itemsize, page_bytes)
    spans = []
    for layout in layouts:
        formats = UnitFormats(layout, moment_count)
        own = []
        for first in range(0, layout.trainable_elements, page_elements):
            elements = min(page_elements, layout.trainable_elements - first)
            states = states_of(
                formats, first, elements, page_bytes=page_bytes, page_elements=page_elements, compact=compact
            )
            own.append((elements, math.ceil(elements / grad_step), states))
        spans.append(own)
    full_span_pages = 1 + math.ceil(grad_itemsize / param_itemsize) + (1 + moment_count) * math.ceil(4 / param_itemsize)
    owners = owners_of([param_pages(layout, page_elements) for layout in layouts], share.count)
    return Shape(layouts, page_bytes, page_elements, compact, spans, full_span_pages, owners, share)


def states_on_device(shape: Shape, demand: Demand, room: int) -> tuple[int, Demand]:
    """How many spans, from the first on, have their states in ``room`` frames, and the demand that is left."""
    states = shape.state_pages
    count = 0
    while count < len(states) and states[count] <= room:
        room -= states[count]
        count += 1
    left = states[count:]
    return count, replace(demand, state_pages=sum(left), span_state_pages=max(left, default=0))
