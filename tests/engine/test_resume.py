"""A run that was stopped and resumed does, bit by bit, what it would have done."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from transformers import get_cosine_schedule_with_warmup

from angelptm.data.batches import TokenBatches
from angelptm.data.tokens import TokenFile
from angelptm.engine import Engine

from .commits import (
    DEVICE,
    DEVICE_HOST,
    HALF,
    HOST,
    SSD,
    Step,
    assert_continues,
    assert_slots_are_owned,
    config_of,
    record,
    step_of,
)
from .models import FAMILIES, GPT2, LLAMA, PLAIN, T5, Family
from .test_weird_use import Buffers, Views
from .training import assert_same_values, batches_of, snapshot, tight_config, train, train_step

STEPS = 4
INT8 = {"lr": 1e-2, "states": {"exp_avg": "int8", "exp_avg_sq": "int8", "int8_from_elements": 0}}

CASES: dict[str, tuple[Family, dict[str, Any], dict[str, Any]]] = {
    **{family.name: (family, {}, {}) for family in FAMILIES},
    **{f"{family.name}-bf16": (family, {}, {"precision": "bf16"}) for family in FAMILIES},
    "fp32-masters-bf16": (T5, {}, {"precision": "bf16", "optimizer": {"lr": 1e-2, "states": {"master": "fp32"}}}),
    "bf16-moments": (GPT2, {}, {"optimizer": {"lr": 1e-2, "states": {"exp_avg": "bf16", "exp_avg_sq": "bf16"}}}),
    "split-int8": (GPT2, {}, {"precision": "bf16", "optimizer": INT8}),
    "split-int8-half": (LLAMA, {}, {"precision": "bf16", "optimizer": INT8, "placement": HALF}),
    "split-int8-host": (GPT2, {}, {"precision": "bf16", "optimizer": INT8, "placement": HOST}),
    "split-int8-device": (GPT2, {}, {"precision": "bf16", "optimizer": INT8, "placement": DEVICE_HOST}),
    "split-int8-lion": (PLAIN, {}, {"precision": "bf16", "optimizer": {"type": "lion", "lr": 1e-3} | INT8}),
    "sgd": (PLAIN, {}, {"optimizer": {"type": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True}}),
    "lion": (GPT2, {}, {"optimizer": {"type": "lion", "lr": 1e-3, "weight_decay": 0.1}}),
    "lion-bf16-half": (
        PLAIN, {}, {"optimizer": {"type": "lion", "lr": 1e-3}, "precision": "bf16", "placement": HALF}
    ),
    "clipped-accumulated": (GPT2, {}, {"gradient_clipping": 0.05, "gradient_accumulation_steps": 2}),
    "clipped-accumulated-bf16": (
        LLAMA, {}, {"gradient_clipping": 0.05, "gradient_accumulation_steps": 2, "precision": "bf16"}
    ),
    "groups": (
        GPT2, {}, {"optimizer": {"lr": 1e-2, "weight_decay": 0.2, "groups": [{"params": ["*.bias"], "lr": 1e-3}]}}
    ),
    "tied": (LLAMA, {"tie_word_embeddings": True}, {}),
    "checkpointed-blocks": (GPT2, {}, {"gradient_checkpointing": True}),
    "dropout": (GPT2, {"dropout": 0.3}, {}),
    "dropout-checkpointed": (T5, {"dropout": 0.3}, {"gradient_checkpointing": True}),
    "states-host": (GPT2, {}, {"placement": HOST}),
    "states-half": (GPT2, {}, {"placement": HALF}),
    "states-half-bf16": (T5, {}, {"placement": HALF, "precision": "bf16"}),
    "param-device": (GPT2, {}, {"placement": DEVICE}),
    "no-ssd": (GPT2, {}, {"ssd": False}),
    "no-ssd-bf16": (PLAIN, {}, {"ssd": False, "precision": "bf16"}),
}  # fmt: skip


def check_resume(model: Any, step: Step, folder: Path, at: tuple[int, ...] = (1, 3), **keys: Any) -> None:
    """``model`` makes one. Commits at each step of ``at``, on a run of its own, and goes on in new engines."""
    plain = Engine(model(), config_of(model(), folder, name="plain", **keys))
    torch.manual_seed(3)
    run = record(plain, step, STEPS)
    plain.close()
    config = config_of(model(), folder, **keys)
    done = 0
    for stop in at:
        engine = Engine(model(), config, resume=folder / "run" if done else None)
        if not done:
            torch.manual_seed(3)
        for index in range(done, stop):
            assert torch.equal(torch.stack(step(engine, index)), run.losses[index])
        engine.save_checkpoint()
        engine.close()
        torch.manual_seed(99)
        done = stop
    engine = Engine(model(), config, resume=folder / "run")
    pages = engine.resumed.pages if engine.resumed is not None else None
    assert pages is not None
    on_device = any(home == "device" for unit in engine.plan.units for home in unit.frozen_homes)
    if engine.plan.splits_masters:
        on_device |= any(span.param_home == "device" for unit in engine.plan.units for span in unit.spans)
    assert pages.adopted > 0
    assert (pages.read > 0) == on_device, "the same configuration reads nothing but what lives on the device"
    assert_slots_are_owned(engine)
    assert_continues(engine, step, run, done)
    engine.close()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_resumed_run_equals_the_one_that_was_not_interrupted(
    case: tuple[Family, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    family, build, keys = case
    check_resume(lambda: family.model(**build), step_of(family), tmp_path, **keys)


@pytest.mark.parametrize(
    "keys",
    [{"placement": placement} for placement in (SSD, HOST, DEVICE, DEVICE_HOST)]
    + [{"ssd": False}, {"placement": SSD, "precision": "bf16"}, {"placement": DEVICE, "precision": "bf16"}],
    ids=["ssd", "host", "device", "device-host", "no-ssd", "ssd-bf16", "device-bf16"],
)
def test_frozen_parameters_come_back_from_every_tier(keys: dict[str, Any], tmp_path: Path) -> None:
    def model() -> nn.Module:
        built = GPT2.model()
        for name, param in built.named_parameters():
            # Whole units and parts of units; and values that the model's own initialization would not give back.
            if "h.0." in name or "ln_1" in name or "wpe" in name:
                param.requires_grad_(False)
        return built

    check_resume(model, step_of(GPT2), tmp_path, **keys)


@pytest.mark.parametrize("keys", [{}, {"ssd": False}], ids=["ssd", "no-ssd"])
def test_buffers_come_back(keys: dict[str, Any], tmp_path: Path) -> None:
    """BatchNorm trains on what it has seen, so its losses in eval mode tell."""

    def model() -> nn.Module:
        torch.manual_seed(5)
        return Buffers().train()

    def step(engine: Engine, index: int) -> list[torch.Tensor]:
        losses = train_step(engine, batches_of(PLAIN, engine.config, index))
        engine.module.eval()
        with torch.no_grad():
            losses.append(engine(**PLAIN.batch(0))["loss"].detach())
        engine.module.train()
        assert int(engine.module.norm.num_batches_tracked) == index + 1  # type: ignore[union-attr, arg-type]
        return losses

    check_resume(model, step, tmp_path, **keys)


def test_views_scalars_and_parameters_of_no_elements(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(5)
        return Views().train()

    check_resume(model, step_of(PLAIN), tmp_path)


def test_generators_of_python_numpy_and_torch_come_back(tmp_path: Path) -> None:
    def step(engine: Engine) -> list[torch.Tensor]:
        batch = PLAIN.batch(random.randrange(5) + int(np.random.randint(5)) + int(torch.randint(5, ())))
        return [*train_step(engine, [batch]), torch.tensor([random.gauss(0, 1), np.random.normal(), torch.randn(())])]

    def seeded(engine: Engine, index: int) -> list[torch.Tensor]:
        if index == 0:
            random.seed(1)
            np.random.seed(2)
            torch.manual_seed(3)
        return [torch.cat([part.reshape(-1).double() for part in step(engine)])]

    check_resume(PLAIN.model, seeded, tmp_path)


def multistep(optimizer: Any) -> Any:
    return lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3, 4], gamma=0.5)


def plateau(optimizer: Any) -> Any:
    """Its best value so far is an infinity before the first step."""
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, factor=0.5)


SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step),
    "cosine": lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 2, 6),
    "multistep": multistep,
    "plateau": plateau,
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.8)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("commit_at", [0, 3])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_go_on_where_they_were(make: Any, commit_at: int, tmp_path: Path) -> None:
    def train(engine: Engine, scheduler: Any, first: int, steps: int) -> list[tuple[float, torch.Tensor]]:
        seen = []
        for index in range(first, first + steps):
            rate = engine.optimizer.param_groups[0]["lr"]
            seen.append((rate, torch.stack(step_of(PLAIN)(engine, index))))
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        return seen

    config = config_of(PLAIN.model(), tmp_path)
    engine = Engine(PLAIN.model(), config)
    scheduler = make(engine.optimizer)
    train(engine, scheduler, 0, commit_at)
    engine.save_checkpoint(scheduler=scheduler)
    expected = train(engine, scheduler, commit_at, 3)
    engine.close()

    engine = Engine(PLAIN.model(), config)
    scheduler = make(engine.optimizer)
    engine.load_checkpoint(scheduler=scheduler)
    found = train(engine, scheduler, commit_at, 3)
    assert [rate for rate, _ in found] == [rate for rate, _ in expected]
    for (_, one), (_, other) in zip(found, expected):
        assert torch.equal(one, other)
    engine.close()


def test_position_in_the_data_comes_back(tmp_path: Path) -> None:
    np.random.default_rng(1).integers(2, 96, 2000).astype(np.uint16).tofile(tmp_path / "tokens.bin")

    def batches() -> TokenBatches:
        return TokenBatches(TokenFile(tmp_path / "tokens.bin", "uint16"), 12, 2, seed=4)

    config = config_of(PLAIN.model(), tmp_path)
    engine, data = Engine(PLAIN.model(), config), batches()
    for _ in range(2):
        train_step(engine, [next(data)])
    engine.save_checkpoint(data=data, client_state={"best": float("inf"), "names": ["a"], "by_step": {2: 0.5}})
    expected = [train_step(engine, [next(data)])[0] for _ in range(3)]
    engine.close()

    engine, data = Engine(PLAIN.model(), config), batches()
    folder, client = engine.load_checkpoint(data=data)
    assert (folder, data.samples) == (tmp_path / "run", 4)
    assert client == {"best": float("inf"), "names": ["a"], "by_step": {2: 0.5}}
    assert torch.equal(torch.stack([train_step(engine, [next(data)])[0] for _ in range(3)]), torch.stack(expected))
    engine.close()


def test_run_that_goes_back_counts_steps_anew(tmp_path: Path) -> None:
    """Bias correction depends on each parameter's count, zero at the commit included."""
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path))
    engine.save_checkpoint(wait=True)
    run = record(engine, step_of(GPT2), 2)
    engine.load_checkpoint(step=0)
    assert_continues(engine, step_of(GPT2), run, 0)
    engine.close()


def test_copy_of_a_folder_is_read_and_not_taken_for_the_runs_own(tmp_path: Path) -> None:
    """It names the same slot files, whose slots have had other content since."""
    keys: dict[str, Any] = {"checkpoint": {"folder": str(tmp_path / "run"), "keep": 1}}
    config = tight_config(GPT2.model(), tmp_path, **keys)
    engine = Engine(GPT2.model(), config)
    train(engine, GPT2, 2)
    engine.save_checkpoint(wait=True)
    expected = snapshot(engine.state_dict(master=True))
    engine.close()
    shutil.copytree(tmp_path / "run", tmp_path / "copy" / "run")
    shutil.copytree(tmp_path / "pages", tmp_path / "copy", dirs_exist_ok=True)
    for path in (tmp_path / "copy").glob("*.pages"):
        path.rename(tmp_path / "copy" / "run" / path.name)
    engine = Engine(GPT2.model(), config, resume=tmp_path / "run")
    train(engine, GPT2, 3, first=2)
    engine.save_checkpoint(wait=True)
    engine.load_checkpoint(tmp_path / "copy" / "run")
    assert engine.resumed is not None
    assert engine.resumed.pages.adopted == 0
    assert_same_values(engine.state_dict(master=True), expected)
    engine.close()
