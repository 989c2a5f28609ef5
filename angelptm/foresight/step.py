"""A step that nobody runs: the trace that a model would leave, from shapes alone and from a machine's rates.

The model's forward and backward run on fake tensors, so that autograd, checkpointing and the order of uses are the real
ones, whatever the size. What an operator takes is measured on this machine, with tensors of the same shapes, or for
another machine the longer of its arithmetic and its memory traffic.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from angelptm.config import Config
from angelptm.engine.dtypes import TORCH_DTYPES
from angelptm.engine.hooks import in_graph_task, made_since, tensors_in
from angelptm.engine.setup import checkpoint_blocks, lay_out
from angelptm.engine.tracing import Tracer
from angelptm.plan import Plan, Trace
from angelptm.units import ParamLayout, Site

_OPERATOR_SECONDS = 0.005  # that each is timed for, at least
_MOST_SETS, _SPOILT_BYTES = 16, 96 * 2**20  # of tensors, to take turns with: more than caches hold
_FREE = frozenset(
    {
        "prim.device.default",
        "aten.view.default",
        "aten._unsafe_view.default",
        "aten.t.default",
        "aten.transpose.int",
        "aten.permute.default",
        "aten.expand.default",
        "aten.slice.Tensor",
        "aten.select.int",
        "aten.unsqueeze.default",
        "aten.squeeze.dim",
        "aten.detach.default",
        "aten.alias.default",
        "aten.split.Tensor",
        "aten.as_strided.default",
        "aten.lift_fresh.default",
    }
)
"""Operators that make views, or ask something of a tensor: they move nothing."""


@dataclass(frozen=True)
class ComputeRates:
    """Of a device: matrix products by precision ("fp32", "bf16"), memory traffic of what its caches hold
    (``cache_bytes``) and of more, and the seconds of a call that does nothing."""

    flops_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    cached_bytes_per_s: float
    cache_bytes: int
    call_seconds: float

    def seconds(self, precision: str, flops: int, moved: int) -> float:
        """Of an operator: the longer of arithmetic and traffic."""
        rate = self.cached_bytes_per_s if moved <= self.cache_bytes else self.memory_bytes_per_s
        return self.call_seconds + max(flops / self.flops_per_s[precision], moved / rate)


class Operators(Protocol):
    """Says what an operator takes, in seconds."""

    def seconds(self, func: Any, args: Any, kwargs: Any, flops: int, moved: int) -> float: ...


class Roofline:
    """From rates alone, for a machine that is not this one. See :class:`Operators`."""

    def __init__(self, rates: ComputeRates, precision: str) -> None:
        self._rates, self._precision = rates, precision

    def seconds(self, _func: Any, _args: Any, _kwargs: Any, flops: int, moved: int) -> float:
        return self._rates.seconds(self._precision, flops, moved)


class Timed:
    """From this machine: each operator is run with tensors of its shapes, once for all calls that are alike, unless it
    is larger than ``most_bytes``. See :class:`Operators`."""

    def __init__(self, rates: ComputeRates, precision: str, device: torch.device, most_bytes: int = 2**29) -> None:
        self._rates, self._precision, self._device, self._most_bytes = rates, precision, device, most_bytes
        self._found: dict[object, float] = {}

    def seconds(self, func: Any, args: Any, kwargs: Any, flops: int, moved: int) -> float:
        estimate = self._rates.seconds(self._precision, flops, moved)
        if moved > self._most_bytes:
            return estimate
        flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        key = (func, str(spec), tuple(_signature(leaf) for leaf in flat))
        if key not in self._found:
            try:
                self._found[key] = self._measure(func, flat, spec, moved)
            except (RuntimeError, IndexError, ValueError):  # of values that the shapes do not tell
                self._found[key] = estimate
        return self._found[key]

    def _measure(self, func: Any, flat: list[Any], spec: Any, moved: int) -> float:
        """With several sets of tensors in turn, as a step's operators do not find theirs in the caches."""
        count = max(1, min(_MOST_SETS, _SPOILT_BYTES // max(1, moved)))
        with unset_fake_temporarily():
            sets = [torch.utils._pytree.tree_unflatten([self._real(leaf) for leaf in flat], spec) for _ in range(count)]
            taken: list[float] = []
            end = time.perf_counter() + _OPERATOR_SECONDS
            for args, kwargs in itertools.cycle(sets):
                self._synchronize()
                start = time.perf_counter()
                func(*args, **kwargs)
                self._synchronize()
                taken.append(time.perf_counter() - start)
                if len(taken) > max(3, count) and time.perf_counter() > end:
                    break
        return statistics.median(taken[1:]) + self._rates.call_seconds

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _real(self, leaf: Any) -> Any:
        """A tensor like a fake one. Indices are zeros, and so valid for whatever they index."""
        if not isinstance(leaf, torch.Tensor):
            return self._device if isinstance(leaf, torch.device) else leaf
        whole = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=self._device)
        return whole.normal_() if leaf.is_floating_point() else whole.zero_()


def _signature(leaf: Any) -> object:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype)
    return leaf if isinstance(leaf, (int, float, str, bool, type(None))) else str(leaf)


class _Clock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what the operators that come by would take."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operators = operators
        self.seconds = 0.0
        self.flops = 0
        self.largest = 0  # bytes that one operator makes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if str(func) in _FREE:
            return out
        flops = 0
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            flops = count(*args, **kwargs, out_val=out)
        moved = sum(tensor.numel() * tensor.itemsize for tensor in _tensors((args, kwargs, out)))
        self.largest = max(self.largest, sum(tensor.numel() * tensor.itemsize for tensor in _tensors(out)))
        self.flops += flops
        self.seconds += self._operators.seconds(func, args, kwargs, flops, moved)
        return out


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf


@dataclass(frozen=True)
class Foreseen:
    """``model_flops`` of one step, matrix products alone and recomputation left out: what MFU is counted from.
    ``largest_bytes``: the most that one operator makes."""

    trace: Trace
    model_flops: int
    largest_bytes: int

    @property
    def activation_bytes(self) -> int:
        """Most that autograd keeps for backward at once."""
        return activation_bytes_of(self.trace)

    @property
    def workspace_bytes(self) -> int:
        """What operators need meanwhile, as an estimate: what goes into the largest, and what comes out of it."""
        return 2 * self.largest_bytes

    def repeated(self, count: int) -> Foreseen:
        """The same with so many micro-batches one after the other: gradients are complete in the last of them."""
        one = self.trace
        length = len(one.uses)
        uses = [replace(use, last=use.last + length * number) for number in range(count) for use in one.uses]
        gradients = [
            replace(
                done,
                use=done.use + length * (count - 1),
                bytes=done.bytes * count,
                copy_seconds=done.copy_seconds * count,
            )
            for done in one.gradients
        ]
        trace = replace(
            one,
            uses=tuple(uses),
            gradients=tuple(gradients),
            step_seconds=one.step_seconds * count,
            tokens_per_step=one.tokens_per_step * count,
        )
        return Foreseen(trace, self.model_flops * count, self.largest_bytes)

    def with_gradient_copies(self, bytes_per_s: float) -> Trace:
        """The trace, with the time that the computing thread takes to bring gradients to their pages."""
        gradients = [replace(one, copy_seconds=one.bytes / bytes_per_s) for one in self.trace.gradients]
        return replace(self.trace, gradients=tuple(gradients))


def foresee(model: nn.Module, config: Config, plan: Plan, operators: Operators) -> Foreseen:
    """The trace of one step of ``model`` with a single micro-batch; the model needs no values and is left as it is.

    Activations are what autograd would keep; copying of gradients takes no time of its own, as on a device that does
    not compute meanwhile. See Foreseen.repeated for steps of several micro-batches.
    """
    trace, clock = _step(model, config, plan, operators, recompute=config.gradient_checkpointing)
    flops = clock.flops
    if config.gradient_checkpointing:
        flops = _step(model, config, plan, operators, recompute=False)[1].flops
    return Foreseen(trace, flops, clock.largest)


def _step(
    model: nn.Module, config: Config, plan: Plan, operators: Operators, *, recompute: bool
) -> tuple[Trace, _Clock]:
    model = copy.deepcopy(model)
    structure, _ = lay_out(model, config)
    if recompute:
        checkpoint_blocks(model, structure)
    units = {
        owner: (unit.layout.index, param)
        for unit in plan.units
        for param in unit.layout.params
        for owner in param.owners
    }
    with FakeTensorMode():
        _make_fake(model, TORCH_DTYPES[config.precision])
        clock = _Clock(operators)
        tracer = Tracer(plan, structure.sites, now=lambda: clock.seconds)
        watch = _Watch(model, structure.sites, tracer, units, plan.grad_itemsize)
        model.train()
        with clock:
            with watch.saving():
                output = model(**_inputs(config))
            output.loss.backward()
            tracer.end_backward()
            del output
        ended = tracer.end_step(config.data.sequence_length * config.data.micro_batch_size, {"foreseen": True})
    assert ended, "a step has uses and gradients"
    assert tracer.trace is not None
    return tracer.trace, clock


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts fake tensors of the CPU in the place of all parameters and buffers; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is None:
                continue
            if id(param) not in made:
                empty = torch.empty(param.shape, dtype=dtype)
                made[id(param)] = nn.Parameter(empty, requires_grad=param.requires_grad)
            module._parameters[name] = made[id(param)]
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def _inputs(config: Config) -> dict[str, torch.Tensor]:
    shape = (config.data.micro_batch_size, config.data.sequence_length)
    tokens = torch.empty(shape, dtype=torch.int64)
    return {"input_ids": tokens, "labels": torch.empty(shape, dtype=torch.int64)}


class _Watch:
    """Tells a tracer of the uses of a model on fake tensors, as Hooks does of a real one."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        tracer: Tracer,
        units: Mapping[tuple[str, str], tuple[int, ParamLayout]],
        grad_itemsize: int,
    ) -> None:
        self._tracer = tracer
        self._at: int | None = None
        self._kept: dict[int, int] = {}  # bytes of storages, by identity
        self._unit_of: dict[int, int] = {}  # of parameters, by identity
        self._saved_units: set[int] = set()
        for name, module in model.named_modules():
            for attribute, param in module._parameters.items():
                if param is None or id(param) in self._unit_of:
                    continue
                unit, layout = units[(name, attribute)]
                self._unit_of[id(param)] = unit
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(self._taker(unit, layout.numel * grad_itemsize))
        for index, site in enumerate(sites):
            self._attach(model.get_submodule(site.module_name), site, index)

    def _taker(self, unit: int, size: int) -> Callable[[torch.Tensor], None]:
        def take(grown: torch.Tensor) -> None:
            grown.grad = None
            self._tracer.gradient(unit, size, 0.0)

        return take

    def _attach(self, module: nn.Module, site: Site, index: int) -> None:
        entered: list[int] = []
        needed_if_saved = not any(True for _ in module.children())

        def enter(_module: nn.Module, _args: Any) -> None:
            self._at = None
            self._tracer.enter(index, "recompute" if in_graph_task() else "forward")
            entered.append(torch._C._autograd._get_sequence_nr())

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            sequence = entered.pop()
            self._tracer.leave_forward(index, sum(self._kept.values()))
            for tensor in tensors_in(output):
                if made_since(tensor, sequence):
                    tensor.register_hook(come_back)  # type: ignore[no-untyped-call]

        def come_back(_gradient: torch.Tensor) -> None:
            if self._at == index or (needed_if_saved and not self._saved_units.intersection(site.units)):
                return
            self._tracer.enter(index, "backward")
            self._at = index

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Counts what autograd keeps, parameters apart."""
        self._kept.clear()
        self._saved_units.clear()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            unit = self._unit_of.get(id(tensor if tensor._base is None else tensor._base))
            if unit is not None:
                self._saved_units.add(unit)
            else:
                storage = tensor.untyped_storage()
                self._kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def activation_bytes_of(trace: Trace) -> int:
    """Most that autograd keeps for backward at once."""
    return max((use.activation_bytes for use in trace.uses), default=0)
