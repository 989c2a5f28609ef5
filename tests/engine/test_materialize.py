"""Models that are never in memory whole: seeded, plausible, complete; or loaded from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from angelptm.engine import Engine
from angelptm.engine.dtypes import rounded
from angelptm.errors import AngelPTMError, DataError
from angelptm.model.materialize import init_on_meta, materialize
from angelptm.model.sources import ExistingValues, InitializedValues, SafetensorsValues
from angelptm.units import UnitLayout

from .conftest import MakeEngine
from .models import GPT2, LLAMA, PLAIN, T5, Family, Plain, gpt2_config, llama_config, t5_config
from .training import PAGE, assert_same_values, snapshot, train

CONFIGS = {"gpt2": gpt2_config, "llama": llama_config, "t5": t5_config}
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "t5": T5}


def real_values(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: engine.state_dict()[name].clone() for name in engine.parameter_names()}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_depend_on_the_seed_alone(name: str, make_engine: MakeEngine) -> None:
    def values(seed: int, **keys: Any) -> dict[str, torch.Tensor]:
        return real_values(make_engine(materialize(CONFIGS[name](), seed=seed), **keys))

    first = values(3)
    torch.manual_seed(99)
    assert_same_values(values(3, page_size=8 * PAGE, placement={"param": "device", "grad": "host"}), first)
    assert_same_values(values(3, placement={"param": "host", "states": 0.5}, units={"classes": []}), first)
    other = values(4)
    assert all(not torch.equal(other[n], v) for n, v in first.items() if v.std() > 1e-3 and v.numel() > 1)


def test_initialization_leaves_the_callers_random_state_alone(make_engine: MakeEngine) -> None:
    model = materialize(gpt2_config())
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    make_engine(model)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_are_those_of_transformers(name: str, make_engine: MakeEngine) -> None:
    """Mean and deviation of each parameter agree with the model's own initialization, within what its size permits."""
    expected = {n: p.detach() for n, p in FAMILIES[name].model().named_parameters()}
    found = real_values(make_engine(materialize(CONFIGS[name]())))
    assert set(found) == set(expected)
    for n, value in found.items():
        want = expected[n]
        assert value.isfinite().all(), n
        if want.std(correction=0) == 0:
            assert torch.equal(value, want), f"{n} is constant"
            continue
        deviation, error = float(want.std()), 5 / value.numel() ** 0.5
        assert float(value.std()) == pytest.approx(deviation, rel=2 * error), n
        assert abs(float(value.mean())) < 2 * error * deviation, n


def test_residual_projections_of_gpt2_are_scaled_by_depth(make_engine: MakeEngine) -> None:
    values = real_values(make_engine(materialize(gpt2_config(n_layer=8, n_embd=64))))
    for n, value in values.items():
        if n.endswith("c_proj.weight"):
            assert float(value.std()) == pytest.approx(0.02 / 4, rel=0.1), n
        elif n.endswith(("c_fc.weight", "c_attn.weight")):
            assert float(value.std()) == pytest.approx(0.02, rel=0.1), n


def test_every_row_of_every_unit_has_values_of_its_own(make_engine: MakeEngine) -> None:
    values = real_values(make_engine(materialize(gpt2_config())))
    assert not torch.equal(values["transformer.h.0.mlp.c_fc.weight"], values["transformer.h.1.mlp.c_fc.weight"])


def test_plain_module_uses_reset_parameters(make_engine: MakeEngine) -> None:
    class Resettable(nn.Sequential):
        pass

    def build() -> nn.Module:
        return Resettable(nn.Embedding(96, 64), nn.Linear(64, 96), nn.LayerNorm(96))

    values = real_values(make_engine(materialize(build)))
    assert float(values["0.weight"].std()) == pytest.approx(1.0, rel=0.1)
    assert 0.9 / 8 < float(values["1.weight"].abs().max()) <= 1 / 8
    assert bool((values["2.weight"] == 1).all())
    assert bool((values["2.bias"] == 0).all())


def test_parameter_that_nothing_initializes_is_refused(make_engine: MakeEngine) -> None:
    model = materialize(Plain)
    with pytest.raises(AngelPTMError, match="parameter position: nothing initializes it"):
        make_engine(model)


def test_model_on_meta_without_values_is_refused(make_engine: MakeEngine) -> None:
    with init_on_meta():
        model = Plain()
    with pytest.raises(AngelPTMError, match=r"meta device.*angelptm\.materialize"):
        make_engine(model)


def test_building_keeps_parameters_off_memory_and_buffers_real() -> None:
    model = materialize(Plain)
    assert all(param.device.type == "meta" for param in model.parameters())
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())
    assert model.tokens.weight is model.head.weight  # type: ignore[union-attr]
    assert nn.Linear(2, 2).weight.device.type == "cpu", "other models are not concerned afterwards"


def _real_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that are really there: on the CPU and with storage."""
    total = 0
    for param in model.parameters():
        if type(param) is nn.Parameter and param.device.type == "cpu":
            total += param.numel() * param.element_size()
    return total


@pytest.mark.parametrize("source", ["initialized", "safetensors", "existing"])
def test_one_unit_at_most_is_real_at_a_time(
    source: str, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = {"initialized": InitializedValues, "safetensors": SafetensorsValues, "existing": ExistingValues}
    cls = classes[source]
    seen: list[int] = []
    alive: list[list[Any]] = []
    values = cls.values

    def watched(self: Any, model: nn.Module, unit: UnitLayout) -> Mapping[str, torch.Tensor]:
        import weakref

        assert not any(reference() is not None for references in alive for reference in references), (
            "the values of the former unit are gone"
        )
        found = values(self, model, unit)
        assert set(found) == {param.name for param in unit.params}
        assert source == "existing" or _real_bytes(model) == 0, "nothing stays in the model"
        seen.append(sum(value.numel() for value in found.values()))
        if source != "existing":
            alive.append([weakref.ref(value) for value in found.values()])
        return found

    if source == "existing":
        model = GPT2.model()
    elif source == "initialized":
        model = materialize(gpt2_config())
    else:
        GPT2.model().save_pretrained(tmp_path / "weights")  # type: ignore[operator]
        model = materialize(tmp_path / "weights")
    monkeypatch.setattr(cls, "values", watched)
    engine = make_engine(model)
    assert seen == [unit.layout.numel for unit in engine.plan.units]
    assert max(seen) < sum(seen) / 2
    assert _real_bytes(engine.module) == 0


@pytest.mark.parametrize("shards", ["5GB", "50KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_folder_of_safetensors_equals_from_pretrained(
    name: str, shards: str, make_engine: MakeEngine, tmp_path: Path
) -> None:
    model = FAMILIES[name].model()
    model.save_pretrained(tmp_path / "weights", max_shard_size=shards)  # type: ignore[operator]
    engine = make_engine(materialize(tmp_path / "weights"))
    loaded = type(model).from_pretrained(tmp_path / "weights")  # type: ignore[attr-defined]
    assert_same_values(real_values(engine), {n: p.detach() for n, p in loaded.named_parameters()})
    train(engine, FAMILIES[name], 1)


def test_weights_of_the_bare_model_fit_the_model_with_a_head(make_engine: MakeEngine, tmp_path: Path) -> None:
    model = GPT2.model()
    model.transformer.save_pretrained(tmp_path / "weights")  # type: ignore[union-attr, operator]
    engine = make_engine(materialize(gpt2_config(), weights=tmp_path / "weights"))
    assert_same_values(real_values(engine), {n: p.detach() for n, p in model.named_parameters()})


@pytest.mark.parametrize("damage", ["missing", "shape", "truncated", "empty-folder", "no-folder", "no-config"])
def test_weights_that_do_not_fit_are_a_data_error(damage: str, make_engine: MakeEngine, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    GPT2.model().save_pretrained(folder)  # type: ignore[operator]
    file = folder / "model.safetensors"
    content = load_file(file)
    expected = {
        "missing": r"no tensor transformer\.h\.1\.ln_1\.bias.*every parameter",
        "shape": r"shape \(63,\).*expected shape \(64,\)",
        "truncated": "an unreadable file",
        "empty-folder": r"no \*\.safetensors file",
        "no-folder": "config.json",
        "no-config": "config.json",
    }[damage]
    if damage == "missing":
        del content["transformer.h.1.ln_1.bias"]
        save_file(content, file)
    elif damage == "shape":
        content["transformer.h.1.ln_1.bias"] = torch.zeros(63)
        save_file(content, file)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "empty-folder":
        file.unlink()
    elif damage == "no-folder":
        folder = tmp_path / "nowhere"
    else:
        (folder / "config.json").unlink()
    with pytest.raises(DataError, match=expected):
        make_engine(materialize(folder), planned_for=GPT2.model())


def test_frozen_parameters_are_filled_too(make_engine: MakeEngine) -> None:
    model = materialize(gpt2_config())
    for name, param in model.named_parameters():
        param.requires_grad_("h.0" not in name)
    frozen = real_values(make_engine(model))
    free = real_values(make_engine(materialize(gpt2_config())))
    assert_same_values(frozen, free)


def test_bf16_values_are_the_rounded_fp32_ones(make_engine: MakeEngine) -> None:
    half = make_engine(materialize(gpt2_config(), seed=2), precision="bf16")
    full = make_engine(materialize(gpt2_config(), seed=2))
    masters = snapshot(half.state_dict(master=True))
    assert_same_values(masters, snapshot(full.state_dict()))
    assert_same_values(real_values(half), {n: rounded(v, torch.bfloat16) for n, v in real_values(full).items()})


@pytest.mark.parametrize("family", [GPT2, LLAMA, T5], ids=lambda family: family.name)
def test_materialized_models_train(family: Family, make_engine: MakeEngine) -> None:
    engine = make_engine(materialize(CONFIGS[family.name]()), optimizer={"lr": 3e-3})
    batch = family.batch(0)
    losses = []
    for _ in range(8):
        loss = engine(**batch).loss
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    assert losses[-1] < losses[0]


def test_loaded_plain_module(make_engine: MakeEngine, tmp_path: Path) -> None:
    model = PLAIN.model()
    (tmp_path / "weights").mkdir()
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "weights" / "model.safetensors")
    engine = make_engine(materialize(Plain, weights=tmp_path / "weights"))
    assert_same_values(real_values(engine), {n: p.detach() for n, p in model.named_parameters()})
