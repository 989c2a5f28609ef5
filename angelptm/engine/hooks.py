"""Hooks that bring units to the device around each use, forward and backward, in an unmodified model."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from angelptm.device import Device
from angelptm.engine.residency import Residency, SavedParameter
from angelptm.engine.scheduler import Scheduler
from angelptm.engine.tracing import Tracer
from angelptm.units import Site


def _saving_hooks() -> Any:
    """The saved-tensor hooks that autograd would call now, as (pack, unpack), or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def in_graph_task() -> bool:
    """Whether autograd is in a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """Tensors of a module's output: nested tuples, lists, dicts, registered pytrees and dataclasses."""
    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from tensors_in(getattr(leaf, field.name))


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], output: Any) -> Any:
    """The output with ``change`` applied to each tensor that ``tensors_in`` finds."""

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            leaf = copy.copy(leaf)
            for field in dataclasses.fields(leaf):
                object.__setattr__(leaf, field.name, map_tensors(change, getattr(leaf, field.name)))
        return leaf

    return torch.utils._pytree.tree_map(visit, output)


def made_since(tensor: torch.Tensor, sequence: int) -> bool:
    """Whether the operation behind a tensor ran at or after a number of autograd's sequence."""
    return tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= sequence


class Watcher(Protocol):
    """Is told where the computing thread is."""

    def enter(self, site: int, phase: str) -> None: ...

    def leave(self) -> None: ...


class Hooks:
    """Registers itself on the sites of a model and on the model itself.

    - forward: a pre-hook fetches the site's units and pins them, a post-hook lets them go;
    - backward: a hook on each output that the module computed fetches the units again before the site's backward. Not
      on one that it only hands through, whose gradient is complete long after this site's backward: the fetch would
      take the frames from the unit that is at work then;
    - autograd keeps references to arena memory instead of tensors (``saved_tensors_hooks``), so that a weight whose
      frames were used for another unit in between is fetched again on use, and never read from reused frames;
    - an output that is a view of arena memory (a module that returns its own parameter) leaves as a copy.

    Where the user has saved-tensor hooks of their own, those of ``torch.utils.checkpoint`` above all, they stay in
    charge: ours would keep what they want to drop. What they keep of a weight is then a view of its frames, and the
    backward hook of each site brings the weight back to them.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        residency: Residency,
        compute_dtype: torch.dtype,
        scheduler: Scheduler,
        device: Device,
    ) -> None:
        """Inputs of the model are moved to ``device``."""
        self.model = model
        self._residency = residency
        self._scheduler = scheduler
        self._device = device
        self.tracer: Tracer | None = None
        """Told of every use while a step is traced."""
        self.timeline: Watcher | None = None
        """Told of every use, and of the end of each pass, while a timeline is recorded."""
        self._at: tuple[int, str] | None = None  # where the backward pass is
        self._compute_dtype = compute_dtype
        self._in_backward = False
        self._depth = 0
        self._pinned: list[tuple[nn.Module, int]] = []  # and autograd's sequence number when it was entered
        self._saved_units: set[int] = set()
        self._saved_storages: dict[int, int] = {}
        self._contexts: list[Any] = []
        self._handles: list[Any] = []
        self._forward_start = 0.0
        self._backward_start = 0.0
        self.forward_seconds = 0.0
        self.backward_seconds = 0.0
        self.activation_bytes = 0
        """Most bytes that autograd kept for backward in any one forward pass, arena memory not counted."""
        # Entering the model comes before its own site's fetch, and leaving it after.
        self._handles.append(model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        for index, site in enumerate(sites):
            module = model.get_submodule(site.module_name)
            self._attach(module, site, index)
        self._handles.append(model.register_forward_hook(self._leave_model, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _attach(self, module: nn.Module, site: Site, index: int) -> None:
        # A leaf whose weight autograd did not save (an embedding saves only indices) needs no fetch for its backward.
        needed_if_saved = not any(True for _ in module.children())

        def enter(_module: nn.Module, _args: Any) -> None:
            pinned = []
            self._come_to(index, "recompute" if in_graph_task() else "forward")
            try:
                for unit in site.units:
                    self._residency.pin(unit)
                    pinned.append(unit)
            except BaseException:
                for unit in pinned:
                    self._residency.unpin(unit)
                raise
            self._pinned.append((module, torch._C._autograd._get_sequence_nr()))
            self._open_saving()

        def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not self._pinned or self._pinned[-1][0] is not module:
                return None  # enter itself failed, so nothing is pinned here
            only_saved = needed_if_saved and _saving_hooks() == (self._pack, self._unpack)
            own = self._own_output(output)
            self._close_saving()
            _, entered = self._pinned.pop()
            for unit in site.units:
                self._residency.unpin(unit)
            if self.tracer is not None:
                self.tracer.leave_forward(index, sum(self._saved_storages.values()))
            if torch.is_grad_enabled():
                for tensor in tensors_in(output if own is None else own):
                    if made_since(tensor, entered):
                        tensor.register_hook(come_back_if_saved if only_saved else come_back)  # type: ignore[no-untyped-call]
            return own

        def come_back(_gradient: torch.Tensor) -> None:
            self._enter_backward()
            self._come_back_to(index)
            for unit in site.units:
                self._residency.enter_backward(unit)

        def come_back_if_saved(_gradient: torch.Tensor) -> None:
            self._enter_backward()
            if needed := [unit for unit in site.units if unit in self._saved_units]:
                self._come_back_to(index)
                for unit in needed:
                    self._residency.enter_backward(unit)

        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def _come_to(self, index: int, phase: str) -> None:
        self._at = None
        self._device.look_at_memory()
        if phase == "forward" and not torch.is_grad_enabled():
            return  # an evaluation
        if self.tracer is not None:
            self._device.synchronize()  # what a use takes is what passes till the next one
            self.tracer.enter(index, phase)
        if self.timeline is not None:
            self.timeline.enter(index, phase)
        self._scheduler.enter(index, phase)

    def _come_back_to(self, index: int) -> None:
        """The backward pass comes to a site, for the first of its outputs or for another one."""
        if self._at == (index, "backward"):
            return
        self._residency.go_on()
        self._come_to(index, "backward")
        self._at = (index, "backward")

    def _open_saving(self) -> None:
        """Begins to keep references instead of arena tensors, unless we do already or the user's own hooks do."""
        if _saving_hooks() is not None:
            self._contexts.append(None)
            return
        if torch.is_grad_enabled() and not in_graph_task():
            self._saved_units.clear()
            self._saved_storages.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._contexts.append(hooks)

    def _close_saving(self) -> None:
        hooks = self._contexts.pop()
        if hooks is not None:
            hooks.__exit__(None, None, None)

    def _own_output(self, output: Any) -> Any:
        """The output with copies in place of arena views, whose frames are about to be let go; None without any."""

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if self._residency.holds(tensor) else tensor

        if not any(self._residency.holds(tensor) for tensor in tensors_in(output)):
            return None
        return map_tensors(copied, output)

    def _enter_model(self, _model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self._depth == 0 and not in_graph_task():
            self.abandon_backward()
            self._forward_start = time.perf_counter()
            self._pinned.clear()
            self._residency.release_pins()
        self._depth += 1
        self._open_saving()
        target = self._device.torch_device
        if self._compute_dtype is torch.float32 and target.type == "cpu":
            return args, kwargs

        def moved(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            cast = value.is_floating_point() and self._compute_dtype is not torch.float32
            return value.to(target, self._compute_dtype if cast else value.dtype)

        return torch.utils._pytree.tree_map(moved, (args, kwargs))  # type: ignore[no-any-return]

    def _leave_model(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        if self._depth == 0:
            return
        self._depth -= 1
        self._close_saving()
        if self._depth == 0:
            self.forward_seconds += time.perf_counter() - self._forward_start
            if self.timeline is not None:
                self.timeline.leave()
            self.activation_bytes = max(self.activation_bytes, sum(self._saved_storages.values()))

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | SavedParameter:
        saved = self._residency.saved(tensor)
        if saved is None:
            if tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self._saved_storages[storage.data_ptr()] = storage.nbytes()
            return tensor
        self._saved_units.add(saved.unit)
        return saved

    def _unpack(self, saved: torch.Tensor | SavedParameter) -> torch.Tensor:
        return self._residency.restore(saved) if isinstance(saved, SavedParameter) else saved

    def _enter_backward(self) -> None:
        if self._in_backward:
            return
        self._in_backward = True
        self._backward_start = time.perf_counter()
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._in_backward = False
        self.backward_seconds += time.perf_counter() - self._backward_start
        if self.tracer is not None:
            self.tracer.end_backward()
        if self.timeline is not None:
            self.timeline.leave()
        self._residency.leave_backward()

    def abandon_backward(self) -> None:
        """Ends a backward pass whose end was never called because it broke off in an exception."""
        if self._in_backward:
            self._in_backward = False
            self._residency.leave_backward()
