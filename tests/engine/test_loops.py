"""Loops: the engine's and PyTorch's own, schedulers, dropped gradients, parameters without a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from angelptm.engine import Engine
from angelptm.errors import AngelPTMError

from .conftest import MakeBoth, MakeEngine
from .models import GPT2, PLAIN, loss_of
from .reference import Reference
from .training import assert_same_parameters, assert_same_values, snapshot, train, train_both, train_step


def _torch_step(engine: Engine, step: int, count: int = 1) -> list[torch.Tensor]:
    losses = []
    for micro in range(count):
        loss = loss_of(engine(**GPT2.batch(step * count + micro)))
        losses.append(loss.detach())
        (loss / count).backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("count", [1, 3], ids=["one-batch", "three-micro-batches"])
def test_both_loop_styles_give_the_same_bits(count: int, make_engine: MakeEngine) -> None:
    keys = {"gradient_accumulation_steps": count, "gradient_clipping": 0.05}
    own, torchs = make_engine(GPT2.model(), **keys), make_engine(GPT2.model(), **keys)
    for step in range(6):
        batches = [GPT2.batch(step * count + micro) for micro in range(count)]
        assert train_step(own, batches) == _torch_step(torchs, step, count)
    assert_same_values(own.state_dict(), torchs.state_dict())


def test_passes_added_up_without_configured_accumulation(make_both: MakeBoth) -> None:
    """A loop that calls backward several times before the step, though the configuration says nothing of it."""
    engine, reference = make_both(GPT2.model())
    for step in range(5):
        for micro in range(3):
            reference.backward(loss_of(reference.forward(**GPT2.batch(3 * step + micro))))
        reference.step()
        for micro in range(3):
            loss_of(engine(**GPT2.batch(3 * step + micro))).backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    assert_same_parameters(engine, reference)


def test_step_waits_for_all_micro_batches(make_engine: MakeEngine) -> None:
    engine = make_engine(GPT2.model(), gradient_accumulation_steps=2)
    before = snapshot(engine.state_dict())
    engine.backward(loss_of(engine(**GPT2.batch(0))))
    assert not engine.step()
    assert_same_values(engine.state_dict(), before)
    engine.backward(loss_of(engine(**GPT2.batch(1))))
    assert engine.step()
    assert engine.global_step == 1


def test_closure_is_called_once(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model())
    calls = []

    def closure() -> torch.Tensor:
        engine.optimizer.zero_grad()
        loss = loss_of(engine(**GPT2.batch(0)))
        loss.backward()
        calls.append(loss)
        return loss

    assert engine.optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    reference.train_step([GPT2.batch(0)])
    assert_same_parameters(engine, reference)


def _schedulers(optimizer: torch.optim.Optimizer, name: str) -> torch.optim.lr_scheduler.LRScheduler:
    if name == "torch":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    return get_cosine_schedule_with_warmup(optimizer, 2, 8)


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_schedulers_drive_the_learning_rate(name: str, make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model())
    scheduler = _schedulers(engine.optimizer, name)
    witness = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=engine.config.optimizer.lr)
    witness_scheduler = _schedulers(witness, name)
    rates = []
    for step in range(6):
        # The very quotient would round differently from the product that the reference forms.
        reference.lr_factor = 1.0
        object.__setattr__(reference.config.optimizer, "lr", witness.param_groups[0]["lr"])
        rates.append(engine.optimizer.param_groups[0]["lr"])
        train_both(engine, reference, GPT2, 1, first=step)
        scheduler.step()
        witness.step()
        witness_scheduler.step()
    assert len(set(rates)) >= 5
    assert_same_parameters(engine, reference)


def test_weight_decay_of_a_group_can_change_between_steps(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model())
    train_both(engine, reference, GPT2, 1)
    engine.optimizer.param_groups[0]["weight_decay"] = 0.5
    reference.settings = [("*", {"weight_decay": 0.5})]
    train_both(engine, reference, GPT2, 2, first=1)
    assert_same_parameters(engine, reference)


def test_zero_grad_drops_gradients(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model(), gradient_clipping=0.05)
    loss_of(engine(**GPT2.batch(99))).backward()
    engine.optimizer.zero_grad()
    train_both(engine, reference, GPT2, 3)
    assert_same_parameters(engine, reference)


def test_zero_grad_begins_the_accumulation_anew(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model(), gradient_accumulation_steps=2)
    engine.backward(loss_of(engine(**GPT2.batch(99))))
    engine.optimizer.zero_grad()
    train_both(engine, reference, GPT2, 2)
    assert engine.global_step == 2
    assert_same_parameters(engine, reference)


def test_zero_grad_gives_the_slots_back(make_engine: MakeEngine) -> None:
    engine = make_engine(GPT2.model())
    used = engine._store.slot_used_count
    loss_of(engine(**GPT2.batch(0))).backward()
    engine._gradients.flush()
    assert engine._store.slot_used_count > used
    engine.optimizer.zero_grad()
    assert engine._store.slot_used_count == used


def test_clip_grad_norm_of_the_engine_clips_the_next_step(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model(), gradient_clipping=0.05)
    plain = make_both(GPT2.model())[0]
    for step in range(3):
        reference.train_step([GPT2.batch(step)])
        plain.backward(loss_of(plain(**GPT2.batch(step))))
        assert plain.clip_grad_norm_(0.05) == reference.grad_norm
        plain.step()
    assert_same_parameters(plain, reference)
    train(engine, GPT2, 3)
    assert_same_parameters(engine, reference)


def test_parameters_frozen_and_thawed_between_steps(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model())
    for step, trains in enumerate([True, False, False, True]):
        for model in (engine.module, reference.model):
            for name, param in model.named_parameters():
                if "h.0" in name or "wte" in name:
                    param.requires_grad_(trains)
        train_both(engine, reference, GPT2, 1, first=step)
    assert engine._progress.steps_of == reference.steps
    assert engine._progress.steps_of["transformer.wte.weight"] == 2
    assert_same_parameters(engine, reference)


def test_parameter_frozen_from_the_start_cannot_be_thawed(make_engine: MakeEngine) -> None:
    model = GPT2.model()
    model.transformer.wpe.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    engine = make_engine(model)
    engine.module.get_parameter("transformer.wpe.weight").requires_grad_(True)
    for _ in range(2):
        with pytest.raises(AngelPTMError, match=r"transformer\.wpe\.weight.*frozen when the engine was made"):
            engine(**GPT2.batch(0))


class Branching(nn.Module):
    """Uses one of two branches, as the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(96, 64)
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]) for _ in range(2))
        self.left = nn.Linear(64, 200)
        self.right = nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 200))
        self.head = nn.Linear(200, 96)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, right: bool = False) -> dict[str, torch.Tensor]:
        x = self.tokens(input_ids)
        logits = self.head(self.right(x) if right else self.left(x))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class HalfUsedBlock(nn.Module):
    """A unit of several pages in which some parameters have no gradient in some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = nn.Linear(64, 200), nn.Linear(64, 200), nn.Linear(64, 200)
        self.back = nn.Linear(200, 64)

    def forward(self, x: torch.Tensor, right: bool) -> torch.Tensor:
        hidden = self.always(x)
        return x + self.back(hidden + self.sometimes(x) if right else hidden)


class BranchingInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(96, 64)
        self.blocks = nn.ModuleList(HalfUsedBlock() for _ in range(4))
        self.head = nn.Linear(64, 96)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, right: bool = False) -> dict[str, torch.Tensor]:
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = block(x, right)
        return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def _train_branching(engine: Engine, reference: Reference) -> None:
    for step in range(12):
        batch = {**PLAIN.batch(step), "right": step % 3 == 1}
        (expected,) = reference.train_step([batch])
        (found,) = train_step(engine, [batch])
        assert torch.equal(found, expected), step


@pytest.mark.parametrize("placement", ["ssd", "host"])
def test_unit_without_a_gradient_is_skipped_and_counts_its_own_steps(placement: str, make_both: MakeBoth) -> None:
    model = Branching()
    model.blocks = nn.ModuleList()
    engine, reference = make_both(model, placement={"param": "ssd", "grad": placement, "states": "ssd"})
    before = engine.state_dict()["left.weight"].clone()
    _train_branching(engine, reference)
    assert reference.steps["right.0.weight"] == 4
    assert reference.steps["left.weight"] == 8
    assert engine._progress.steps_of == reference.steps
    assert not torch.equal(engine.state_dict()["left.weight"], before)
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_parameter_without_a_gradient_is_skipped_inside_its_unit(optimizer: str, make_both: MakeBoth) -> None:
    torch.manual_seed(3)
    keys = {"type": optimizer, "lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}
    engine, reference = make_both(BranchingInside(), optimizer=keys, gradient_clipping=0.5)
    _train_branching(engine, reference)
    assert engine._progress.steps_of == reference.steps
    assert engine._progress.steps_of["blocks.0.never.weight"] == 0
    assert_same_parameters(engine, reference)
