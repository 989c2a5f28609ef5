"""Hands gradients to the native updater, and knows which units still wait for their new parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import angelptm_native as native

from angelptm.pages import PageIds, naming
from angelptm.plan import Plan, UnitPlan

Segment = tuple[int, int, int]  # start in the span, element count, index of the hyperparameters


class Updates:
    """One native updater for the run. A unit's pages belong to it from ``submit`` until ``wait_for`` returns."""

    def __init__(
        self,
        store: native.Store,
        plan: Plan,
        pages: PageIds,
        *,
        rule: native.Rule,
        grad_dtype: native.DType,
        param_dtype: native.DType,
        device_params: Mapping[tuple[int, int], int],
        deadline_seconds: float,
        name_page: Callable[[int], str],
    ) -> None:
        """``device_params``: address of each (unit, span) whose parameters live on the device. ``name_page`` says what
        a page holds, for messages."""
        self._name_page = name_page
        self._plan = plan
        self._deadline_seconds = deadline_seconds
        self._tickets: dict[int, native.Ticket] = {}
        self._first_span: list[int] = []
        self.gate_seconds = 0.0
        spans: list[native.Span] = []
        for unit_index, unit in enumerate(pages):
            self._first_span.append(len(spans))
            for span_index, span in enumerate(unit.spans):
                spans.append(
                    native.Span(
                        elements=span.elements,
                        master=span.master,
                        exp_avg=span.exp_avg,
                        exp_avg_sq=span.exp_avg_sq,
                        grad=span.grad,
                        param=span.param,
                        device_param=device_params.get((unit_index, span_index)),
                    )
                )
        self._updater: native.Updater | None = native.Updater(
            store,
            threads=plan.update_threads,
            spans=spans,
            ring_depth=plan.ring_depth,
            rule=rule,
            grad_dtype=grad_dtype,
            param_dtype=param_dtype,
        )

    def submit(self, unit: int, updated: Sequence[tuple[int, int, int]], hypers: Sequence[native.Hyper]) -> None:
        """Updates parts of a unit. ``updated``: (start, end, hyper index) runs of elements, ascending and disjoint."""
        assert self._updater is not None, "not closed"
        assert unit not in self._tickets, "the gradients of a unit come after the wait for its former update"
        plan = self._plan.units[unit]
        work = [
            (self._first_span[unit] + span, segments)
            for span, segments in enumerate(_by_span(plan, updated, self._plan.page_elements))
            if segments
        ]
        if work:
            self._tickets[unit] = self._updater.submit(f"the update of unit {plan.layout.name}", work, list(hypers))

    def wait_for(self, unit: int) -> None:
        """Returns when the unit's last update is published; raises what went wrong in it."""
        ticket = self._tickets.get(unit)
        if ticket is None:
            return
        start = time.perf_counter()
        with naming(self._name_page):
            ticket.wait(self._deadline_seconds)
        self.gate_seconds += time.perf_counter() - start
        del self._tickets[unit]

    def pending(self) -> dict[int, native.Ticket]:
        """The tickets of the updates under way, by unit."""
        return dict(self._tickets)

    def drain(self) -> None:
        """Waits for every unit."""
        for unit in list(self._tickets):
            self.wait_for(unit)

    def utilisation(self) -> dict[str, float]:
        assert self._updater is not None
        return self._updater.utilisation()

    def close(self) -> None:
        """Stops the threads after the spans in flight and gives their frames back."""
        self._updater = None


def _by_span(unit: UnitPlan, updated: Sequence[tuple[int, int, int]], page_elements: int) -> list[list[Segment]]:
    """Cuts runs of the unit's elements at span borders."""
    segments: list[list[Segment]] = [[] for _ in unit.spans]
    for start, end, hyper in updated:
        while start < end:
            span = start // page_elements
            stop = min(end, (span + 1) * page_elements)
            segments[span].append((start - span * page_elements, stop - start, hyper))
            start = stop
    return segments
