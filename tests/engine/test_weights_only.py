"""Loading the weights of a commit and nothing else: masters are those weights, and the optimizer starts anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from angelptm.engine import Engine
from angelptm.engine.dtypes import rounded

from .commits import (
    DEVICE,
    HALF,
    HOST,
    SSD,
    assert_bits,
    assert_masters,
    committed,
    config_of,
    step_of,
)
from .models import GPT2
from .training import PAGE, tight_config, train


def model(values: dict[str, torch.Tensor] | None = None) -> nn.Module:
    built = GPT2.model()
    if values is not None:
        built.load_state_dict(values)
    built.transformer.wpe.weight.requires_grad_(False)  # type: ignore[union-attr]
    return built


LAYOUTS: dict[str, dict[str, Any]] = {
    "ssd": {"placement": SSD},
    "half": {"placement": HALF},
    "host": {"placement": HOST},
    "device": {"placement": DEVICE},
    "pages": {"placement": SSD, "page_size": 2 * PAGE},
    "no-ssd": {"ssd": False},
    "bf16": {"placement": SSD, "precision": "bf16"},
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "trained-before"])
@pytest.mark.parametrize("keys", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_training_equals_that_of_an_engine_made_of_the_weights(
    keys: dict[str, Any], used: bool, tmp_path: Path
) -> None:
    source_keys = {"ssd": False} if "ssd" in keys else {}
    source = Engine(model(), config_of(model(), tmp_path, name="source", **source_keys))
    train(source, GPT2, 3)
    weights = {name: value.clone() for name, value in source.state_dict(master=True).items()}
    source.save_checkpoint(client_state={"kept": 1})
    source.close()

    engine = Engine(model(), config_of(model(), tmp_path, **keys))
    if used:
        train(engine, GPT2, 2)  # moments, counters and masters of its own, all of which have to go
    folder, client = engine.load_checkpoint(tmp_path / "source", weights_only=True)
    assert (folder, client) == (tmp_path / "source", {"kept": 1})
    assert engine.resumed is not None
    assert any("starts anew" in note and "moments are zero" in note for note in engine.resumed.notes)
    assert (engine.global_step, set(engine._progress.steps_of.values())) == (0, {0})
    masters, values = engine.state_dict(master=True), engine.state_dict()
    for name, value in weights.items():
        if name != "transformer.wpe.weight":
            assert_bits(masters[name], value, f"master of {name}")
        assert_bits(values[name], rounded(value, values[name].dtype), name)
    engine.save_checkpoint(wait=True)
    folders = [tmp_path / "pages"]
    for (name, kind), content in committed(tmp_path / "run", 0, folders).items():
        assert kind == "MASTER" or not content.any(), f"{kind} of {name}"

    fresh_keys = {key: value for key, value in keys.items() if key != "ssd"}
    fresh = Engine(model(weights), tight_config(model(), tmp_path, **fresh_keys))
    for step in range(3):
        expected = torch.stack(step_of(GPT2)(fresh, step))
        assert_bits(torch.stack(step_of(GPT2)(engine, step)), expected, f"losses of step {step}")
    assert_masters(engine, {name: value.clone() for name, value in fresh.state_dict(master=True).items()})
    engine.close()
    fresh.close()


def test_parameters_that_were_trained_may_be_frozen_and_the_other_way_round(tmp_path: Path) -> None:
    source = Engine(model(), config_of(model(), tmp_path, name="source"))
    train(source, GPT2, 2)
    weights = {name: value.clone() for name, value in source.state_dict(master=True).items()}
    source.save_checkpoint()
    source.close()
    other = GPT2.model().requires_grad_(False)
    other.transformer.wpe.weight.requires_grad_(True)  # type: ignore[union-attr]
    engine = Engine(other, config_of(other, tmp_path))
    engine.load_checkpoint(tmp_path / "source", weights_only=True)
    assert_masters(engine, weights)
    train(engine, GPT2, 1)
    after = engine.state_dict(master=True)
    for name, value in weights.items():
        assert torch.equal(after[name], value) == (name != "transformer.wpe.weight"), name
    engine.close()
