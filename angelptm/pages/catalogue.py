"""Every page of a run with what it holds: for commits, for resuming, and for messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from angelptm.errors import CorruptPageError
from angelptm.pages.allocate import PageIds
from angelptm.plan import PEER, Plan
from angelptm.units.layout import UnitLayout, name_elements


@dataclass(frozen=True)
class CataloguedPage:
    """Elements [start, start + count) of a unit, of one kind ("MASTER", "PARAM", ...).

    ``page`` is its id in the native store; None for parameters that live on the device, ``offset`` bytes from the start
    of the arena. ``frozen`` pages hold frozen parameters, which have no other kinds.
    """

    unit: int
    kind: str
    start: int
    count: int
    page: int | None
    frozen: bool = False
    offset: int = 0
    bytes: int = 0  # of state pages


class Catalogue:
    """The pages of a plan, by unit: those of this rank."""

    def __init__(self, plan: Plan, pages: PageIds) -> None:
        self._splits = plan.splits_masters
        self._layouts: list[UnitLayout] = [unit.layout for unit in plan.units]
        self.by_unit: list[list[CataloguedPage]] = [list(_pages_of(plan, pages, unit)) for unit in range(len(pages))]
        self._by_id = {one.page: one for unit in self.by_unit for one in unit if one.page is not None}

    def committed(self, unit: int) -> list[CataloguedPage]:
        """What a commit records of a unit: its states, and its frozen parameters. Trainable parameters are their
        masters, rounded, unless these are split; gradients are gone at the end of a step."""
        left_out = ("GRAD",) if self._splits else ("PARAM", "GRAD")
        return [one for one in self.by_unit[unit] if one.frozen or one.kind not in left_out]

    def name(self, page: int) -> str:
        """``EXP_AVG of h.0.mlp.c_fc.weight[0:1048576]``."""
        one = self._by_id[page]
        return f"{one.kind} of {name_elements(self._layouts[one.unit], one.start, one.count)}"


def _pages_of(plan: Plan, pages: PageIds, unit: int) -> Iterator[CataloguedPage]:
    unit_plan, unit_pages = plan.units[unit], pages[unit]
    for index, (span, span_plan) in enumerate(zip(unit_pages.spans, unit_plan.spans)):
        if not span_plan.is_mine:
            continue
        first = index * plan.page_elements
        for page, states in zip(span.states, span_plan.states.pages):
            yield CataloguedPage(unit, states.kind, first + states.start, states.count, page, bytes=states.bytes)
        for grads in (span.grad, span.step_grad):
            for number, page in enumerate(grads):
                start = number * plan.grad_page_elements
                count = min(plan.grad_page_elements, span.elements - start)
                yield CataloguedPage(unit, "GRAD", first + start, count, page)
        yield CataloguedPage(unit, "PARAM", first, span.elements, span.param, offset=plan.param_offset(unit, index))
    layout = unit_plan.layout
    for number, home in enumerate(unit_plan.frozen_homes):
        if home == PEER:
            continue
        start = layout.frozen_offset + number * plan.page_elements
        count = min(plan.page_elements, layout.frozen_offset + layout.frozen_elements - start)
        index = unit_pages.frozen_start + number
        param = unit_pages.params[index] if unit_pages.params else None
        yield CataloguedPage(unit, "PARAM", start, count, param, True, plan.param_offset(unit, index))


@contextmanager
def naming(name_page: Callable[[int], str]) -> Iterator[None]:
    """Around whatever may meet a corrupt page: adds to the error what the page holds, which the native side, that knows
    pages alone, cannot say."""
    try:
        yield
    except CorruptPageError as error:
        if error.parameter:
            raise
        raise CorruptPageError(
            error.page, name_page(error.page), error.path, error.offset, error.expected_crc, error.found_crc
        ) from None
