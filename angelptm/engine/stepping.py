"""When a unit is updated: as its gradients complete inside backward, or all units together when the step is taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from angelptm.config import Config
from angelptm.engine.commits import Commits
from angelptm.engine.durability import Progress
from angelptm.engine.gradients import Gradients
from angelptm.engine.leaves import UnitLeaves
from angelptm.engine.optimizer import PagedOptimizer
from angelptm.engine.residency import Residency
from angelptm.engine.scheduler import Scheduler
from angelptm.engine.setup import updates_in_backward
from angelptm.engine.sweeping import SweptUpdates
from angelptm.engine.updates import Updates
from angelptm.errors import AngelPTMError, NonFiniteError
from angelptm.plan import Plan
from angelptm.ranks import Ranks
from angelptm.units import ParamLayout

_REMEDY = "Set execution.updates: forward, which updates nothing before step()."


class Stepping:
    """Takes gradients and hands them to the updater.

    Inside ``engine.backward``, which knows that a step follows, a unit is updated as soon as each of its leaves has its
    gradient, if nothing needs all gradients first (clipping), and if the unit's leaves got one gradient each in an
    earlier step: a leaf that gets several, as in a reentrant checkpoint of a shared layer, has none that is known to be
    the last. Nor has a unit that a step used at several places in the arena, with leaves at each. A unit of which a
    leaf has none in this step (an expert that no token chose) waits for ``take_step``: that it had none in other steps
    says nothing about this one. Units with frozen parameters wait too, since these may be needed after the last
    gradient.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        leaves: Sequence[UnitLeaves],
        gradients: Gradients,
        updates: Updates,
        residency: Residency,
        commits: Commits | None,
        optimizer: PagedOptimizer,
        progress: Progress,
        scheduler: Scheduler,
        on_gradient: Callable[[int, int, float], None],
        is_tracing: Callable[[], bool],
        swept: SweptUpdates | None,
        ranks: Ranks,
    ) -> None:
        """``on_gradient``: gets unit, bytes and the seconds that copying took. While ``is_tracing`` no update begins
        before ``take_step``. ``swept``: the updates, where nobody waits for them."""
        self._config = config
        self._leaves = leaves
        self._gradients = gradients
        self._updates = updates
        self._swept = swept
        self._ranks = ranks
        gradients.reduce(self._callbacks)
        self._residency = residency
        self._commits = commits
        self._optimizer = optimizer
        self._progress = progress
        self._scheduler = scheduler
        self._on_gradient = on_gradient
        self._is_tracing = is_tracing
        self.in_backward = updates_in_backward(config)
        self._may_be_early = [not unit.waits_for_step for unit in plan.units]
        self._early = False  # in a backward pass that a step follows
        self._came: dict[int, list[int]] = {}  # unit → leaves that have their gradient, in this pass
        self._completed: list[int] = []  # units in the order of their last gradient
        self._leaf_counts = [
            sum(len(param.owners) for param in unit.layout.params if param.trainable) for unit in plan.units
        ]
        self._known: set[int] = set()  # units that a step has shown
        self._submitted: set[int] = set()  # by this step
        self._refused: Exception | None = None  # by the commit before, when a backward pass began
        self._options: list[dict[str, Any]] = []  # of the groups, when the step's first unit was updated
        self._seconds_copied = 0.0
        self.seconds = 0.0

    def begin_backward(self, *, step_follows: bool) -> None:
        """To be called before a backward pass of the engine's own."""
        self._came.clear()
        self._completed.clear()
        self._early = False
        if step_follows and self.in_backward and not self._is_tracing():
            self._progress.require_whole()
            try:
                self._make_room()
            except Exception as error:
                self._refused = error  # the step is where it can be tried again
            else:
                self._early = True

    def end_backward(self) -> None:
        """To be called after it: what comes from here on is of a pass that the user runs, perhaps one of many."""
        self._gradients.settle()
        self._early = False

    def require_none_begun(self, action: str, remedy: str) -> None:
        """Refuses what cannot be done between the first update of a step and ``take_step``."""
        if self._submitted or (self._swept is not None and self._swept.has_added()):
            raise AngelPTMError(f"{action}: there are gradients that no step has taken, and updates begun. {remedy}")

    def _make_room(self) -> None:
        if self._commits is not None:
            self._commits.make_room()

    def take_gradient(self, unit: int, leaf: int, param: ParamLayout, gradient: torch.Tensor) -> None:
        """A leaf's gradient is complete, or will be when the device has computed it."""
        self._require_not_submitted(unit, param)
        self._residency.gradient_came(unit)
        before, done = self._callbacks(unit, leaf, param)
        self._seconds_copied = self._gradients.copy_seconds
        self._gradients.accumulate(unit, leaf, param, gradient, before=before, done=done)
        if self._is_tracing():
            self._gradients.look()  # a trace has each gradient where it came

    def _callbacks(self, unit: int, leaf: int, param: ParamLayout) -> tuple[Callable[[], None], Callable[[], None]]:
        """Of a leaf's gradient: before its pages change, and when they have it."""
        size = self._gradients.own_elements(param) * self._leaves[unit].itemsize
        return partial(self._prepare, unit, param), partial(self._taken, unit, leaf, size)

    def _taken(self, unit: int, leaf: int, size: int) -> None:
        """The unit's pages have a leaf's gradient."""
        now = self._gradients.copy_seconds
        self._on_gradient(unit, size, now - self._seconds_copied)
        self._seconds_copied = now
        came = self._came.setdefault(unit, [])
        came.append(leaf)
        if unit in self._completed:
            self._completed.remove(unit)
        self._completed.append(unit)
        if self._early and self._gradients.finite and self._is_complete(unit):
            if not self._submitted:
                self._options = self._current_options()
            self._submit(unit, 1.0)

    def _require_not_submitted(self, unit: int, param: ParamLayout) -> None:
        if unit in self._submitted:
            self._progress.half_done = f"step {self._progress.global_step + 1}"
            raise AngelPTMError(
                f"a gradient of {param.name} came after the update of its unit had begun. {_REMEDY} Parameters and "
                "states are not those of one step now: load a commit."
            )

    def _prepare(self, unit: int, param: ParamLayout) -> None:
        """The unit's gradient pages are about to be written to."""
        self._require_not_submitted(unit, param)
        swept = self._swept
        if swept is None:
            # A leaf whose backward needs no weight comes here without a fetch, which would have waited.
            self._residency.wait_for_update(unit)
        elif swept.adds_as_it_comes and not swept.is_open(unit):
            self._before_change(unit)
            # A gradient that waits for the step may still be dropped or scaled: nothing else is with it.
            as_it_comes = self._early and self._knows_last(unit)
            self._gradients.add_to(unit, swept.open(unit, wait_until_empty=not as_it_comes))

    def _before_change(self, unit: int) -> None:
        """The unit's states may be written to from here on, or in a sweep what waits for its update may be: the commit
        in the making has the unit as it was."""
        if self._commits is None:
            return
        if self._swept is not None and self._commits.lacks(unit):
            self._residency.wait_for_update(unit)
        self._commits.before_change(unit)

    def _knows_last(self, unit: int) -> bool:
        """Whether the unit's last gradient of a pass is known when it comes."""
        return self._may_be_early[unit] and unit in self._known and self._leaves[unit].at_one_place

    def _is_complete(self, unit: int) -> bool:
        came = self._came[unit]
        return self._knows_last(unit) and len(came) == len(set(came)) == self._leaf_counts[unit]

    def begin_step(self) -> None:
        """To be called first: raises what keeps the step from being taken now. It can be tried again then."""
        if self._submitted:
            return
        self._progress.require_whole()
        if self._refused is not None:
            refused, self._refused = self._refused, None
            raise refused
        self._make_room()

    def take_step(self, max_norm: float | None) -> float | None:
        """Hands over what is not yet, in the order in which the next forward needs the units. Returns the norm of the
        gradients where it was asked for, else None."""
        start = time.perf_counter()
        step = self._progress.global_step
        if self._submitted and (max_norm is not None or self._options != self._current_options()):
            self._give_up()
            raise AngelPTMError(
                f"step {step + 1}: options of the optimizer changed between engine.backward and step(), or clipping "
                f"was asked for, when units had been updated with the former ones. {_REMEDY}"
            )
        self._gradients.settle()
        self._gradients.flush()
        if self._ranks.any(not self._gradients.finite, "whether all gradients are finite"):
            late = bool(self._submitted)
            late |= self.drop()
            late = self._ranks.any(late, "whether a unit was updated")
            if late:
                self._progress.half_done = f"step {step + 1}"
            state = (
                f"Other units had been updated before it came, so load the last commit. {_REMEDY}"
                if late
                else "Parameters and states are those of the last good step."
            )
            raise NonFiniteError(
                f"step {step}: a gradient is inf or NaN. {state} Lower optimizer.lr, set gradient_clipping, or look at "
                "the batch."
            )
        norm, grad_scale = None, 1.0
        if max_norm is not None:
            norm = self._gradients.norm()
            grad_scale = min(1.0, max_norm / (norm + 1e-6))
        self._progress.half_done = f"step {step + 1}"
        for unit in sorted(range(len(self._leaves)), key=self._scheduler.rank):
            if self._gradients.params_with_gradient(unit):
                self._submit(unit, grad_scale)
        self._progress.half_done = ""
        self._learn()
        for leaves in self._leaves:
            leaves.end_step()
        self._submitted.clear()
        self._early = False
        self._gradients.passed()
        self._residency.end_step()
        self._progress.global_step += 1
        self._scheduler.expect(self._completed if self.in_backward else self._forward_order())
        if self._config.execution.moves == "planned":
            self._scheduler.end_step()
        self.seconds += time.perf_counter() - start
        return norm

    def end_step(self) -> None:
        """To be called after ``take_step``, when the step was traced: a serial step waits for its updates, which is
        no part of its computing."""
        if self._config.execution.moves == "serial":
            start = time.perf_counter()
            self._updates.drain()
            self.seconds += time.perf_counter() - start

    def _forward_order(self) -> list[int]:
        return sorted(self._completed, key=self._scheduler.rank)

    def _learn(self) -> None:
        """Which units' leaves get one gradient each in a pass. A unit with one that gets more never counts."""
        for unit, came in self._came.items():
            if len(set(came)) < len(came):
                self._may_be_early[unit] = False
            self._known.add(unit)
        self._came.clear()

    def _current_options(self) -> list[dict[str, Any]]:
        return [
            {name: float(value) if isinstance(value, torch.Tensor) else value for name, value in group.items()}
            for group in ({k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups)
        ]

    def _submit(self, unit: int, grad_scale: float) -> None:
        group_of = {
            param.param_name: index
            for index, group in enumerate(self._optimizer.param_groups)
            for param in group["params"]
        }
        present = self._gradients.params_with_gradient(unit) & group_of.keys()
        if not present:
            return
        self._submitted.add(unit)
        runs, keys = self._runs(self._leaves[unit].layout.params, present, group_of)
        hypers = [self._optimizer.hyper(self._optimizer.param_groups[group], step, grad_scale) for group, step in keys]
        if self._swept is None:
            self._residency.wait_for_update(unit)
        if self._swept is None or not self._swept.adds_as_it_comes:
            self._before_change(unit)
        self._residency.expire(unit)
        self._updates.submit(unit, runs, hypers, self._scheduler.rank(unit))
        self._gradients.forget(unit)

    def _runs(
        self, params: Iterable[ParamLayout], present: set[str], group_of: Mapping[str, int]
    ) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
        """Runs of neighbouring parameters that share group and step count, and the (group, step) of each run's index.

        A run reaches to its next member over the gap between them, whose states and gradients are zero.
        """
        runs: list[tuple[int, int, int]] = []
        keys: list[tuple[int, int]] = []
        joins = False
        for param in params:
            if param.name not in present:
                joins = False
                continue
            self._progress.steps_of[param.name] += 1
            key = (group_of[param.name], self._progress.steps_of[param.name])
            if key not in keys:
                keys.append(key)
            if joins and runs[-1][2] == keys.index(key):
                runs[-1] = (runs[-1][0], param.end, runs[-1][2])
            else:
                runs.append((param.offset, param.end, keys.index(key)))
            joins = True
        return runs, keys

    def _give_up(self) -> None:
        if self._submitted:
            self._progress.half_done = f"step {self._progress.global_step + 1}"
            self._submitted.clear()

    def drop(self) -> bool:
        """Drops all gradients. A step that has begun ends half way then, as does one whose gradients were added to
        those of former steps, which says so."""
        self._give_up()
        spoiled = self._swept is not None and self._swept.put_back()
        if spoiled:
            self._progress.half_done = f"step {self._progress.global_step + 1}"
        self._early, self._refused = False, None
        self._came.clear()
        self._gradients.clear()
        self._scheduler.restart()
        return spoiled
