"""States in fewer bytes: what is exact stays exact, what rounds does so in the same way whatever the layout, and the
drive moves as many bytes as the formats have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from angelptm.checkpoint.records import Kind
from angelptm.config import Config
from angelptm.engine import Engine
from angelptm.engine.dtypes import rounded
from angelptm.engine.setup import StateChoice
from angelptm.errors import ConfigError
from angelptm.states.formats import FP32, StateFormats

from .commits import DEVICE, DEVICE_HOST, HALF, HOST, assert_masters, committed, config_of
from .conftest import MakeBoth, MakeEngine
from .models import FAMILIES, GPT2, LLAMA, PLAIN, Family
from .training import PAGE, assert_same_parameters, assert_same_values, snapshot, tight_config, train, train_both

STEPS = 12
EVERYWHERE = {"int8_from_elements": 0}
BF16 = {"exp_avg": "bf16", "exp_avg_sq": "bf16"}
INT8 = {"exp_avg": "int8", "exp_avg_sq": "int8", **EVERYWHERE}
MIXED = {"exp_avg": "int8", "exp_avg_sq": "bf16"}


def optimizer(states: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"lr": 1e-2, "states": states, **keys}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("states", [BF16, INT8, MIXED], ids=["bf16", "int8", "mixed"])
def test_training_equals_arrays_without_pages(family: Family, states: dict[str, Any], make_both: MakeBoth) -> None:
    """The reference has whole fp32 masters, and each parameter's moments in one array: neither the cut into records nor
    threads, tiers and order of updates show."""
    engine, reference = make_both(family.model(), precision="bf16", optimizer=optimizer(states), gradient_clipping=0.05)
    assert engine.plan.splits_masters
    assert engine.plan.state_kinds == ("STATES",)
    train_both(engine, reference, family, STEPS)
    assert_same_parameters(engine, reference)


CASES: dict[str, dict[str, Any]] = {
    "fp32": {"optimizer": optimizer(INT8)},
    "fp32-bf16": {"optimizer": optimizer(BF16), "placement": HALF},
    "whole-masters": {"precision": "bf16", "optimizer": optimizer({"master": "fp32", **INT8})},
    "host": {"precision": "bf16", "optimizer": optimizer(INT8), "placement": HOST},
    "half": {"precision": "bf16", "optimizer": optimizer(INT8), "placement": HALF},
    "device": {"precision": "bf16", "optimizer": optimizer(INT8), "placement": DEVICE},
    "device-host": {"precision": "bf16", "optimizer": optimizer(MIXED), "placement": DEVICE_HOST},
    "accumulated": {"precision": "bf16", "optimizer": optimizer(INT8), "gradient_accumulation_steps": 2},
    "large-pages": {"precision": "bf16", "optimizer": optimizer(INT8), "page_size": 8 * PAGE},
    "sgd": {"precision": "bf16", "optimizer": optimizer(INT8, type="sgd", momentum=0.9, nesterov=True)},
    "sgd-plain": {"precision": "bf16", "optimizer": optimizer(INT8, type="sgd")},
    "lion": {"precision": "bf16", "optimizer": optimizer(BF16, type="lion", lr=1e-3)},
    "one-thread": {"precision": "bf16", "optimizer": optimizer(INT8), "update": {"threads": 1, "ring_depth": 1}},
    "seed": {"precision": "bf16", "optimizer": optimizer(INT8), "training": {"seed": 5}},
    "serial": {"precision": "bf16", "optimizer": optimizer(INT8), "execution": {"moves": "serial"}},
    "groups": {
        "precision": "bf16",
        "optimizer": optimizer(
            INT8, groups=[{"params": ["*wte*"], "states": {"master": "fp32"}}, {"params": ["*.bias"], "lr": 1e-3}]
        ),
    },
}


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES.keys())
def test_every_placement_rule_and_precision_has_the_same_bits(keys: dict[str, Any], make_both: MakeBoth) -> None:
    settings = [("*.bias", {"lr": 1e-3})] if "groups" in keys["optimizer"] else ()
    engine, reference = make_both(GPT2.model(), settings=settings, **keys)
    train_both(engine, reference, GPT2, STEPS)
    assert_same_parameters(engine, reference)


def test_split_masters_lose_nothing_over_200_steps(make_engine: MakeEngine) -> None:
    model = GPT2.model()
    split, whole = (
        make_engine(copy.deepcopy(model), precision="bf16", optimizer=optimizer({"master": master}))
        for master in ("split", "fp32")
    )
    assert split.plan.splits_masters
    assert not whole.plan.splits_masters
    for step in range(200):
        losses = [train(engine, GPT2, 1, step) for engine in (split, whole)]
        assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1])), step
    assert_same_values(split.state_dict(master=True), snapshot(whole.state_dict(master=True)))


def test_random_rounding_keeps_the_course(make_engine: MakeEngine) -> None:
    """With AdamW's beta2 an addition to exp_avg_sq is a thousandth of it, which rounding to nearest would drop."""
    model = PLAIN.model()
    final = {}
    for name, states in {"fp32": {}, "bf16": BF16, "int8": INT8}.items():
        engine = make_engine(copy.deepcopy(model), optimizer={"lr": 3e-3, "states": states})
        final[name] = torch.stack(train(engine, PLAIN, 60)[-10:]).mean().item()
    assert final["bf16"] == pytest.approx(final["fp32"], rel=0.1)
    assert final["int8"] == pytest.approx(final["fp32"], rel=0.1)


def test_parameters_are_changed_by_hand_with_their_masters(make_both: MakeBoth) -> None:
    engine, reference = make_both(LLAMA.model(), precision="bf16", optimizer=optimizer(INT8), gradient_clipping=0.05)
    train_both(engine, reference, LLAMA, 2)
    name = next(name for name in engine.parameter_names() if "down_proj" in name)
    with engine.gathered([name], modify=True) as values:
        values[name].data.mul_(1.2345678)
    reference.masters[name].mul_(1.2345678)
    param = reference.params[name]
    param.data.copy_(rounded(reference.masters[name], torch.bfloat16).view_as(param))
    assert_same_parameters(engine, reference)
    train_both(engine, reference, LLAMA, 2, first=2)
    assert_same_parameters(engine, reference)


CONVERSIONS = [
    ({}, INT8),
    (INT8, {}),
    (BF16, INT8),
    (INT8, BF16),
    ({"master": "fp32"}, INT8),
    (INT8, {"master": "fp32"}),
    ({"master": "fp32"}, BF16),
]


def resumed_with(states: dict[str, Any], folder: Path) -> Engine:
    config = config_of(GPT2.model(), folder, precision="bf16", optimizer=optimizer(states))
    return Engine(GPT2.model(), config, resume=folder / "run")


def commit_after_three_steps(
    states: dict[str, Any], folder: Path
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, torch.Tensor]]:
    """All states of the commit, and the masters."""
    engine = Engine(GPT2.model(), config_of(GPT2.model(), folder, precision="bf16", optimizer=optimizer(states)))
    train(engine, GPT2, 3)
    masters = snapshot(engine.state_dict(master=True))
    engine.save_checkpoint(wait=True)
    engine.close()
    return committed(folder / "run", 3, [folder / "pages"]), masters


@pytest.mark.parametrize(("before", "after"), CONVERSIONS, ids=str)
def test_a_commit_is_resumed_in_any_formats(before: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> None:
    """Masters to the bit; moments within a step of the format; and what a format has exactly comes back exactly."""
    was, masters = commit_after_three_steps(before, tmp_path)
    second = resumed_with(after, tmp_path)
    assert_masters(second, masters)
    train(second, GPT2, 1, 3)  # goes on; and the commit after it has the formats of the second run
    second.save_checkpoint(wait=True)
    second.close()
    third = resumed_with(after, tmp_path)
    assert third.resumed is not None
    assert third.resumed.pages.read == 0, "the same formats are adopted where they are"
    third.close()
    assert any(values.any() for (_, kind), values in was.items() if kind == "EXP_AVG_SQ")


def test_moments_are_near_after_a_conversion(tmp_path: Path) -> None:
    was, _ = commit_after_three_steps({}, tmp_path)
    second = resumed_with(BF16, tmp_path)
    second.save_checkpoint(wait=True)
    second.close()
    now = committed(tmp_path / "run", 3, [tmp_path / "pages"])
    assert was.keys() == now.keys()
    for (name, kind), values in was.items():
        expected = torch.from_numpy(values)
        found = torch.from_numpy(now[name, kind])
        if kind == Kind.MASTER.name:
            assert torch.equal(found, expected), name
        else:
            assert ((found - expected).abs() <= expected.abs() / 128).all(), (name, kind)


@pytest.mark.parametrize(
    ("states", "most"), [({}, 20.1), (BF16, 12.1), (INT8, 8.3)], ids=["split", "split-bf16", "split-int8"]
)
def test_the_drive_moves_as_many_bytes_as_the_formats_have(
    states: dict[str, Any], most: float, make_engine: MakeEngine
) -> None:
    """States read and written, for each parameter and step."""
    model = GPT2.model(n_embd=256)
    engine = make_engine(
        model,
        precision="bf16",
        page_size=2**20,
        optimizer=optimizer(states),
        placement={"param": "host", "grad": "host", "states": "ssd"},
    )
    train(engine, GPT2, 2)
    engine.drain()
    before = engine.traffic()["ssd"]
    train(engine, GPT2, 4, 2)
    engine.drain()
    after = engine.traffic()["ssd"]
    moved = sum(after[way] - before[way] for way in ("read", "written"))
    elements = sum(param.numel() for param in GPT2.model(n_embd=256).parameters())
    assert moved / 4 / elements <= most


def test_formats_are_chosen_by_group_size_and_precision(tmp_path: Path) -> None:
    def config(precision: str, **keys: Any) -> Config:
        return tight_config(PLAIN.model(), tmp_path, precision=precision, optimizer=keys)

    def formats(chosen: Config, name: str, *shape: int) -> StateFormats:
        return StateChoice(chosen).of(name, shape)

    assert formats(config("fp32"), "w", 100, 100) == FP32
    assert formats(config("bf16"), "w", 100, 100) == StateFormats("split")
    int8 = config("bf16", states={"exp_avg": "int8", "exp_avg_sq": "int8"})
    assert formats(int8, "w", 100, 100) == StateFormats("split", "int8", "int8")
    assert formats(int8, "w", 10, 10) == StateFormats("split"), "small"
    assert formats(int8, "w", 100_000) == StateFormats("split"), "one dimension"
    own = config("bf16", states=INT8, groups=[{"params": ["wte*"], "states": {"exp_avg": "bf16"}}, {"params": ["w*"]}])
    assert formats(own, "wte.weight", 100, 100) == StateFormats("split", "bf16")
    assert formats(own, "wpe.weight", 100, 100) == StateFormats("split", "int8", "int8")


def test_split_masters_of_fp32_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        tight_config(PLAIN.model(), tmp_path, optimizer={"states": {"master": "split"}})
    assert refused.value.key == "optimizer.states.master"
    with pytest.raises(ConfigError) as refused:
        tight_config(PLAIN.model(), tmp_path, optimizer={"groups": [{"params": ["*"], "states": {"master": "split"}}]})
    assert refused.value.key == "optimizer.groups.0.states.master"
