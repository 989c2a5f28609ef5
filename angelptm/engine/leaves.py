"""The arena-backed parameters of a unit, and their exchange with the parked ones in the modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakMethod

import torch
from torch import nn

from angelptm.device import Device
from angelptm.engine.parked import ParkedParameter
from angelptm.errors import AngelPTMError
from angelptm.units import ParamLayout, UnitLayout


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def put(module: nn.Module, attribute: str, param: torch.Tensor) -> None:
    """Exchanges a registered parameter. RNNs keep a second list of their weights, which only ``setattr`` updates."""
    if isinstance(module, nn.RNNBase):
        setattr(module, attribute, param)
    else:
        module._parameters[attribute] = param  # type: ignore[assignment]


@dataclass
class _Slot:
    """One owner's place: the module's attribute, the parked parameter and the leaf to exchange it for."""

    module: nn.Module
    attribute: str
    parked: ParkedParameter
    layout: ParamLayout


class UnitLeaves:
    """Places a unit's parameters into its modules and takes them out again.

    Each owner of a tied parameter gets a leaf of its own over the same memory, so that each gradient is taken when it
    is complete for that owner, instead of waiting in autograd for the last one. Where a gradient is added to that of an
    earlier backward pass, all owners share one leaf instead: autograd adds up one pass before it adds the passes, and
    (a1 + b1) + (a2 + b2) has other bits than ((a1 + b1) + a2) + b2. Leaves are made once for each arena offset and
    kept: their identity is what autograd's graph refers to between forward and backward.
    """

    def __init__(
        self,
        layout: UnitLayout,
        model: nn.Module,
        device: Device,
        dtype: torch.dtype,
        gradient_is_paged: Callable[[str], bool],
        on_gradient: Callable[[int, int, ParamLayout, torch.Tensor], None],
        *,
        one_leaf: bool,
    ) -> None:
        """``on_gradient`` gets unit, leaf, parameter and gradient. ``one_leaf``: the owners of a tied parameter share
        their leaf from the first backward pass on, as they must where pages keep gradients in more precision than
        autograd does."""
        self.layout = layout
        self.itemsize = dtype.itemsize
        self.placed = False
        self._places: set[int] = set()  # arena offsets that the step's graphs may refer to
        self._device = device
        self._dtype = dtype
        self._gradient_is_paged = gradient_is_paged
        self._on_gradient = on_gradient
        self._one_leaf = one_leaf
        self._leaves: dict[int, list[nn.Parameter]] = {}
        self._slots: list[_Slot] = []
        self.parked: dict[str, ParkedParameter] = {}
        for param in layout.params:
            parked = ParkedParameter(
                param.name,
                param.shape,
                dtype,
                device.torch_device,
                param.trainable,
                lambda name=param.name: gradient_is_paged(name),  # type: ignore[misc]
            )
            self.parked[param.name] = parked
            for module_name, attribute in param.owners:
                self._slots.append(_Slot(model.get_submodule(module_name), attribute, parked, param))

    def place(self, arena_offset: int) -> None:
        """Puts the leaves at ``arena_offset`` (bytes) into the modules. The unit must be resident there.

        They have the requires_grad that the user gives the parked ones. Raises AngelPTMError where that asks for the
        gradient of a parameter without states.
        """
        if self.placed:
            return
        first: dict[str, nn.Parameter] = {}
        for slot in self._slots:
            if slot.parked.requires_grad and not slot.layout.trainable:
                raise AngelPTMError(
                    f"parameter {slot.layout.name}: requires_grad is True, but it was frozen when the engine was made, "
                    "so it has neither gradients nor states. Set it before initialize."
                )
        for slot, leaf in zip(self._slots, self._leaves_at(arena_offset)):
            leaf.requires_grad = slot.parked.requires_grad
            name = slot.layout.name
            shared = self._one_leaf or self._gradient_is_paged(name)
            put(slot.module, slot.attribute, first.setdefault(name, leaf) if shared else leaf)
        self.placed = True
        if torch.is_grad_enabled():
            self._places.add(arena_offset)

    @property
    def at_one_place(self) -> bool:
        """Whether the step's graphs refer to one set of leaves at most."""
        return len(self._places) <= 1

    def end_step(self) -> None:
        """The next step makes graphs of its own."""
        self._places.clear()

    def forget(self) -> None:
        """Drops the leaves, as the unit gets another place. No graph of theirs will be used any more."""
        assert not self.placed, "parked"
        self._leaves.clear()

    def park(self) -> None:
        for slot in self._slots:
            put(slot.module, slot.attribute, slot.parked)
        self.placed = False

    def _leaves_at(self, arena_offset: int) -> list[nn.Parameter]:
        if arena_offset not in self._leaves:
            # Also when the first use of all is an evaluation, whose tensors could never be trained.
            with torch.inference_mode(False):
                self._leaves[arena_offset] = [
                    self._make(index, slot.layout, arena_offset) for index, slot in enumerate(self._slots)
                ]
        return self._leaves[arena_offset]

    def _make(self, index: int, param: ParamLayout, arena_offset: int) -> nn.Parameter:
        start = arena_offset + param.offset * self._dtype.itemsize
        view = self._device.view(start, param.shape, contiguous_stride(param.shape), self._dtype)
        leaf = nn.Parameter(view, requires_grad=param.trainable)
        leaf.param_name = param.name  # type: ignore[attr-defined]
        if param.trainable:
            # Autograd's own reference to the hook is one that Python's collector does not see, so the hook must not
            # keep what keeps the leaf.
            on_gradient = WeakMethod(self._take)

            def take(grown: torch.Tensor) -> None:
                assert grown.grad is not None, "the hook runs after accumulation"
                gradient, grown.grad = grown.grad, None
                taken_by = on_gradient()
                assert taken_by is not None, "the model's hooks keep the engine's parts"
                taken_by(index, param, gradient)

            leaf.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        return leaf

    def _take(self, index: int, param: ParamLayout, gradient: torch.Tensor) -> None:
        self._on_gradient(self.layout.index, index, param, gradient)
