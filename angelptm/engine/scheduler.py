"""Carries out the plan of moves: says at each use what is to be fetched now, and what the updater may read ahead."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import angelptm_native as native

from angelptm.engine.residency import Residency
from angelptm.engine.updates import Updates
from angelptm.pages import PageIds
from angelptm.plan import Schedule, Trace
from angelptm.units import Site


class Scheduler:
    """Follows the computing thread through the uses that the trace foresees.

    A use that comes in its turn issues the moves that the plan has for it. One that does not (an expert that no token
    chose, an evaluation, another order) issues none: its units are fetched on demand, which is slower, counted, and
    never wrong; the plan is taken up again at the next use that it knows, at the latest with the next step.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        pages: PageIds,
        residency: Residency,
        updates: Updates,
        fetcher: native.Fetcher,
    ) -> None:
        self._residency = residency
        self._updates = updates
        self._fetcher = fetcher
        self._pages = pages
        self._first_units = [min(site.units, default=None) for site in sites]
        self._ranks = {unit: rank for rank, unit in enumerate(_in_order(sites))}
        self._expected: tuple[int, ...] = ()
        self._keys: list[tuple[int, str]] = []
        self._due: dict[int, list[tuple[int, int]]] = {}  # use → (unit, use that needs it), in order of need
        self._ahead: dict[int, list[int]] = {}
        self._next = 0
        self._late: deque[tuple[int, int]] = deque()
        self._former = residency.versions()  # of the units, when the step began
        self.schedule: Schedule | None = None
        self.off_plan_uses = 0

    def rank(self, unit: int) -> int:
        """Its place in the order in which a forward pass needs the units."""
        return self._ranks.get(unit, len(self._ranks))

    def expect(self, units: Sequence[int]) -> None:
        """The order in which gradients were complete, for want of a plan."""
        if self.schedule is None:
            self._expected = tuple(units)

    def follow(self, trace: Trace, schedule: Schedule, use_offsets: bool = True) -> None:
        """Takes up a plan, between two steps."""
        self.schedule = schedule
        count = len(trace.uses)
        self._keys = [(use.site, use.phase) for use in trace.uses]
        due, ahead = defaultdict(list), defaultdict(list)
        for fetch in schedule.fetches:
            due[_slot(fetch.trigger, count)].append(
                (fetch.unit, fetch.use if fetch.trigger >= 0 else fetch.use + count)
            )
            if fetch.ssd_pages and fetch.read_ahead_trigger < fetch.trigger:
                ahead[_slot(fetch.read_ahead_trigger, count)].append(fetch.unit)
        self._due = {slot: sorted(fetches, key=lambda one: one[1]) for slot, fetches in due.items()}
        self._ahead = dict(ahead)
        self._ranks = {unit: rank for rank, unit in enumerate(schedule.update_order)}
        self._expected = schedule.read_ahead_order
        if use_offsets:
            self._residency.place_at(schedule.offsets)
        self.restart()

    def restart(self) -> None:
        """The next use is the first of a step."""
        self._next = 0
        self._late.clear()
        self._former = self._residency.versions()

    def enter(self, site: int, phase: str) -> None:
        """The computing thread comes to a use, and has not yet fetched what it needs."""
        if phase == "forward" and (first := self._first_units[site]) is not None:
            self._updates.come_to(first)
        if not self._keys:
            return
        key = (site, phase)
        try:
            use = self._keys.index(key, self._next)
        except ValueError:
            self.off_plan_uses += 1
            return
        self.off_plan_uses += use != self._next
        self._next = use + 1
        self._issue(use)

    def end_step(self) -> None:
        """All updates of the step are handed over."""
        self._updates.expect(self._expected)
        if self._keys:
            self._issue(len(self._keys))
            # What is issued late belongs to the step that begins now.
            self._late = deque((unit, use - len(self._keys)) for unit, use in self._late if use >= len(self._keys))
        self._next = 0
        self._former = self._residency.versions()

    def _issue(self, slot: int) -> None:
        self._late.extend(self._due.get(slot, ()))
        waiting = deque[tuple[int, int]]()
        count = len(self._keys)
        versions = self._residency.versions()
        for unit, use in sorted(self._late, key=lambda one: one[1]):
            # A unit that is needed right now is fetched on demand, and one whose use has passed not at all. The end of
            # a step comes before the first use of the next.
            if use < slot or use == slot < count:
                continue
            # What this step's update will replace is of no use to the next step, even where it is resident.
            outdated = slot < count <= use and versions[unit] == self._former[unit] and self._residency.is_trained(unit)
            if outdated or not self._residency.fetch_ahead(unit):
                waiting.append((unit, use))
        self._late = waiting
        if pages := [page for unit in self._ahead.get(slot, ()) for _, page in self._pages[unit].own_params]:
            self._fetcher.read_ahead(pages)


def _slot(trigger: int, count: int) -> int:
    """The use at whose entry a move is issued; ``count`` stands for the end of the step."""
    return trigger if trigger >= 0 else count + 1 + trigger


def _in_order(sites: Sequence[Site]) -> list[int]:
    return list(dict.fromkeys(unit for site in sites for unit in site.units))
