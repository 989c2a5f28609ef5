"""Which units are in the device arena, and the moves that bring them there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import angelptm_native as native
import torch

from angelptm.device import Device
from angelptm.engine.leaves import UnitLeaves
from angelptm.engine.loading import loading
from angelptm.engine.parked import ParkedParameter
from angelptm.engine.updates import Updates
from angelptm.errors import AngelPTMError, CapacityError
from angelptm.pages import PageIds
from angelptm.plan import Plan


@dataclass
class _State:
    """A unit's place in the arena, in frames. ``offset`` is None while it is not there.

    ``pins`` counts the modules that are computing with it, which may not lose it. ``in_backward`` marks a unit whose
    gradients are still coming: it stays unless its frames are needed, and comes back on use. ``version`` counts changes
    of its parameters.
    """

    planned_offset: int
    frames: int
    offset: int | None = None
    pins: int = 0
    in_backward: bool = False
    version: int = 0


class Residency:
    """Fetches units on demand into their planned frames and parks them.

    A unit placed in its modules is resident and current; a resident unit is current, since an update makes it leave.
    """

    def __init__(
        self,
        plan: Plan,
        pages: PageIds,
        store: native.Store,
        device: Device,
        leaves: Sequence[UnitLeaves],
        updates: Updates,
        name_page: Callable[[int], str],
    ) -> None:
        self._plan = plan
        self._name_page = name_page
        self._pages = pages
        self._mover = store.mover
        self._device = device
        self._leaves = leaves
        self._updates = updates
        self._units = [_State(unit.frame_offset, unit.frame_count) for unit in plan.units]
        self._on_device = [not unit.params for unit in pages]
        for state, always in zip(self._units, self._on_device):
            if always:
                state.offset = state.planned_offset
        self.fetch_seconds = 0.0
        self.fetch_count = 0
        self.off_plan_count = 0
        self.peak_frames = self._used_frames()

    def _used_frames(self) -> int:
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

    def fetch(self, unit: int) -> None:
        """Makes a unit resident with its newest parameters; returns when they are there."""
        state = self._units[unit]
        self._updates.wait_for(unit)
        if state.offset is not None:
            return
        start = time.perf_counter()
        self._load(unit, self._make_room(unit))
        self.fetch_seconds += time.perf_counter() - start
        self.fetch_count += 1

    def pin(self, unit: int) -> None:
        """Fetches a unit and places it in its modules, until as many calls of ``unpin``."""
        self.fetch(unit)
        self._leaves[unit].place(self.arena_offset(unit))
        self._units[unit].pins += 1

    def unpin(self, unit: int) -> None:
        state = self._units[unit]
        assert state.pins > 0, "unpin follows pin"
        state.pins -= 1
        if state.pins == 0 and not state.in_backward:
            self._leaves[unit].park()

    def enter_backward(self, unit: int) -> None:
        """Fetches and places a unit for its backward pass, until ``leave_backward``."""
        self.fetch(unit)
        self._units[unit].in_backward = True
        self._leaves[unit].place(self.arena_offset(unit))

    def leave_backward(self) -> None:
        """Parks every unit that no module is computing with: the backward pass is over."""
        for unit, state in enumerate(self._units):
            state.in_backward = False
            if state.pins == 0 and self._leaves[unit].placed:
                self._leaves[unit].park()

    def release_pins(self) -> None:
        """Forgets pins of a forward pass that ended in an exception."""
        for unit, state in enumerate(self._units):
            state.pins = 0
            if not state.in_backward and self._leaves[unit].placed:
                self._leaves[unit].park()

    def expire(self, unit: int) -> None:
        """The unit's parameters are about to change: what the arena holds is no longer current."""
        assert self._units[unit].pins == 0, "no module computes with a unit that is updated"
        self._units[unit].version += 1
        if not self._on_device[unit]:
            self._evict(unit)

    def _evict(self, unit: int) -> None:
        if self._leaves[unit].placed:
            self._leaves[unit].park()
        self._units[unit].offset = None
        self._units[unit].in_backward = False

    def _make_room(self, unit: int) -> int:
        """Frees the unit's planned frames, or finds others when a unit in use holds some of them."""
        state = self._units[unit]
        if self._blockers(state.planned_offset, state.frames):
            self.off_plan_count += 1
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
        raise CapacityError(
            "device",
            (sum(self._units[index].frames for index in in_use) + frames) * page,
            self._plan.device_frames * page,
            f"unit {self._plan.units[unit].layout.name} beside {names}, which are in use at the same time,",
            "Raise tiers.device.",
        )

    def _load(self, unit: int, offset: int) -> None:
        start = offset * self._plan.page_bytes
        with loading(self._mover, self._pages[unit].params, self._name_page):
            while (page := self._mover.next_loaded()) is not None:
                index, address, size = page
                self._device.copy_in(start + index * self._plan.page_bytes, address, size)
        self._units[unit].offset = offset
        self.peak_frames = max(self.peak_frames, self._used_frames())

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
        if self._units[saved.unit].offset is None:
            self.fetch(saved.unit)
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
