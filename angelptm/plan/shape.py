"""A model in pages, before they have homes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """A model in pages, before they have homes: each unit's spans as (elements, pages of gradients, states)."""

    layouts: Sequence[UnitLayout]
    page_bytes: int
    page_elements: int
    compact: bool
    spans: list[list[tuple[int, int, SpanStates]]]
    full_span_pages: int

    @property
    def demand(self) -> Demand:
        spans = [span for unit in self.spans for span in unit]
        return Demand(
            param_pages=sum(param_pages(layout, self.page_elements) for layout in self.layouts),
            grad_pages=sum(grads for _, grads, _ in spans),
            state_pages=sum(self.state_pages),
            span_state_pages=max(self.state_pages, default=0),
            span_grad_pages=max((grads for _, grads, _ in spans), default=0),
            full_span_pages=self.full_span_pages,
        )

    @property
    def state_pages(self) -> list[int]:
        """Pages of all kinds of state of each span."""
        return [len(states.pages) for unit in self.spans for _, _, states in unit]


def shape_of(
    layouts: Sequence[UnitLayout], page_bytes: int, param_itemsize: int, grad_itemsize: int, moment_count: int
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
    return Shape(layouts, page_bytes, page_elements, compact, spans, full_span_pages)


def states_on_device(shape: Shape, demand: Demand, room: int) -> tuple[int, Demand]:
    """How many spans, from the first on, have their states in ``room`` frames, and the demand that is left."""
    states = shape.state_pages
    count = 0
    while count < len(states) and states[count] <= room:
        room -= states[count]
        count += 1
    left = states[count:]
    return count, replace(demand, state_pages=sum(left), span_state_pages=max(left, default=0))
