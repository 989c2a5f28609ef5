"""Recomputing activations changes no bit, whoever asks for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .conftest import MakeBoth, MakeEngine
from .models import FAMILIES, GPT2, PLAIN, T5, Block, Family
from .training import assert_same_parameters, assert_same_values, train, train_both

STEPS = 6


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_configured_checkpointing_equals_training_without(family: Family, make_both: MakeBoth) -> None:
    model = family.model()
    engine, reference = make_both(model, gradient_checkpointing=True)
    if family is T5:  # Whose gradients round differently with checkpointing, also without any engine.
        reference.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    train_both(engine, reference, family, STEPS)
    assert_same_parameters(engine, reference)


def test_configured_checkpointing_with_dropout(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model(dropout=0.3), gradient_checkpointing=True)
    train_both(engine, reference, GPT2, STEPS)
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("family", [GPT2, PLAIN], ids=lambda family: family.name)
def test_configured_checkpointing_keeps_fewer_activations(family: Family, make_engine: MakeEngine) -> None:
    with_it, without = make_engine(family.model(), gradient_checkpointing=True), make_engine(family.model())
    train(with_it, family, 1)
    train(without, family, 1)
    assert with_it.activation_bytes < without.activation_bytes


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_enabled_on_the_transformers_model(reentrant: bool, make_both: MakeBoth) -> None:
    model = GPT2.model()
    engine, reference = make_both(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    train_both(engine, reference, GPT2, STEPS)
    assert_same_parameters(engine, reference)


class InsideBlock(Block):
    """A block that recomputes two parts of itself, one after the other."""

    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def feed(x: torch.Tensor) -> torch.Tensor:
            return self.outer(torch.nn.functional.gelu(self.inner(self.norm(x) + self.shift.to(x.dtype))))

        def mix(x: torch.Tensor) -> torch.Tensor:
            return self.mix(x.transpose(1, 2)).transpose(1, 2)

        x = x + self.gain * checkpoint(feed, x, use_reentrant=self.reentrant)
        return x + checkpoint(mix, x, use_reentrant=self.reentrant)


class Stages(nn.Module):
    """Three stages of unequal leaves, each a unit of its own, recomputed as the subclass says."""

    reentrant = False
    together = False

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(96, 64)
        self.first = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))
        self.second = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))
        self.third = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))
        self.head = nn.Linear(64, 96)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.tokens(input_ids)
        stages = (self.first, self.second, self.third)
        if self.together:
            x = checkpoint(lambda x: stages[2](stages[1](stages[0](x))), x, use_reentrant=self.reentrant)
        else:
            for stage in stages:
                x = checkpoint(stage, x, use_reentrant=self.reentrant)
        return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("together", [False, True], ids=["one-by-one", "all-at-once"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputed_leaves_that_share_frames(reentrant: bool, together: bool, make_both: MakeBoth) -> None:
    torch.manual_seed(5)
    model = Stages()
    model.reentrant, model.together = reentrant, together
    engine, reference = make_both(model)
    assert engine.plan.arena.peak_frames < sum(unit.frame_count for unit in engine.plan.units)
    train_both(engine, reference, PLAIN, STEPS)
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_parts_of_a_block_recomputed_by_the_user(reentrant: bool, make_both: MakeBoth) -> None:
    model = PLAIN.model()
    model.blocks = nn.ModuleList(InsideBlock(64) for _ in range(3))
    for block in model.blocks:
        block.reentrant = reentrant
    engine, reference = make_both(model)
    train_both(engine, reference, PLAIN, STEPS)
    assert_same_parameters(engine, reference)


def test_whole_model_recomputed_by_the_user(make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model())
    anchor = torch.zeros((), requires_grad=True)

    def run(model: Callable[..., Any], index: int, _anchor: torch.Tensor) -> torch.Tensor:
        return model(**PLAIN.batch(index))["loss"]

    for step in range(3):
        expected = reference.forward(**PLAIN.batch(step))["loss"]
        reference.backward(expected)
        reference.step()
        found = checkpoint(run, engine, step, anchor, use_reentrant=True)
        engine.backward(found)
        engine.step()
        assert torch.equal(found, expected)
    assert_same_parameters(engine, reference)


def test_checkpointed_training_with_blocks_in_reverse_order_of_registration(make_both: MakeBoth) -> None:
    """The plan expects the order of registration: any other is slower, and as exact."""

    class Reversed(type(PLAIN.model())):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.tokens(input_ids) + self.position[: input_ids.shape[1]]
            for block in reversed(self.blocks):
                x = checkpoint(block, x, use_reentrant=False)
            return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}

    torch.manual_seed(2)
    engine, reference = make_both(Reversed(depth=4))
    train_both(engine, reference, PLAIN, STEPS)
    assert_same_parameters(engine, reference)


def test_checkpointed_engines_agree_with_plain_ones(make_engine: MakeEngine) -> None:
    model = PLAIN.model()
    plain, checkpointed = make_engine(copy.deepcopy(model)), make_engine(model, gradient_checkpointing=True)
    assert train(plain, PLAIN, 3) == train(checkpointed, PLAIN, 3)
    assert_same_values(checkpointed.state_dict(), plain.state_dict())
