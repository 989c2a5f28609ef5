"""Real values: gathered, streamed state dicts, exports that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from angelptm.engine.export import LazyState
from angelptm.errors import AngelPTMError
from angelptm.model.materialize import materialize

from .conftest import MakeBoth, MakeEngine
from .models import GPT2, LLAMA, PLAIN, T5, Family
from .training import assert_same_parameters, assert_same_values, snapshot, train, train_both

PLACEMENTS = {
    "ssd": {"param": "ssd", "grad": "ssd", "states": "ssd"},
    "host": {"param": "host", "grad": "ssd", "states": "host"},
    "device": {"param": "device", "grad": "ssd", "states": 0.5},
}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_state_dict_streams_what_the_model_had(placement: dict[str, Any], make_engine: MakeEngine) -> None:
    model = PLAIN.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = make_engine(model, placement=placement)
    assert list(engine.state_dict()) == list(before)
    assert_same_values(engine.state_dict(), before)
    assert_same_values(engine.state_dict(master=True), before)


def test_state_dict_reads_the_newest_values_under_an_update(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model())
    for step in range(3):
        train_both(engine, reference, GPT2, 1, first=step)
        assert_same_parameters(engine, reference)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gathered_modify_reaches_parameter_and_master(
    placement: dict[str, Any], precision: str, make_both: MakeBoth
) -> None:
    engine, reference = make_both(PLAIN.model(), placement=placement, precision=precision)
    train_both(engine, reference, PLAIN, 2)
    with engine.gathered(["blocks.0.inner.weight", "position"], modify=True) as real, torch.no_grad():
        assert real["position"].dtype == torch.float32
        assert torch.equal(real["position"], reference.master_of("position"))
        real["position"].mul_(1.5)
        engine.module.blocks[0].inner.weight.add_(0.01)  # type: ignore[index, union-attr, operator]
    for name, change in (("position", lambda v: v.mul_(1.5)), ("blocks.0.inner.weight", lambda v: v.add_(0.01))):
        change(reference.masters[name])
        reference.params[name].data.copy_(reference.masters[name].view_as(reference.params[name]))
    assert_same_parameters(engine, reference)
    train_both(engine, reference, PLAIN, 3, first=2)
    assert_same_parameters(engine, reference)


def test_gathered_copies_do_not_write_back(make_engine: MakeEngine) -> None:
    engine = make_engine(PLAIN.model())
    before = snapshot(engine.state_dict())
    with engine.gathered("position") as real, torch.no_grad():
        real["position"].zero_()
    assert_same_values(engine.state_dict(), before)


def test_gathered_writes_nothing_after_an_exception(make_engine: MakeEngine) -> None:
    engine = make_engine(PLAIN.model())
    before = snapshot(engine.state_dict())
    with pytest.raises(ZeroDivisionError), engine.gathered("position", modify=True) as real, torch.no_grad():  # noqa: PT012
        real["position"].zero_()
        raise ZeroDivisionError
    assert_same_values(engine.state_dict(), before)
    train(engine, PLAIN, 1)


@pytest.mark.parametrize("spelling", ["tokens.weight", "head.weight", "parameter", "other-parameter", "all"])
def test_gathered_finds_tied_parameters_by_any_name(spelling: str, make_engine: MakeEngine) -> None:
    engine = make_engine(PLAIN.model())
    model = engine.module
    given: Any = {
        "parameter": model.get_parameter("tokens.weight"),
        "other-parameter": model.get_parameter("head.weight"),
        "all": model.parameters(),
    }.get(spelling, spelling)
    with engine.gathered(given, modify=True) as real, torch.no_grad():
        assert model.tokens.weight is model.head.weight  # type: ignore[union-attr]
        assert real["tokens.weight"] is model.tokens.weight  # type: ignore[union-attr]
        model.head.weight.fill_(0.25)  # type: ignore[union-attr, operator]
    assert bool((engine.state_dict()["tokens.weight"] == 0.25).all())
    assert bool((engine.state_dict()["head.weight"] == 0.25).all())


def test_gathered_refuses_what_is_not_the_models(make_engine: MakeEngine) -> None:
    engine = make_engine(PLAIN.model())
    for stranger in ("blocks.7.weight", nn.Parameter(torch.zeros(2)), torch.zeros(2)):
        with pytest.raises(AngelPTMError, match="is not a parameter of this engine's model"), engine.gathered(stranger):
            pass


def test_gathered_frozen_parameter_can_be_changed(make_both: MakeBoth) -> None:
    model = PLAIN.model()
    model.position.requires_grad_(False)  # type: ignore[union-attr, operator]
    engine, reference = make_both(model)
    train_both(engine, reference, PLAIN, 1)
    with engine.gathered("position", modify=True) as real, torch.no_grad():
        assert not real["position"].requires_grad
        real["position"].mul_(2)
    dict(reference.model.named_parameters())["position"].data.mul_(2)
    train_both(engine, reference, PLAIN, 2, first=1)
    assert_same_parameters(engine, reference)


FAMILIES = [GPT2, LLAMA, T5]


def _reload(family: Family, folder: Path) -> dict[str, torch.Tensor]:
    model = type(family.model()).from_pretrained(folder)  # type: ignore[attr-defined]
    return dict(model.named_parameters())


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000], ids=["one-file", "sharded"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_transformers_loads_the_export(
    family: Family, precision: str, shard_bytes: int, make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_engine(family.model(), precision=precision)
    train(engine, family, 2)
    files = engine.export_safetensors(tmp_path / "export", max_shard_bytes=shard_bytes)
    assert (len(files) > 2) == (shard_bytes < 10**9)
    values = engine.state_dict()
    loaded = _reload(family, tmp_path / "export")
    assert set(loaded) == set(engine.parameter_names())
    for name, param in loaded.items():
        assert torch.equal(param.detach().to(values[name].dtype), values[name]), name
        assert torch.equal(param.detach().float(), values[name].float()), name
    if shard_bytes < 10**9:
        largest = max(value.numel() * value.element_size() for value in values.values())
        assert all(file.stat().st_size <= max(shard_bytes, largest) + 4096 for file in files)


def test_export_of_masters_keeps_fp32(make_both: MakeBoth, tmp_path: Path) -> None:
    engine, reference = make_both(GPT2.model(), precision="bf16")
    train_both(engine, reference, GPT2, 3)
    (file,) = engine.export_safetensors(tmp_path / "export", master=True)
    loaded = load_file(file)
    for name in engine.parameter_names():
        assert torch.equal(loaded[name], reference.master_of(name)), name


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize("before", ["no-folder", "former-export"])
def test_failed_export_leaves_nothing_half_written(
    before: str, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(GPT2.model())
    folder = tmp_path / "deep" / "export"
    if before == "former-export":
        engine.export_safetensors(folder, max_shard_bytes=40_000)
    kept = _contents(folder)
    train(engine, GPT2, 1)
    read = LazyState.__getitem__

    def fail(self: LazyState, name: str) -> torch.Tensor:
        if name == "transformer.ln_f.weight":
            raise OSError(28, "No space left on device")
        return read(self, name)

    monkeypatch.setattr(LazyState, "__getitem__", fail)
    with pytest.raises(OSError, match="No space left"):
        engine.export_safetensors(folder, max_shard_bytes=40_000)
    assert _contents(folder) == kept
    assert folder.exists() == (before == "former-export"), "a folder that was made for nothing is taken back"


@pytest.mark.parametrize("sizes", [(10**9, 40_000), (40_000, 10**9), (40_000, 80_000)], ids=str)
def test_export_replaces_a_former_one_of_other_files(
    sizes: tuple[int, int], make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_engine(GPT2.model())
    engine.export_safetensors(tmp_path / "export", max_shard_bytes=sizes[0])
    (tmp_path / "export" / "notes.txt").write_text("mine")
    train(engine, GPT2, 1)
    files = engine.export_safetensors(tmp_path / "export", max_shard_bytes=sizes[1])
    loaded = _reload(GPT2, tmp_path / "export")
    assert_same_values({n: v.detach() for n, v in loaded.items()}, {n: engine.state_dict()[n] for n in loaded})
    assert sorted((tmp_path / "export").glob("*.safetensors")) == sorted(files)
    assert (tmp_path / "export" / "notes.txt").exists()


def test_index_of_a_sharded_export_names_every_tensor(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(LLAMA.model())
    files = engine.export_safetensors(tmp_path / "export", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(engine.parameter_names())
    assert {tmp_path / "export" / name for name in index["weight_map"].values()} == set(files)
    total = sum(
        value.numel() * value.element_size() for value in map(engine.state_dict().__getitem__, index["weight_map"])
    )
    assert index["metadata"]["total_size"] == total


def test_plain_module_survives_export_and_load_with_its_buffers(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(PLAIN.model())
    train(engine, PLAIN, 2)
    with torch.no_grad():
        engine.module.blocks[0].shift.fill_(0.125)  # type: ignore[index, union-attr, operator]
    engine.export_safetensors(tmp_path / "export")
    again = make_engine(materialize(lambda: PLAIN.build(), weights=tmp_path / "export"), planned_for=PLAIN.model())
    assert_same_values(again.state_dict(), snapshot(engine.state_dict()))
