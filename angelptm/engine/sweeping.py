"""Updates that nobody waits for: gradients go into accumulators, from which updating threads take them as they come
round, and computing goes on with the newest parameters that are published."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import angelptm_native as native

from angelptm.config.schema.execution import Update
from angelptm.engine.update_events import UpdateEvents
from angelptm.engine.updates import Updates
from angelptm.errors import AngelPTMError, ConfigError
from angelptm.pages import PageIds
from angelptm.plan import Plan

_ORDERS = {
    "auto": native.SweepOrder.MOST_GRADIENTS,
    "round_robin": native.SweepOrder.ROUND_ROBIN,
    "most_gradients": native.SweepOrder.MOST_GRADIENTS,
    "next_needed": native.SweepOrder.NEXT_NEEDED,
}
_COMBINES = {"mean": native.Combine.MEAN, "sum": native.Combine.SUM}
# Computing goes first where both want a core: an update that comes later costs staleness, a step that waits costs time.
# While something waits for them, the updating threads are not nice.
_NICENESS = 19


def sweep_options(update: Update, plan: Plan) -> native.SweepOptions | None:
    """None where updates are submitted. Until a plan says otherwise units are needed in their own order."""
    if not update.is_swept:
        return None
    return native.SweepOptions(
        order=_ORDERS[update.order],
        combine=_COMBINES[update.gradients],
        spare_frames=plan.spare_frames,
        ranks=[rank for rank, unit in enumerate(plan.units) for _ in unit.spans],
        niceness=_NICENESS,
    )


@dataclass(frozen=True)
class Held:
    """A unit's parameters at one moment: for each page its frame, which keeps its content until it is released, and its
    version; and for each span the gradients that are in them at least."""

    frames: tuple[int, ...]
    versions: tuple[int, ...]
    included: tuple[int, ...]


class Patience:
    """Seconds for which a step may stand still for parameters that lack gradients, though it might use them."""

    def __init__(self, share: float) -> None:
        """``share`` of the shorter of the two steps before, since between two steps there may be an evaluation; what a
        step leaves is not the next one's."""
        self._share = share
        self._began = time.perf_counter()
        self._lasted = math.inf
        self.left = 0.0

    def begin_step(self) -> None:
        now = time.perf_counter()
        lasted = now - self._began
        self.left = self._share * min(lasted, self._lasted)
        self._began, self._lasted = now, lasted

    def spend(self, seconds: float) -> None:
        self.left = max(0.0, self.left - seconds)


@dataclass(frozen=True)
class UpdateFacts:
    """``gradients``: of spans, produced, taken, applied. ``staleness``: unit → how often a step computed with
    parameters that lacked so many of its gradients."""

    gradients: dict[str, int]
    staleness: dict[str, Counter[int]]

    def since(self, former: UpdateFacts) -> dict[str, Any]:
        """What came after ``former``, as JSON; ``waiting`` is what is produced and not applied by now."""
        counts = {name: count - former.gradients[name] for name, count in self.gradients.items()}
        counts["waiting"] = self.gradients["produced"] - self.gradients["applied"]
        lags = {name: seen - former.staleness[name] for name, seen in self.staleness.items()}
        return {
            "gradients": counts,
            "staleness": {name: dict(sorted(own.items())) for name, own in lags.items() if own},
        }


class _Applied:
    """Stands for the ticket of an update: all gradients of a unit that were handed over by now."""

    def __init__(self, updater: native.Updater, spans: list[int], what: str) -> None:
        self._updater, self._spans, self._what = updater, spans, what
        self._counts = updater.produced(spans)

    def done(self) -> bool:
        return self._updater.are_applied(self._spans, self._counts)

    def wait(self, deadline_seconds: float) -> None:  # noqa: ARG002
        """``deadline_seconds`` is the store's own."""
        self._updater.wait_applied(self._spans, self._counts, self._what)


class SweptUpdates(Updates):
    """One native updater for the run, that sweeps.

    ``submit`` hands a gradient over and returns; ``wait_for`` waits until all of a unit's are applied, as does
    ``drain`` for all units: afterwards pages are nobody's but the caller's, as in the synchronous mode.
    """

    def __init__(self, store: native.Store, plan: Plan, pages: PageIds, update: Update, **options: Any) -> None:
        """``options`` as for Updates."""
        super().__init__(store, plan, pages, sweep=sweep_options(update, plan), **options)
        self._store = store
        self._from_step = plan.grad_sets == 2
        self.most_behind = update.most_behind
        """Steps whose gradients the parameters that compute may lack; None for any number."""
        self.patience = Patience(0.0 if update.replay is not None else update.waits_share)
        self._spans = [
            [self._native_span[index, span] for span in range(len(unit.spans))] for index, unit in enumerate(plan.units)
        ]
        self._first_versions: dict[int, tuple[int, ...]] = {}  # unit → of its pages, before any update
        self._events = self._open_events(update)
        self._open: dict[int, bool] = {}  # unit → whether gradients of earlier steps were in its accumulators
        self.staleness: list[Counter[int]] = [Counter() for _ in plan.units]
        """Of each unit: how often a step computed with parameters that lacked so many of its gradients."""

    def _open_events(self, update: Update) -> UpdateEvents | None:
        """Begins to record, or to do again what was recorded."""
        assert self._updater is not None, "not closed"
        events = None
        if update.replay is not None:
            needed = self._plan.update_threads + 1
            if self._plan.ring_depth < needed:
                raise ConfigError(
                    "update.ring_depth",
                    self._plan.ring_depth,
                    f"at least {needed} with update.replay and {self._plan.update_threads} threads",
                )
            recorded = UpdateEvents.load(update.replay, [len(spans) for spans in self._spans])
            self._updater.replay(recorded.takes, recorded.uses)
        if update.record is not None:
            self._updater.record()
            events = UpdateEvents(update.record, [len(spans) for spans in self._spans])
        self.replays = update.replay is not None
        """Whether each use waits for the parameters that the recorded one had."""
        return events

    def prepare_close(self) -> None:
        """Nothing that drains will wait for what does not come: not for a gradient in the making, nor for the rest of
        what was recorded."""
        if self._updater is not None:
            self.put_back()
            if self.replays:
                self._updater.end_replay()

    def close(self) -> None:
        if self._events is not None and self._updater is not None:
            self._events.takes, self._events.uses = self._updater.recorded()
            self._events.save()
        super().close()

    @property
    def adds_as_it_comes(self) -> bool:
        """Whether a step's gradient goes straight into the accumulators, which ``open`` takes."""
        return not self._from_step

    # Gradients.

    def is_open(self, unit: int) -> bool:
        return unit in self._open

    def open(self, unit: int, *, wait_until_empty: bool) -> list[tuple[int, int]]:
        """Takes a unit's accumulators for its next gradient; returns the elements of the unit, (start, end), to which
        it is to be added. With ``wait_until_empty`` there are none, so that the gradient can still be dropped."""
        assert self._updater is not None, "not closed"
        spans, held = self._spans[unit], list[tuple[int, int]]()
        if wait_until_empty:
            start = time.perf_counter()
            self._updater.open_empty(spans, f"gradients of unit {self._name(unit)} to be taken by an update")
            self.gate_seconds += time.perf_counter() - start
        else:
            for index, ranges in enumerate(self._updater.open(spans)):
                first = index * self._plan.page_elements
                held += [(first + start, first + start + count) for start, count in ranges]
        self._open[unit] = bool(held)
        return held

    def has_added(self) -> bool:
        """Whether a gradient that was begun lies among those of earlier steps."""
        return any(self._open.values())

    def put_back(self) -> bool:
        """Gives up the gradients that were begun. Says whether that spoiled those of earlier steps."""
        assert self._updater is not None, "not closed"
        spoiled = self.has_added()
        for unit in self._open:
            self._updater.put_back(self._spans[unit])
        self._open.clear()
        return spoiled

    def submit(
        self,
        unit: int,
        updated: Sequence[tuple[int, int, int]],
        hypers: Sequence[native.Hyper],
        rank: int,  # noqa: ARG002
    ) -> None:
        """Hands a unit's gradient over. ``updated`` as in Updates; ``rank`` plays no part."""
        assert self._updater is not None, "not closed"
        work = self._work(unit, updated)
        if self.adds_as_it_comes:
            assert unit in self._open, "its accumulators are open"
            del self._open[unit]
            given = {span for span, _ in work}
            if left := [span for span in self._spans[unit] if span not in given]:
                self._updater.put_back(left)
        if work:
            self._updater.hand_over(work, list(hypers), from_step=self._from_step)

    # Parameters.

    def hold(self, unit: int, pages: Sequence[int]) -> Held:
        """The newest parameters. ``pages``: the unit's PARAM pages."""
        assert self._updater is not None, "not closed"
        if self.replays:
            self._updater.await_use(self._spans[unit], f"the parameters of unit {self._name(unit)} that were recorded")
        # Before the frames, which may have more in them, and never less.
        included = tuple(self._updater.published(self._spans[unit]))
        found = self._store.hold(pages)
        return Held(tuple(frame for frame, _ in found), tuple(version for _, version in found), included)

    def used(self, unit: int, held: Held) -> None:
        """A step is about to compute with these."""
        if self._updater is not None and (self.replays or self._events is not None):
            publishes = list[int]()
            if self._events is not None:
                first = self._first_versions.setdefault(unit, held.versions)
                publishes = [now - before for now, before in zip(held.versions, first)]
            spans = self._spans[unit]
            self._updater.used(spans, publishes[: len(spans)] or [0] * len(spans))

    def release(self, frames: Sequence[int]) -> None:
        self._store.release_held(frames)

    def lag(self, unit: int, held: Held) -> int:
        """Most gradients of a span that the parameters lack."""
        assert self._updater is not None, "not closed"
        produced = self._updater.produced(self._spans[unit])
        return max((made - there for made, there in zip(produced, held.included)), default=0)

    def is_current_enough(self, unit: int) -> bool:
        """Whether what is published lacks no more gradients than it may."""
        assert self._updater is not None, "not closed"
        if self.most_behind is None:
            return True
        spans = self._spans[unit]
        published = self._updater.published(spans)
        return all(made - there <= self.most_behind for made, there in zip(self._updater.produced(spans), published))

    def wait_until_current_enough(self, unit: int) -> None:
        assert self._updater is not None, "not closed"
        assert self.most_behind is not None, "there is a bound"
        start = time.perf_counter()
        what = f"gradients of unit {self._name(unit)} to be in its parameters"
        self._updater.wait_published(self._spans[unit], self.most_behind, what)
        self.gate_seconds += time.perf_counter() - start

    def wait_patiently(self, unit: int) -> bool:
        """Waits as long as there is patience left, and says whether what is published now lacks no gradient."""
        assert self._updater is not None, "not closed"
        start = time.perf_counter()
        came: bool = self._updater.wait_all_published(self._spans[unit], self.patience.left)
        self.gate_seconds += time.perf_counter() - start
        return came

    def come_to(self, unit: int) -> None:
        if self._updater is not None:
            self._updater.set_position(unit)

    def facts(self) -> UpdateFacts:
        """So far."""
        counts = self.utilisation()
        return UpdateFacts(
            {name: int(counts[f"gradients_{name}"]) for name in ("produced", "taken", "applied")},
            {unit.layout.name: Counter(seen) for unit, seen in zip(self._plan.units, self.staleness)},
        )

    # As in the synchronous mode.

    def wait_for(self, unit: int) -> None:
        """Returns when all gradients of a unit are applied; raises the first error of any update, and AngelPTMError
        where a gradient of this step is among them that no step has taken."""
        if self._open.get(unit):
            raise AngelPTMError(
                f"the gradients of unit {self._name(unit)} cannot all be applied now, since those of a step that has "
                "not ended are among them. Call step() first, or give them up with optimizer.zero_grad()."
            )
        start = time.perf_counter()
        self._applied(unit).wait(self._deadline_seconds)
        self.gate_seconds += time.perf_counter() - start

    def ticket(self, unit: int) -> None:  # noqa: ARG002
        """Nothing waits for an update under way."""
        return

    def is_done(self, unit: int) -> bool:
        return self._applied(unit).done()

    def is_published(self, unit: int) -> bool:  # noqa: ARG002
        return True

    def pending(self) -> dict[int, _Applied]:  # type: ignore[override]
        waiting = {unit: self._applied(unit) for unit in range(len(self._spans))}
        return {unit: applied for unit, applied in waiting.items() if not applied.done()}

    def drain(self) -> None:
        for unit in range(len(self._spans)) if self._updater is not None else ():
            self.wait_for(unit)

    def _applied(self, unit: int) -> _Applied:
        assert self._updater is not None, "not closed"
        return _Applied(self._updater, self._spans[unit], f"the update of unit {self._name(unit)}")

    def _name(self, unit: int) -> str:
        return self._plan.units[unit].layout.name
