"""Budgets as tight as a model allows, and training loops that compare."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from angelptm.config import Config, load_config
from angelptm.engine import Engine
from angelptm.engine.setup import lay_out, plan_of
from angelptm.errors import CapacityError

from .models import Family, loss_of
from .reference import Reference

PAGE = 64 * 2**10
EVERYTHING_ON_SSD = {"param": "ssd", "grad": "ssd", "states": "ssd"}


def tight_config(model: nn.Module, folder: Path, *, device: int = 0, **keys: Any) -> Config:
    """The smallest device budget that the plan accepts, page by page, and the host budget that its refusal asks for.

    ``device``: at least so much of it. ANGELPTM_TEST_DEVICE is where the model computes, cpu if not set. ``keys`` are
    those of the configuration; all pages live on the SSD unless ``placement`` says otherwise.
    """
    content: dict[str, Any] = {"page_size": PAGE, "placement": EVERYTHING_ON_SSD} | keys
    content.setdefault("optimizer", {"lr": 1e-2})
    content.setdefault("device", os.environ.get("ANGELPTM_TEST_DEVICE", "cpu"))
    budgets = {"device": max(device, content["page_size"]), "host": content["page_size"]}
    while True:
        config = load_config({**content, "tiers": {**budgets, "ssd": [{"path": str(folder / "pages")}]}})
        try:
            plan_of(*lay_out(model, config), config)
        except CapacityError as refusal:
            step = content["page_size"] if refusal.tier == "device" else refusal.needed_bytes - budgets["host"]
            assert step > 0, "a refusal asks for more than there is"
            budgets[refusal.tier] += step
        else:
            return config


def batches_of(family: Family, config: Config, step: int) -> list[dict[str, torch.Tensor]]:
    count = config.gradient_accumulation_steps
    return [family.batch(step * count + micro) for micro in range(count)]


def train_step(engine: Engine, batches: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    """One optimizer step in the engine's own style; the losses of its micro-batches."""
    losses = []
    for batch in batches:
        loss = loss_of(engine(**batch))
        losses.append(loss.detach())
        engine.backward(loss)
        engine.step()
    return losses


def train(engine: Engine, family: Family, steps: int, first: int = 0) -> list[torch.Tensor]:
    return [
        loss
        for step in range(first, first + steps)
        for loss in train_step(engine, batches_of(family, engine.config, step))
    ]


def train_both(engine: Engine, reference: Reference, family: Family, steps: int, *, first: int = 0) -> None:
    """Trains both and compares losses as they come; seeds before each step, so that dropout draws the same numbers."""
    for step in range(first, first + steps):
        batches = batches_of(family, engine.config, step)
        torch.manual_seed(step)
        expected = reference.train_step(batches)
        torch.manual_seed(step)
        found = train_step(engine, batches)
        assert torch.equal(torch.stack(found), torch.stack(expected)), f"losses of step {step}"
        if engine.config.gradient_clipping is not None:
            assert engine.grad_norm == reference.grad_norm, f"gradient norm of step {step}"


def assert_same_parameters(engine: Engine, reference: Reference) -> None:
    """Every parameter in compute precision and every fp32 master, bit by bit."""
    model = dict(reference.model.named_parameters())
    assert engine.parameter_names() == list(model) or set(engine.parameter_names()) == set(model)
    values, masters = engine.state_dict(), engine.state_dict(master=True)
    for name, param in model.items():
        assert torch.equal(values[name], param.detach()), f"parameter {name}"
        assert torch.equal(masters[name].float(), reference.master_of(name)), f"master of {name}"


def assert_all_tiers_moved(engine: Engine, steps: int) -> None:
    """Every step brought the parameters from the SSD to the device, and states and gradients to the SSD and back."""
    params = sum(unit.layout.numel for unit in engine.plan.units) * engine.plan.param_itemsize
    traffic = engine.traffic()
    assert traffic["device"]["written"] >= steps * params, "parameters were fetched at least once a step"
    assert traffic["ssd"]["read"] >= steps * params
    assert traffic["ssd"]["written"] >= steps * params
    assert traffic["host"]["read"] > 0
    assert traffic["host"]["written"] > 0
    assert engine.plan.arena.peak_frames < sum(unit.frame_count for unit in engine.plan.units), "units share frames"


def snapshot(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values[name].clone() for name in values}


def assert_same_values(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def graph_nodes(tensor: torch.Tensor) -> Iterator[Any]:
    """All nodes of the autograd graph behind a tensor."""
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)
