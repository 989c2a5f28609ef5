"""bf16 training equals an unpaged mixed-precision reference with fp32 masters, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .conftest import MakeBoth, MakeEngine
from .models import FAMILIES, GPT2, PLAIN, T5, Family
from .training import assert_all_tiers_moved, assert_same_parameters, train_both

STEPS = 20


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(
    "keys",
    [{"gradient_clipping": 0.05}, {"gradient_accumulation_steps": 3}],
    ids=["clipped", "accumulated-in-fp32"],
)
def test_training_equals_the_unpaged_reference(family: Family, keys: dict[str, Any], make_both: MakeBoth) -> None:
    keys_of_model = {} if family is PLAIN else {"tie_word_embeddings": True}
    engine, reference = make_both(family.model(**keys_of_model), precision="bf16", **keys)
    steps = 8 if family is T5 and "gradient_accumulation_steps" in keys else STEPS
    train_both(engine, reference, family, steps)
    assert_same_parameters(engine, reference)
    assert_all_tiers_moved(engine, steps)


def test_gradients_are_kept_in_fp32_only_where_they_add_up(make_engine: MakeEngine) -> None:
    assert make_engine(GPT2.model(), precision="bf16").plan.grad_itemsize == 2
    assert make_engine(GPT2.model(), precision="bf16", gradient_accumulation_steps=2).plan.grad_itemsize == 4


def test_masters_keep_what_bf16_rounds_away(make_both: MakeBoth) -> None:
    """Steps far below bf16's resolution move the masters, and after many of them the parameters."""
    engine, reference = make_both(GPT2.model(), precision="bf16", optimizer={"lr": 1e-5, "weight_decay": 0.0})
    before = engine.state_dict(master=True)["transformer.h.0.ln_1.weight"].clone()
    train_both(engine, reference, GPT2, 3)
    after = engine.state_dict(master=True)["transformer.h.0.ln_1.weight"]
    assert not torch.equal(after, before)
    assert torch.equal(after.bfloat16(), before.bfloat16()), "three steps of 1e-5 do not show beside 1.0"
    assert_same_parameters(engine, reference)


def test_placements_mix_with_bf16(make_both: MakeBoth) -> None:
    placement = {"param": "device", "grad": "host", "states": 0.5}
    engine, reference = make_both(PLAIN.model(), precision="bf16", placement=placement, gradient_clipping=0.05)
    train_both(engine, reference, PLAIN, STEPS)
    assert_same_parameters(engine, reference)
