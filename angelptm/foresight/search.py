"""Looks for settings: the fastest step of a model on a machine, and the largest model of a family that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from angelptm.config import Config, load_config
from angelptm.config.schema import Hardware
from angelptm.engine.setup import budgets_of, buffer_bytes_of, lay_out, plan_of
from angelptm.errors import AngelPTMError, CapacityError
from angelptm.foresight.outlook import CONTEXT_BYTES, Outlook, Target, outlook_of, require_memory
from angelptm.foresight.step import Foreseen, foresee
from angelptm.model.materialize import build_model
from angelptm.plan import Plan, plan_from_trace

_MIB = 2**20
_PAGE_SIZES = (2**20, 4 * 2**20, 16 * 2**20)
_CHOOSING_SECONDS = 3.0
_SLOWER = 0.98  # than the best so far: larger micro-batches are not tried then
# What a family's models differ in, first that which decides its name; all of them get the same number.
_LAYER_KEYS = (("num_layers", "num_decoder_layers"), ("n_layer",), ("num_hidden_layers",))

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Proposal:
    """``changes`` are keys of the config, as --set takes them, and their values."""

    changes: Mapping[str, Any]
    plan: Plan
    outlook: Outlook


class Search:
    """Settings for one config on one machine. A step has the same sequences in all of them."""

    def __init__(self, config: Config, model: nn.Module, target: Target, hardware: Hardware | None) -> None:
        self._config, self._model, self._target, self._hardware = config, model, target, hardware
        self._buffers = buffer_bytes_of(model)

    def run(self, progress: Progress) -> list[Proposal]:
        """Those that fit, the fastest first. Raises CapacityError, that of the first try, where nothing fits."""
        found: list[tuple[Proposal, Foreseen]] = []
        refusal: CapacityError | None = None
        for recompute in dict.fromkeys((self._config.gradient_checkpointing, False, True)):
            best = 0.0
            for micro, accumulation in self._batches():
                changes = {
                    "data.micro_batch_size": micro,
                    "gradient_accumulation_steps": accumulation,
                    "gradient_checkpointing": recompute,
                }
                progress(f"micro-batches of {micro}, {'recomputing' if recompute else 'keeping'} activations")
                try:
                    proposal, foreseen = self._try(changes)
                except CapacityError as error:
                    refusal = refusal or error
                    break
                found.append((proposal, foreseen))
                if proposal.outlook.tokens_per_s < _SLOWER * best:
                    break
                best = max(best, proposal.outlook.tokens_per_s)
        if not found:
            assert refusal is not None
            raise refusal
        fastest, foreseen = max(found, key=lambda one: one[0].outlook.tokens_per_s)
        proposals = [proposal for proposal, _ in found]
        progress("page sizes and update modes")
        sizes = [size for size in _PAGE_SIZES if size != self._config.page_size]
        others: list[dict[str, Any]] = [{"page_size": f"{size // _MIB}MiB"} for size in sizes]
        if not self._config.update.is_swept:
            others.append({"update.mode": "lock_free"})
        for other in others:
            try:
                proposals.append(self._with({**fastest.changes, **other}, foreseen))
            except AngelPTMError:  # what does not fit, or does not go together
                continue
        # What is as fast to three digits has fewer changes first.
        return sorted(proposals, key=lambda one: (-float(f"{one.outlook.tokens_per_s:.3g}"), len(one.changes)))

    def _batches(self) -> Iterator[tuple[int, int]]:
        """Micro-batches and how many of them make the config's step."""
        sequences = self._config.data.micro_batch_size * self._config.gradient_accumulation_steps
        micro = 1
        while micro <= sequences:
            if sequences % micro == 0:
                yield micro, sequences // micro
            micro *= 2

    def _try(self, changes: Mapping[str, Any]) -> tuple[Proposal, Foreseen]:
        config = changed(self._config, changes)
        plan = plan_of(*lay_out(self._model, config), config, self._buffers, self._hardware)
        foreseen = foresee(self._model, config, plan, self._target.operators)
        if self._target.device_bytes is not None:
            # Pages get what activations leave of the device.
            beside = foreseen.activation_bytes + foreseen.workspace_bytes + CONTEXT_BYTES
            size = (self._target.device_bytes - beside) // _MIB * _MIB
            if size >= plan.page_bytes:  # else it is refused below
                changes = {**changes, "tiers.device": f"{size // _MIB}MiB"}
        return self._with(changes, foreseen), foreseen

    def _with(self, changes: Mapping[str, Any], foreseen: Foreseen) -> Proposal:
        config = changed(self._config, changes)
        plan = plan_from_trace(foreseen.trace, budgets_of(config, self._buffers, self._hardware))
        outlook = outlook_of(foreseen, config, plan, self._target, _CHOOSING_SECONDS)
        require_memory(plan, outlook.activation_bytes, outlook.workspace_bytes, config, self._target)
        return Proposal(changes, plan, outlook)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    return load_config(config, [f"{key}={_yaml(value)}" for key, value in changes.items()])


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Largest:
    """The largest model that fits, by its number of layers, and what it takes; ``refusal`` says why one more layer does
    not fit."""

    layers: int
    parameters: int
    plan: Plan
    outlook: Outlook
    refusal: str


class _Family:
    """Models that differ in their number of layers. What lives on the device beside pages grows evenly with it."""

    def __init__(self, config: Config, target: Target, hardware: Hardware | None) -> None:
        self._config, self._target, self._hardware = config, target, hardware
        self._keys = _layer_keys(build_model(config))
        # The first layer may make what all others take.
        two, three = (self._foresee(*self._planned(layers)) for layers in (2, 3))
        self._second = two.activation_bytes
        self._more = max(0, three.activation_bytes - self._second)
        self._workspace = three.workspace_bytes

    def plan(self, layers: int) -> tuple[Config, nn.Module, Plan]:
        """Raises CapacityError where it does not fit."""
        activations = self._second + self._more * (layers - 2)
        found = self._planned(layers, {"tiers.device": self._left_for_pages(activations)})
        require_memory(found[2], activations, self._workspace, found[0], self._target)
        return found

    def _left_for_pages(self, activations: int) -> int:
        """Of the device, at most what the config allows."""
        most = self._config.tiers.device
        if self._target.device_bytes is None:
            return most
        left = self._target.device_bytes - activations - self._workspace - CONTEXT_BYTES
        return max(self._config.page_size, min(most, left))

    def outlook(self, config: Config, model: nn.Module, plan: Plan) -> Outlook:
        return outlook_of(self._foresee(config, model, plan), config, plan, self._target, 0.0)

    def _planned(self, layers: int, changes: Mapping[str, Any] | None = None) -> tuple[Config, nn.Module, Plan]:
        config = changed(self._config, {**{f"model.config.{key}": layers for key in self._keys}, **(changes or {})})
        model = build_model(config)
        return config, model, plan_of(*lay_out(model, config), config, buffer_bytes_of(model), self._hardware)

    def _foresee(self, config: Config, model: nn.Module, plan: Plan) -> Foreseen:
        return foresee(model, config, plan, self._target.operators)


def largest_that_fits(config: Config, target: Target, hardware: Hardware | None, progress: Progress) -> Largest:
    """Of the models that differ from the config's in their number of layers. Raises CapacityError where not even two
    layers fit, and AngelPTMError for a model whose layers have no known name."""
    family = _Family(config, target, hardware)
    best: tuple[Config, nn.Module, Plan] | None = None
    refusals: dict[int, CapacityError] = {}

    def fits(layers: int) -> bool:
        nonlocal best
        progress(f"{layers} layers")
        try:
            best = family.plan(layers)
        except CapacityError as error:
            refusals[layers] = error
            return False
        return True

    low, high = 0, 2
    while fits(high):
        low, high = high, high * 2
    if best is None:
        raise refusals[high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    found, model, plan = best
    parameters = sum(unit.layout.numel for unit in plan.units)
    progress(f"a step of {low} layers")
    return Largest(low, parameters, plan, family.outlook(found, model, plan), str(refusals[high]))


def _layer_keys(model: nn.Module) -> tuple[str, ...]:
    config = getattr(model, "config", None)
    for keys in _LAYER_KEYS:
        if config is not None and all(hasattr(config, key) for key in keys):
            return keys
    raise AngelPTMError(
        f"--max-scale: {type(model).__name__} has no number of layers that is known: "
        f"expected one of {', '.join(keys[0] for keys in _LAYER_KEYS)} in its configuration."
    )
