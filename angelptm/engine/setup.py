"""From a model and a config to a plan and filled pages: everything that happens before the first step."""

from __future__ import annotations

import fnmatch
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from angelptm.checkpoint.slot_files import slot_file_bytes
from angelptm.config import Config
from angelptm.config.schema import Hardware
from angelptm.errors import AngelPTMError
from angelptm.plan import ALONE, Budgets, CommitBudget, Party, Plan, SsdBudget, SweepBudget, make_plan
from angelptm.states.formats import FP32, MOMENT_COUNT, StateFormats
from angelptm.states.layout import choose_page_elements
from angelptm.units import ParamSpec, Structure, UnitLayout, find_structure, pack

ITEMSIZE = {"fp32": 4, "bf16": 2}


def grad_precision(config: Config) -> str:
    """Gradients are kept in compute precision, and in fp32 where several micro-batches or steps are added up."""
    added_up = config.gradient_accumulation_steps > 1 or config.update.is_swept
    return "fp32" if added_up else config.precision


def updates_in_backward(config: Config) -> bool:
    """Whether units are updated as their gradients complete, where nothing about the unit itself forbids it."""
    wanted = config.execution.updates
    in_backward = wanted == "backward" or (wanted == "auto" and config.gradient_clipping is None)
    return in_backward and config.execution.moves != "serial"


def _sweep_budget(config: Config) -> SweepBudget | None:
    """A step's gradient may be added to those of former steps as it comes, where nothing needs it alone first: not its
    norm, and not the other micro-batches."""
    if not config.update.is_swept:
        return None
    as_it_comes = updates_in_backward(config) and config.gradient_accumulation_steps == 1
    return SweepBudget(grad_sets=1 if as_it_comes else 2)


def parameter(model: nn.Module, owner: tuple[str, str]) -> torch.Tensor:
    found: torch.Tensor = getattr(model.get_submodule(owner[0]), owner[1])
    return found


def lay_out(model: nn.Module, config: Config) -> tuple[Structure, list[UnitLayout]]:
    """The model's units in pages of the configured size. Reads shapes and requires_grad, no values."""
    structure = find_structure(model, config.units.classes)
    formats = StateChoice(config)
    units = []
    for unit in structure.units:
        params = []
        for name, owners in unit.params.items():
            value = parameter(model, owners[0])
            if not value.is_floating_point():
                raise AngelPTMError(f"parameter {name}: found {value.dtype}, expected a floating-point parameter")
            shape, trainable = tuple(value.shape), value.requires_grad
            states = formats.of(name, shape) if trainable else FP32
            params.append(ParamSpec(name, shape, trainable, tuple(owners), states))
        units.append(params)
    page_elements = choose_page_elements(
        [(math.prod(spec.shape), spec.states) for params in units for spec in params if spec.trainable],
        page_bytes=config.page_size,
        param_itemsize=ITEMSIZE[config.precision],
        grad_itemsize=ITEMSIZE[grad_precision(config)],
        moment_count=MOMENT_COUNT[config.optimizer.type],
    )
    layouts = [
        pack(unit.name, index, params, page_elements)
        for index, (unit, params) in enumerate(zip(structure.units, units))
    ]
    return structure, layouts


class StateChoice:
    """Which formats the states of each parameter have, as the config says."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._optimizer = config.optimizer

    def of(self, name: str, shape: tuple[int, ...]) -> StateFormats:
        """The first group that matches decides, then ``optimizer.states``; int8 is left to matrices of some size."""
        states = self._optimizer.states
        for group in self._optimizer.groups:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in group.params):
                states = group.states or states
                break
        split = states.master == "split" or (states.master is None and self._config.precision == "bf16")
        exp_avg, exp_avg_sq = states.exp_avg, states.exp_avg_sq
        if len(shape) < 2 or math.prod(shape) < states.int8_from_elements:
            exp_avg, exp_avg_sq = ("fp32" if one == "int8" else one for one in (exp_avg, exp_avg_sq))
        return StateFormats("split" if split else "fp32", exp_avg, exp_avg_sq)


def existing_folder(path: Path) -> Path:
    """The nearest folder above ``path`` that exists: whose file system it will be on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _free_bytes(folders: Sequence[Path], ranks_here: int) -> list[int]:
    """Free space for each folder as it is now; folders on one file system share it in equal parts, as do the ranks."""
    existing = [existing_folder(folder) for folder in folders]
    devices = [folder.stat().st_dev for folder in existing]
    return [
        shutil.disk_usage(folder).free // devices.count(device) // ranks_here
        for folder, device in zip(existing, devices)
    ]


def budgets_of(
    config: Config, buffer_bytes: int = 0, hardware: Hardware | None = None, party: Party = ALONE
) -> Budgets:
    """The config's budgets, with the disks' free space as it is now: what the run's own slot files take already, which
    it will use again, counts as free. ``buffer_bytes``: of the model's buffers, which commits hold. ``hardware``: of
    the machine that is planned for; its cores count, and its drives where they are not this machine's. ``party``: which
    of several ranks."""
    commits = config.checkpoint.folder if party.commits else None
    # Without an SSD tier the slots of commits are beside their manifests.
    folders = [folder.path for folder in config.tiers.ssd] or ([commits] if commits is not None else [])
    free = _free_bytes(folders, party.here)
    if commits is not None:
        free = [size + own // party.here for size, own in zip(free, slot_file_bytes(commits, folders))]
    cores = len(os.sched_getaffinity(0))
    if hardware is not None:
        for index, one in enumerate(hardware.ssd[: len(free)]):
            if one.capacity is not None and not one.path.exists():  # what a drive here has free is known better
                free[index] = one.capacity
        cores = hardware.host.cores if hardware.host is not None else cores
    return Budgets(
        page_bytes=config.page_size,
        device_bytes=config.tiers.device,
        host_bytes=config.tiers.host,
        ssd=tuple(
            SsdBudget(str(folder.path), folder.size, available) for folder, available in zip(config.tiers.ssd, free)
        ),
        param=config.placement.param,
        grad=config.placement.grad,
        states=config.placement.states,
        update_threads=None if config.update.threads == "auto" else config.update.threads,
        ring_depth=None if config.update.ring_depth == "auto" else config.update.ring_depth,
        queue_depth=config.io.queue_depth,
        states_on_device=config.device == "cpu",  # where the CPU updates them in place
        device_is_apart=config.device != "cpu",
        cores=max(1, cores // party.here),
        share=party.share,
        sweep=_sweep_budget(config),
        commits=None
        if commits is None
        else CommitBudget(config.checkpoint.keep, SsdBudget(str(commits), None, free[-1]), buffer_bytes),
    )


def buffer_bytes_of(model: nn.Module) -> int:
    return sum(value.numel() * value.itemsize for value in persistent_buffers(model).values())


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong to the model's state, by name: those that ``state_dict`` has."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        for key, value in module._buffers.items():
            if value is not None and key not in module._non_persistent_buffers_set:
                found[f"{name}.{key}" if name else key] = value
    return found


def plan_of(
    structure: Structure,
    layouts: Sequence[UnitLayout],
    config: Config,
    buffer_bytes: int = 0,
    hardware: Hardware | None = None,
    party: Party = ALONE,
) -> Plan:
    """The plan, of one of several ranks where there are some; raises CapacityError when something does not fit. See
    budgets_of for the last three."""
    return make_plan(
        layouts,
        [(site.units, site.depth) for site in structure.sites],
        budgets_of(config, buffer_bytes, hardware, party),
        param_itemsize=ITEMSIZE[config.precision],
        grad_itemsize=ITEMSIZE[grad_precision(config)],
        moment_count=MOMENT_COUNT[config.optimizer.type],
    )


def param_groups(
    names: Sequence[str], config: Config, given: Sequence[dict[str, Any]] | None, names_by_id: dict[int, str]
) -> list[dict[str, Any]]:
    """Optimizer groups with parameter names under ``params``.

    ``given`` are torch-style groups of the model's own parameters; without them the config's patterns decide, the first
    that matches winning, and what is left forms a group with the top-level values. Raises AngelPTMError when there is
    nothing to train.
    """
    if not names:
        raise AngelPTMError("the model has no parameter to train: requires_grad is False for all of them")
    if given is not None:
        groups = []
        for group in given:
            members = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
            unknown = [param for param in members if id(param) not in names_by_id]
            if unknown:
                raise AngelPTMError(f"param_groups: a parameter of shape {tuple(unknown[0].shape)} is not the model's")
            groups.append({**group, "params": [names_by_id[id(param)] for param in members]})
        listed = {name for group in groups for name in group["params"]}
        if missing := [name for name in names if name not in listed]:
            raise AngelPTMError(
                f"param_groups: trainable parameters are in no group, among them {missing[0]}. "
                "Add them, or set requires_grad_(False)."
            )
        return groups
    left = list(names)
    groups = []
    for own in config.optimizer.groups:
        matching = [name for name in left if any(fnmatch.fnmatchcase(name, pattern) for pattern in own.params)]
        left = [name for name in left if name not in set(matching)]
        if matching:
            groups.append({"params": matching, **own.model_dump(include={"lr", "weight_decay"}, exclude_none=True)})
    return ([{"params": left}] if left else []) + groups


def checkpoint_blocks(model: nn.Module, structure: Structure) -> None:
    """Recomputes the blocks' activations in backward: the model's own switch where it has one."""
    # The second is what transformers called it before 5.23.
    for switch in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, switch):
            getattr(model, switch)({"use_reentrant": False})
            return
    from torch.utils.checkpoint import checkpoint

    for site in structure.sites:
        module = model.get_submodule(site.module_name)
        if site.module_name and any(True for _ in module.children()):
            forward = module.forward

            def recomputed(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
                return checkpoint(_forward, *args, use_reentrant=False, **kwargs)

            module.forward = recomputed
