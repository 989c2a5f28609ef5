"""Hands gradients to the native updater, and knows which units still wait for their new parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import angelptm_native as native

from angelptm.pages import PageIds, naming
from angelptm.plan import Plan, UnitPlan
from angelptm.states.codec import native_run

Segment = tuple[int, int, int]  # start in the span, element count, index of the hyperparameters


@dataclass(frozen=True)
class _Tickets:
    done: native.Ticket
    published: native.Ticket


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
        fetcher: native.Fetcher,
        memory: object,
        sweep: native.SweepOptions | None = None,
    ) -> None:
        """``device_params``: address of each (unit, span) whose parameters live on the device. ``name_page`` says what
        a page holds, for messages. ``fetcher`` gets new parameters as they are published. ``memory``
        owns what the threads write to on the device."""
        self._name_page = name_page
        self._plan = plan
        self._deadline_seconds = deadline_seconds
        self._tickets: dict[int, _Tickets] = {}
        self._native_span: dict[tuple[int, int], int] = {}  # of this rank, by (unit, span)
        self.gate_seconds = 0.0
        spans: list[native.Span] = []
        for unit_index, unit in enumerate(pages):
            for span_index, (span, span_plan) in enumerate(zip(unit.spans, plan.units[unit_index].spans)):
                if not span_plan.is_mine:
                    continue
                self._native_span[unit_index, span_index] = len(spans)
                spans.append(
                    native.Span(
                        elements=span.elements,
                        states=span.states,
                        runs=[native_run(run) for run in span_plan.states.runs],
                        grad=span.grad,
                        param=span.param,
                        device_param=device_params.get((unit_index, span_index)),
                        step_grad=span.step_grad,
                        unit=unit_index,
                        first_element=span_index * plan.page_elements,
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
            write_depth=plan.write_depth,
            fetcher=fetcher,
            memory=memory,
            sweep=sweep,
            grad_page_elements=plan.grad_page_elements,
        )

    def submit(
        self, unit: int, updated: Sequence[tuple[int, int, int]], hypers: Sequence[native.Hyper], rank: int
    ) -> None:
        """Updates parts of a unit. ``updated``: (start, end, hyper index) runs of elements, ascending and disjoint.
        Of what is queued, units of the lowest ``rank`` go first."""
        assert self._updater is not None, "not closed"
        assert unit not in self._tickets, "the gradients of a unit come after the wait for its former update"
        if work := self._work(unit, updated):
            what = f"the update of unit {self._plan.units[unit].layout.name}"
            self._tickets[unit] = _Tickets(*self._updater.submit(what, work, list(hypers), rank))

    def _work(self, unit: int, updated: Sequence[tuple[int, int, int]]) -> list[tuple[int, list[Segment]]]:
        """Runs of a unit's elements by the native updater's spans."""
        by_span = _by_span(self._plan.units[unit], updated, self._plan.page_elements)
        return [
            (self._native_span[unit, span], segments)
            for span, segments in enumerate(by_span)
            if segments and (unit, span) in self._native_span
        ]

    def expect(self, units: Sequence[int]) -> None:
        """The units whose gradients come next, in order: their states are read while the SSD has nothing else to do."""
        assert self._updater is not None, "not closed"
        spans = [
            self._native_span[unit, span]
            for unit in units
            for span, plan in enumerate(self._plan.units[unit].spans)
            if plan.states_home == "ssd"
        ]
        self._updater.expect(spans)

    def recall(self) -> None:
        """To be called before states are written to by anybody else: gives up what is read ahead of them."""
        if self._updater is not None:
            self._updater.recall()

    def wait_for(self, unit: int) -> None:
        """Returns when the unit's last update is over and its pages are free; raises what went wrong in it."""
        tickets = self._tickets.get(unit)
        if tickets is None:
            return
        self._wait(tickets.done)
        del self._tickets[unit]

    def wait_until_published(self, unit: int) -> None:
        """Returns when the unit's new parameters can be read, which is before their states are written."""
        tickets = self._tickets.get(unit)
        if tickets is not None:
            self._wait(tickets.published)

    def _wait(self, ticket: native.Ticket) -> None:
        start = time.perf_counter()
        with naming(self._name_page):
            ticket.wait(self._deadline_seconds)
        self.gate_seconds += time.perf_counter() - start

    def ticket(self, unit: int) -> native.Ticket | None:
        """Of the unit's update under way; None without one."""
        tickets = self._tickets.get(unit)
        return tickets.done if tickets is not None else None

    def is_done(self, unit: int) -> bool:
        """Whether no update of the unit is under way."""
        ticket = self.ticket(unit)
        return ticket is None or ticket.done()

    def come_to(self, unit: int) -> None:
        """The forward pass is about to use the unit, which comes before those of higher numbers."""

    def is_published(self, unit: int) -> bool:
        tickets = self._tickets.get(unit)
        return tickets is None or tickets.published.done()

    def pending(self) -> dict[int, native.Ticket]:
        """The tickets of the updates under way, by unit."""
        return {unit: tickets.done for unit, tickets in self._tickets.items()}

    def drain(self) -> None:
        """Waits for every unit."""
        for unit in list(self._tickets):
            self.wait_for(unit)

    def utilisation(self) -> dict[str, float]:
        assert self._updater is not None
        return self._updater.utilisation()

    def prepare_close(self) -> None:
        """To be called before the last ``drain``."""

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
