"""Which units are in the device arena, and the fetches that bring them there, ahead of use or on demand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import angelptm_native as native
import torch

from angelptm.device import Device
from angelptm.engine.leaves import UnitLeaves
from angelptm.engine.parked import ParkedParameter
from angelptm.engine.sweeping import Held, SweptUpdates
from angelptm.engine.updates import Updates
from angelptm.errors import AngelPTMError, CapacityError
from angelptm.pages import PageIds, naming
from angelptm.plan import Plan
from angelptm.ranks import Arrival, Gatherer
from angelptm.ranks.gather import GatheredPage
from angelptm.sizes import mib


@dataclass
class _State:
    """A unit's place in the arena, in frames. ``offset`` is None while it is not there.

    ``arriving`` is the ticket of a fetch, from all ranks, whose end nobody has seen. ``pins`` counts the modules that
    are computing with the unit, which may not lose it. ``in_backward`` marks a unit whose gradients are still coming:
    it stays unless its frames are needed, and comes back on use; a fetch ahead of use may not take its frames before it
    is ``finished``.
    ``version`` counts changes of its parameters.

    Where nobody waits for updates, ``stale`` says that newer parameters may be published, and that the unit may change
    to them at its next use. ``held`` are those that it computes with, ``there`` the versions of the pages in the arena.
    ``seen`` is set when a step has begun to compute with them, ``in_graph`` when its backward needs them again.
    """

    planned_offset: int
    frames: int
    leaves: int
    offset: int | None = None
    arriving: native.Ticket | Arrival | None = None
    ahead: bool = False
    pins: int = 0
    in_backward: bool = False
    gradients: int = 0
    finished: bool = False
    version: int = 0
    stale: bool = False
    held: Held | None = None
    holds: bool = False
    there: tuple[int, ...] = ()
    seen: bool = False
    in_graph: bool = False
    in_use: bool = False


@dataclass
class FetchCounts:
    """What happened so far. ``stall_seconds``: that computing waited, by cause."""

    fetches: int = 0
    ahead: int = 0
    on_demand: int = 0
    off_plan: int = 0
    stall_seconds: dict[str, float] = field(default_factory=dict)


class Residency:
    """Fetches units into their planned frames and parks them.

    A unit placed in its modules is resident and current; a resident unit is current or arriving, since an update makes
    it leave.
    """

    def __init__(
        self,
        plan: Plan,
        pages: PageIds,
        fetcher: native.Fetcher,
        device: Device,
        leaves: Sequence[UnitLeaves],
        updates: Updates,
        name_page: Callable[[int], str],
        deadline_seconds: float,
        gatherer: Gatherer | None,
    ) -> None:
        """``gatherer``: brings the pages of other ranks; None where this one has all."""
        self._plan = plan
        self._gatherer = gatherer
        self._uint8_pages: dict[tuple[int, int], list[GatheredPage]] = {}  # by unit and offset
        self._name_page = name_page
        self._pages = pages
        self._fetcher = fetcher
        self._deadline_seconds = deadline_seconds
        self._device = device
        self._leaves = leaves
        self._updates = updates
        self._swept = updates if isinstance(updates, SweptUpdates) else None
        self._units = [
            _State(unit.frame_offset, unit.frame_count, sum(len(p.owners) for p in unit.layout.params if p.trainable))
            for unit in plan.units
        ]
        self._on_device = [not unit.params for unit in pages]
        for state, always in zip(self._units, self._on_device):
            if always:
                state.offset = state.planned_offset
        self.counts = FetchCounts()
        self.fetch_seconds = 0.0
        self.stall_listeners: list[Callable[[str, float, float], None]] = []
        """Called with cause, start and end (time.perf_counter) of each wait of the computing thread for a unit."""
        self.peak_frames = self.used_frames

    @property
    def used_frames(self) -> int:
        return sum(state.frames for state in self._units if state.offset is not None)

    def arena_offset(self, unit: int) -> int:
        """First byte of a resident unit."""
        offset = self._units[unit].offset
        assert offset is not None, "the unit is resident"
        return offset * self._plan.page_bytes

    def unit_at(self, arena_offset: int) -> int | None:
        """The resident unit that covers a byte of the arena."""
        frame = arena_offset // self._plan.page_bytes
        for unit, state in enumerate(self._units):
            if state.offset is not None and state.offset <= frame < state.offset + state.frames:
                return unit
        return None

    def versions(self) -> list[int]:
        """How often each unit's parameters have changed."""
        return [state.version for state in self._units]

    def is_trained(self, unit: int) -> bool:
        """Whether a step may change the unit."""
        return self._units[unit].leaves > 0

    def fetch(self, unit: int) -> None:
        """Makes a unit resident with its newest parameters; returns when they are there."""
        state = self._units[unit]
        if self._on_device[unit]:
            if not self._updates.is_published(unit):
                start = time.perf_counter()
                self._updates.wait_until_published(unit)
                self._stalled("update", unit, start)
            return
        if state.offset is None:
            self.counts.on_demand += 1
            self._begin(unit, self._make_room(unit), urgent=True)
        elif state.stale:
            self._renew(unit, urgent=True)
        if state.arriving is not None:
            self._await(unit, state)
        if self._swept is not None:
            self._check_staleness(unit, state)

    def _check_staleness(self, unit: int, state: _State) -> None:
        """Waits until the unit lacks no more gradients than it may, and notes how many it lacks."""
        swept = self._swept
        assert swept is not None, "the caller has looked"
        assert state.held is not None, "a unit that is there was held"
        state.in_graph |= torch.is_grad_enabled()
        if state.seen:
            return
        lag = swept.lag(unit, state.held)
        if swept.most_behind is not None and lag > swept.most_behind:
            start = time.perf_counter()
            swept.wait_until_current_enough(unit)
            self._stalled("update", unit, start)
            lag = self._change_to_newest(swept, unit, state)
        elif lag > 0 and swept.patience.left > 0:
            start = time.perf_counter()
            came = swept.wait_patiently(unit)
            self._stalled("update", unit, start)
            if came:
                lag = self._change_to_newest(swept, unit, state)
            swept.patience.spend(time.perf_counter() - start)
        state.seen = True
        swept.used(unit, state.held)
        if torch.is_grad_enabled():
            swept.staleness[unit][lag] += 1

    def _change_to_newest(self, swept: SweptUpdates, unit: int, state: _State) -> int:
        """Returns how many gradients these lack."""
        state.stale = True
        self._renew(unit, urgent=True)
        if state.arriving is not None:
            self._await(unit, state)
        assert state.held is not None, "just renewed"
        return swept.lag(unit, state.held)

    def _renew(self, unit: int, *, urgent: bool) -> None:
        """Brings the newest parameters to where the unit is, those pages that have changed."""
        state = self._units[unit]
        assert state.offset is not None, "the unit is resident"
        if state.arriving is not None:
            self._await(unit, state)  # whoever still writes to its frames
        self._begin(unit, state.offset, urgent=urgent)

    def wait_for_update(self, unit: int) -> None:
        """Returns when the unit's last update is over and its pages are free: the computing thread stands still till
        then. Raises what went wrong in it."""
        waits, start = not self._updates.is_done(unit), time.perf_counter()
        self._updates.wait_for(unit)
        if waits:
            self._tell("update", unit, start, time.perf_counter())

    def fetch_ahead(self, unit: int) -> bool:
        """Begins the fetch of a unit that will be used soon, if the units in its planned frames can be spared now.

        Says whether it is resident or on its way. Waits for nothing.
        """
        state = self._units[unit]
        if self._swept is not None and (state.stale or state.offset is None):
            if self._swept.replays or not self._swept.is_current_enough(unit):
                return False
            if state.offset is not None:
                if state.pins > 0 or (state.arriving is not None and not state.arriving.done()):
                    return False
                self._renew(unit, urgent=False)
        if state.offset is not None:
            return True
        for other in self._occupants(state.planned_offset, state.frames):
            occupant = self._units[other]
            busy = occupant.pins > 0 or self._on_device[other] or (occupant.in_backward and not occupant.finished)
            if busy or self._is_awaited(occupant):
                return False
        self._evict_overlapping(state.planned_offset, state.frames)
        self.counts.ahead += 1
        self._begin(unit, state.planned_offset, urgent=False)
        return True

    def _is_awaited(self, occupant: _State) -> bool:
        """Whether a unit that is on its way must be let come first. Among several ranks until somebody has used it,
        since what has come is a matter of time, and all ranks have to decide the same."""
        if occupant.arriving is None:
            return False
        return self._gatherer is not None or not occupant.arriving.done()

    def _begin(self, unit: int, offset: int, *, urgent: bool) -> None:
        state = self._units[unit]
        start = offset * self._plan.page_bytes
        items = [
            (page, self._device.address(start + index * self._plan.page_elements * self._plan.param_itemsize))
            for index, page in self._pages[unit].own_params
        ]
        what = f"unit {self._plan.units[unit].layout.name}, which is fetched to the device"
        if self._swept is not None:
            state.arriving = self._fetch_held(self._swept, unit, what, items, urgent=urgent)
        else:
            own = self._fetcher.fetch(
                what, items, after=self._updates.ticket(unit), urgent=urgent, computed=self._computed()
            )
            state.arriving = own if self._gatherer is None else self._gather(self._gatherer, unit, start, own)
        state.offset = offset
        state.ahead = not urgent
        self.counts.fetches += 1
        self.peak_frames = max(self.peak_frames, self.used_frames)

    def _gather(self, gatherer: Gatherer, unit: int, start: int, own: native.Ticket) -> Arrival:
        """Has the unit's pages brought to its frames from the ranks that have them."""
        what = f"gathering unit {self._plan.units[unit].layout.name}"
        return gatherer.gather(what, own, self._gathered(unit, start), self._device.behind(), self._deadline_seconds)

    def _gathered(self, unit: int, start: int) -> list[GatheredPage]:
        """The unit's pages in the arena from byte ``start`` on."""
        found = self._uint8_pages.get((unit, start))
        if found is None:
            plan, stride = self._plan, self._plan.page_elements * self._plan.param_itemsize
            sizes = [span.elements for span in plan.units[unit].spans]
            left = plan.units[unit].layout.frozen_elements
            for _ in plan.units[unit].frozen_homes:
                sizes.append(min(left, plan.page_elements))
                left -= sizes[-1]
            found = self._uint8_pages[unit, start] = [
                GatheredPage(
                    self._device.view(start + page * stride, (size * plan.param_itemsize,), (1,), torch.uint8), owner
                )
                for page, (size, owner) in enumerate(zip(sizes, plan.units[unit].owners))
            ]
        return found

    def _fetch_held(
        self, swept: SweptUpdates, unit: int, what: str, items: Sequence[tuple[int, int]], *, urgent: bool
    ) -> native.Ticket | None:
        """The unit's newest parameters; or where it left the arena between forward and backward, those of before."""
        state = self._units[unit]
        if state.held is None or not state.holds or state.stale:
            self._let_go(state)
            former, state.held = state.held, swept.hold(unit, [page for page, _ in items])
            if former is not None and former.versions != state.held.versions:
                state.version += 1  # a graph that refers to the former ones is told
            state.holds, state.stale, state.seen = True, False, False
        held = state.held
        there = state.there if state.offset is not None else ()
        changed = [index for index, version in enumerate(held.versions) if there[index : index + 1] != (version,)]
        state.there = held.versions
        # What stays in the arena until it is renewed need not stay on the host too.
        passed_on = self._plan.params_stay
        if passed_on:
            same = set(range(len(items))) - set(changed)
            swept.release([held.frames[index] for index in same])
            state.holds = False
        if not changed:
            return None
        copies = [(*items[index], held.frames[index]) for index in changed]
        return self._fetcher.fetch_held(what, copies, release=passed_on, urgent=urgent, computed=self._computed())

    def _computed(self) -> int:
        """A mark of what may still read the frames that a fetch is to write to."""
        stream = self._device.copies_in
        return 0 if stream is None else self._device.computed(stream)

    def _use(self, unit: int) -> None:
        """Operations that read the unit are given to the device from here on."""
        state = self._units[unit]
        if not state.in_use:
            state.in_use = True
            self._device.begin_use(*self._frames_of(unit), self._plan.units[unit].layout.name)

    def _end_use(self, unit: int) -> None:
        state = self._units[unit]
        if state.in_use:
            state.in_use = False
            self._device.end_use(*self._frames_of(unit))

    def _frames_of(self, unit: int) -> tuple[int, int]:
        """First byte and size in the arena."""
        return self.arena_offset(unit), self._units[unit].frames * self._plan.page_bytes

    def _let_go(self, state: _State) -> None:
        """Of the parameters that the unit computed with."""
        if state.holds and state.held is not None:
            assert self._swept is not None, "nothing is held otherwise"
            self._swept.release(state.held.frames)
        state.holds = False

    def end_step(self) -> None:
        """Between two steps: from here on a unit may change to newer parameters at its next use."""
        for state in self._units:
            state.in_graph = False
        if self._swept is not None:
            self._swept.patience.begin_step()
        self.renew()

    def renew(self) -> None:
        """Units that no graph of autograd refers to may change to newer parameters at their next use."""
        if self._swept is not None:
            for state in self._units:
                state.stale |= not state.in_graph

    def _await(self, unit: int, state: _State) -> None:
        assert state.arriving is not None, "the caller has looked"
        start = time.perf_counter()
        cause = "fetch" if self._updates.is_published(unit) else "update"
        waits = not state.arriving.done()
        try:
            with naming(self._name_page):
                state.arriving.wait(self._deadline_seconds)
        except BaseException:
            if state.arriving.done():  # else somebody may still write there
                state.offset = state.arriving = None
            raise
        state.arriving = None
        if waits:
            self._stalled(cause, unit, start)

    def _stalled(self, cause: str, unit: int, start: float) -> None:
        end = time.perf_counter()
        self.fetch_seconds += end - start
        self._tell(cause, unit, start, end)

    def _tell(self, cause: str, unit: int, start: float, end: float) -> None:
        name = f"{cause} of {self._plan.units[unit].layout.name}"
        self.counts.stall_seconds[name] = self.counts.stall_seconds.get(name, 0.0) + end - start
        for listener in self.stall_listeners:
            listener(name, start, end)

    def settle(self) -> None:
        """Returns when no fetch is on its way, whatever became of it."""
        for state in self._units:
            if state.arriving is not None:
                with suppress(Exception):
                    state.arriving.wait(self._deadline_seconds)
            self._let_go(state)

    def place_at(self, offsets: Sequence[int]) -> None:
        """Gives units new planned frames, between steps: what is resident elsewhere leaves."""
        for unit, (state, offset) in enumerate(zip(self._units, offsets)):
            if self._on_device[unit] or state.planned_offset == offset:
                continue
            assert state.pins == 0, "nothing computes between steps"
            self._evict(unit)
            self._leaves[unit].forget()
            state.planned_offset = offset

    def pin(self, unit: int) -> None:
        """Fetches a unit and places it in its modules, until as many calls of ``unpin``."""
        self.fetch(unit)
        self._use(unit)
        self._leaves[unit].place(self.arena_offset(unit))
        self._units[unit].pins += 1

    def unpin(self, unit: int) -> None:
        state = self._units[unit]
        assert state.pins > 0, "unpin follows pin"
        state.pins -= 1
        if state.pins == 0 and not state.in_backward:
            self._leaves[unit].park()
            self._end_use(unit)

    def enter_backward(self, unit: int) -> None:
        """Fetches and places a unit for its backward pass, until ``leave_backward``."""
        self.fetch(unit)
        state = self._units[unit]
        if not state.in_backward:
            state.gradients = 0
        state.in_backward, state.finished = True, False
        self._use(unit)
        self._leaves[unit].place(self.arena_offset(unit))

    def go_on(self) -> None:
        """The backward pass has come to another site: what it was at before can be spared."""
        for state in self._units:
            state.finished |= state.in_backward

    def gradient_came(self, unit: int) -> None:
        """One of the unit's leaves has its gradient: after the last one its backward pass is over."""
        state = self._units[unit]
        state.gradients += 1
        if state.gradients >= state.leaves:
            state.finished = True

    def leave_backward(self) -> None:
        """Parks every unit that no module is computing with: the backward pass is over."""
        for unit, state in enumerate(self._units):
            state.in_backward = False
            if state.pins == 0:
                if self._leaves[unit].placed:
                    self._leaves[unit].park()
                self._end_use(unit)

    def release_pins(self) -> None:
        """Forgets pins of a forward pass that ended in an exception."""
        for unit, state in enumerate(self._units):
            state.pins = 0
            if not state.in_backward:
                if self._leaves[unit].placed:
                    self._leaves[unit].park()
                self._end_use(unit)

    def expire(self, unit: int) -> None:
        """The unit's parameters are about to change: what the arena holds is no longer current."""
        assert self._units[unit].pins == 0, "no module computes with a unit that is updated"
        self._units[unit].version += 1
        if self._swept is not None:
            self._units[unit].stale, self._units[unit].in_graph = True, False
            self._units[unit].in_backward = False
            if self._leaves[unit].placed:
                self._leaves[unit].park()
            self._end_use(unit)
        elif not self._on_device[unit]:
            self._evict(unit)

    def _evict(self, unit: int) -> None:
        if self._leaves[unit].placed:
            self._leaves[unit].park()
        state = self._units[unit]
        self._end_use(unit)
        if state.arriving is not None:
            # Whoever has the frames next must not be written over. What went wrong is for those who use the unit.
            with suppress(Exception):
                state.arriving.wait(self._deadline_seconds)
            if not state.arriving.done():
                raise native.DeadlineError(
                    f"waited {self._deadline_seconds} s for the fetch of unit {self._plan.units[unit].layout.name}, "
                    "which is no longer needed, to let go of its frames"
                )
        state.offset = state.arriving = None
        state.in_backward = False

    def _make_room(self, unit: int) -> int:
        """Frees the unit's planned frames, or finds others when a unit in use holds some of them."""
        state = self._units[unit]
        if self._blockers(state.planned_offset, state.frames):
            self.counts.off_plan += 1
            return self._other_room(unit)
        self._evict_overlapping(state.planned_offset, state.frames)
        return state.planned_offset

    def _occupants(self, offset: int, frames: int) -> list[int]:
        return [
            unit
            for unit, state in enumerate(self._units)
            if state.offset is not None and state.offset < offset + frames and offset < state.offset + state.frames
        ]

    def _blockers(self, offset: int, frames: int) -> list[int]:
        return [unit for unit in self._occupants(offset, frames) if self._units[unit].pins > 0 or self._on_device[unit]]

    def _evict_overlapping(self, offset: int, frames: int) -> None:
        for unit in self._occupants(offset, frames):
            self._evict(unit)

    def _other_room(self, unit: int) -> int:
        """A run of frames without a unit in use: for uses that the plan did not foresee. Correct, only slower."""
        frames = self._units[unit].frames
        ends = sorted({0, *(state.offset + state.frames for state in self._units if state.offset is not None)})
        for offset in ends:
            if offset + frames <= self._plan.device_frames and not self._blockers(offset, frames):
                self._evict_overlapping(offset, frames)
                return offset
        in_use = [index for index, state in enumerate(self._units) if state.pins > 0 or self._on_device[index]]
        names = ", ".join(self._plan.units[index].layout.name for index in in_use)
        page = self._plan.page_bytes
        used = sum(self._units[index].frames for index in in_use)
        needed = used + frames
        if needed <= self._plan.device_frames:
            needed = used + (len(in_use) + 1) * (frames - 1) + 1  # enough wherever those in use lie
        raise CapacityError(
            "device",
            needed * page,
            self._plan.device_frames * page,
            f"unit {self._plan.units[unit].layout.name} beside {names}, which are in use at the same time,",
            f"Raise tiers.device to {mib(needed * page)}.",
        )

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the arena. A parked parameter lies nowhere."""
        return not isinstance(tensor, ParkedParameter) and self._device.offset_of(tensor) is not None

    def saved(self, tensor: torch.Tensor) -> SavedParameter | None:
        """A reference to arena memory that autograd wants to keep, or None for a tensor that lies elsewhere."""
        arena_offset = self._device.offset_of(tensor)
        if arena_offset is None:
            return None
        unit = self.unit_at(arena_offset)
        assert unit is not None, "a tensor in the arena belongs to a resident unit"
        return SavedParameter(
            unit,
            self._units[unit].version,
            arena_offset - self.arena_offset(unit),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )

    def restore(self, saved: SavedParameter) -> torch.Tensor:
        """The tensor behind a reference, fetched if it has left.

        Raises AngelPTMError when the unit was updated meanwhile, where torch refuses too: the weights are not those
        that the forward pass computed with.
        """
        if self._units[saved.unit].version != saved.version:
            raise AngelPTMError(
                f"backward: the parameters of unit {self._plan.units[saved.unit].layout.name} were updated since the "
                "forward pass of this graph. Call backward before step, or run the forward pass again."
            )
        self.fetch(saved.unit)
        self._use(saved.unit)
        start = self.arena_offset(saved.unit) + saved.offset
        return self._device.view(start, saved.shape, saved.stride, saved.dtype)


@dataclass(frozen=True)
class SavedParameter:
    """Arena memory by unit and byte offset in it: what autograd saves instead of a tensor whose content may move."""

    unit: int
    version: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
