"""fp32 training through the tiers gives the bits of unpaged training with the same kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from .conftest import MakeBoth
from .models import FAMILIES, GPT2, LLAMA, PLAIN, T5, Family
from .training import PAGE, assert_all_tiers_moved, assert_same_parameters, train_both

STEPS = 20


def by_name(family: Family) -> str:
    return family.name


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"gradient_clipping": 0.05},
        {"gradient_accumulation_steps": 3, "gradient_clipping": 0.05},
    ],
    ids=["plain", "clipped", "accumulated-clipped"],
)
def test_training_equals_the_unpaged_reference(family: Family, keys: dict[str, Any], make_both: MakeBoth) -> None:
    steps = 8 if family is T5 and "gradient_accumulation_steps" in keys else STEPS
    engine, reference = make_both(family.model(), **keys)
    train_both(engine, reference, family, steps)
    assert_same_parameters(engine, reference)
    assert_all_tiers_moved(engine, steps)


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_tied_weights_accumulate_as_autograd_does(family: Family, make_both: MakeBoth) -> None:
    keys = {} if family is PLAIN else {"tie_word_embeddings": True}
    engine, reference = make_both(family.model(**keys), gradient_accumulation_steps=3)
    assert any(len(param.owners) > 1 for unit in engine.plan.units for param in unit.layout.params)
    train_both(engine, reference, family, 5)
    assert_same_parameters(engine, reference)


def test_untied_weights(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model(tie_word_embeddings=False))
    assert all(len(param.owners) == 1 for unit in engine.plan.units for param in unit.layout.params)
    train_both(engine, reference, GPT2, STEPS)
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("family", [GPT2, T5], ids=by_name)
def test_dropout_with_equal_seeds(family: Family, make_both: MakeBoth) -> None:
    engine, reference = make_both(family.model(dropout=0.3))
    train_both(engine, reference, family, STEPS)
    assert_same_parameters(engine, reference)


PLACEMENTS = {
    "param-device": {"param": "device", "grad": "ssd", "states": "ssd"},
    "param-host": {"param": "host", "grad": "ssd", "states": 0.5},
    "grad-host": {"param": "ssd", "grad": "host", "states": "ssd"},
    "states-host": {"param": "ssd", "grad": "ssd", "states": "host"},
    "states-half": {"param": "device", "grad": "host", "states": 0.5},
    "all-host": {"param": "host", "grad": "host", "states": "host"},
}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("threads", [1, 2], ids=["one-thread", "two-threads"])
def test_placement_does_not_change_bits(placement: dict[str, Any], threads: int, make_both: MakeBoth) -> None:
    engine, reference = make_both(
        GPT2.model(), placement=placement, update={"threads": threads}, gradient_clipping=0.05
    )
    homes = {span.states_home for unit in engine.plan.units for span in unit.spans}
    assert homes == ({"host", "ssd"} if placement["states"] == 0.5 else {placement["states"]})
    train_both(engine, reference, GPT2, STEPS)
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("page_bytes", [PAGE, 2 * PAGE, 16 * PAGE], ids=["64KiB", "128KiB", "1MiB"])
def test_page_size_does_not_change_bits(page_bytes: int, make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model(), page_size=page_bytes, gradient_clipping=0.05)
    train_both(engine, reference, GPT2, STEPS)
    assert_same_parameters(engine, reference)


OPTIMIZERS = {
    "adamw": {"type": "adamw", "lr": 1e-2, "weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-6},
    "sgd": {"type": "sgd", "lr": 0.1},
    "sgd-momentum": {"type": "sgd", "lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "sgd-nesterov": {"type": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    "lion": {"type": "lion", "lr": 1e-3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_rule_equals_its_kernel(optimizer: dict[str, Any], make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model(), optimizer=optimizer)
    train_both(engine, reference, PLAIN, STEPS)
    assert_same_parameters(engine, reference)


def _freeze(model: nn.Module, *parts: str) -> nn.Module:
    for name, param in model.named_parameters():
        if any(part in name for part in parts):
            param.requires_grad_(False)
    return model


FROZEN = {
    "some-in-a-block": (".c_fc.", "ln_1"),
    "a-whole-block": ("h.0.",),
    "the-embedding": ("wte", "wpe"),
    "all-but-one": ("wte", "wpe", "h.0", "attn", "ln_"),
}


@pytest.mark.parametrize("parts", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parameters_stay_and_the_rest_trains(parts: tuple[str, ...], make_both: MakeBoth) -> None:
    model = _freeze(GPT2.model(), *parts)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    engine, reference = make_both(model, gradient_clipping=0.05, gradient_accumulation_steps=2)
    train_both(engine, reference, GPT2, STEPS)
    assert_same_parameters(engine, reference)
    after = engine.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) == any(part in name for part in parts), name


def test_groups_of_the_configuration(make_both: MakeBoth) -> None:
    settings = [("*.bias", {"weight_decay": 0.0}), ("*wte*", {"lr": 1e-3}), ("*ln_*", {"lr": 0.0, "weight_decay": 0.5})]
    optimizer = {
        "lr": 1e-2,
        "weight_decay": 0.2,
        "groups": [{"params": [pattern], **values} for pattern, values in settings],
    }
    engine, reference = make_both(GPT2.model(), optimizer=optimizer, settings=settings)
    assert len(engine.optimizer.param_groups) == 4
    train_both(engine, reference, GPT2, STEPS)
    assert_same_parameters(engine, reference)


def test_groups_given_as_torch_groups(make_both: MakeBoth) -> None:
    model = LLAMA.model()
    norms = [param for name, param in model.named_parameters() if "norm" in name]
    others = [param for name, param in model.named_parameters() if "norm" not in name]
    groups = [{"params": norms, "weight_decay": 0.0, "lr": 0.05}, {"params": others, "weight_decay": 0.3}]
    settings = [("*norm*", {"weight_decay": 0.0, "lr": 0.05}), ("*", {"weight_decay": 0.3})]
    engine, reference = make_both(model, groups=groups, settings=settings)
    train_both(engine, reference, LLAMA, STEPS)
    assert_same_parameters(engine, reference)


def test_no_frame_beyond_the_budget_was_used(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model())
    train_both(engine, reference, GPT2, 3)
    peak = engine.peak_bytes()
    assert peak["device"] <= engine.config.tiers.device
    assert peak["host"] <= engine.config.tiers.host
    assert 0 < peak["ssd"] <= engine.plan.ssd_slots * engine.plan.page_bytes
