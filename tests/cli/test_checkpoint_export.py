"""export: what transformers and torch.distributed.checkpoint load is what the run computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from angelptm.checkpoint import dcp as dcp_export
from angelptm.checkpoint.export import round_to_bf16
from angelptm.checkpoint.opened import open_commit
from angelptm.checkpoint.records import Kind
from angelptm.engine.dtypes import rounded

from .runs import Run
from .test_checkpoint_look import first_page, in_json, spoil


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


def arguments(run: Run, out: Path, *more: str) -> list[str]:
    return ["export", str(run.folder), str(out), "--ssd", str(run.ssd), *more]


def test_transformers_loads_the_same_values_as_from_the_engine(
    angelptm: Callable, trained: Run, tmp_path: Path
) -> None:
    found = in_json(angelptm, *arguments(trained, tmp_path / "out"))
    assert found["files"] == [str(tmp_path / "out" / "model.safetensors")]
    assert_same(load_file(found["files"][0]), load_file(trained.export / "model.safetensors"))
    ours, engines = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "out", trained.export)
    )
    assert_same(ours.state_dict(), engines.state_dict())
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stored.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[trained.precision]


def test_shards_have_an_index_and_the_same_values(angelptm: Callable, trained: Run, tmp_path: Path) -> None:
    found = in_json(angelptm, *arguments(trained, tmp_path / "out", "--max-shard", "100KB"))
    assert len(found["files"]) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {str(tmp_path / "out" / name) for name in index["weight_map"].values()} == set(found["files"])
    values = {name: value for file in found["files"] for name, value in load_file(file).items()}
    assert_same(values, load_file(trained.export / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in model.named_parameters():
        assert torch.equal(value, values[name]), name


def test_fp32_gives_the_masters_and_bf16_rounds_them(angelptm: Callable, trained: Run, tmp_path: Path) -> None:
    masters = load_file(trained.masters / "model.safetensors")
    in_json(angelptm, *arguments(trained, tmp_path / "fp32", "--dtype", "fp32"))
    assert_same(load_file(tmp_path / "fp32" / "model.safetensors"), masters)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fp32").dtype == torch.float32
    in_json(angelptm, *arguments(trained, tmp_path / "bf16", "--dtype", "bf16"))
    expected = {name: rounded(value, torch.bfloat16) for name, value in masters.items()}
    assert_same(load_file(tmp_path / "bf16" / "model.safetensors"), expected)


def test_rounding_to_bf16_is_that_of_updates() -> None:
    words = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    special = np.array([0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 1, 0x80000000], np.uint32)
    values = np.concatenate([words, special]).view(np.float32)
    number = ~np.isnan(values)
    expected = rounded(torch.from_numpy(values.copy()), torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(round_to_bf16(values)[number], expected[number])
    assert np.isnan((round_to_bf16(values)[~number].astype(np.uint32) << 16).view(np.float32)).all()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*TypedStorage is deprecated")
def test_dcp_loads_masters_moments_counters_and_groups(
    angelptm: Callable, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dcp_export, "_FILE_BYTES", 100_000)
    found = in_json(angelptm, *arguments(trained, tmp_path / "out", "--format", "dcp"))
    assert len(found["files"]) > 5
    masters = load_file(trained.masters / "model.safetensors")
    moment = torch.zeros_like(masters["transformer.h.0.mlp.c_fc.weight"])
    state = {
        "model": {name: torch.zeros_like(value) for name, value in masters.items()},
        "optimizer": {
            "state": {"transformer.h.0.mlp.c_fc.weight": {"exp_avg": moment}},
            "param_groups": [{"lr": 0.0}],
        },
        "step": 0,
        "data": {"position": 0},
    }
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_same(state["model"], masters)
    assert moment.count_nonzero() > 0
    assert state["step"] == 2
    assert state["data"] == {"position": 1}
    assert state["optimizer"]["param_groups"] == [{"lr": 1e-2}]

    dcp_to_torch_save(tmp_path / "out", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert_same({name: whole["model"][name] for name in masters}, masters)
    assert torch.equal(whole["model"]["lm_head.weight"], masters["transformer.wte.weight"])
    (group,) = whole["optimizer"]["param_groups"]
    assert group["lr"] == 1e-2
    assert set(group["params"]) == set(masters)
    with open_commit(trained.folder, None, [trained.ssd]) as opened:
        for name, moments in whole["optimizer"]["state"].items():
            assert float(moments["step"]) == 2
            for kind in (Kind.EXP_AVG, Kind.EXP_AVG_SQ):
                expected = torch.from_numpy(opened.reader.read(name, kind)).view(masters[name].shape)
                assert torch.equal(moments[kind.name.lower()], expected), name
            assert moments["exp_avg"].count_nonzero() > 0 or name.endswith("c_attn.bias")


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
@pytest.mark.parametrize("format", ["safetensors", "dcp"])
def test_damaged_page_leaves_no_export(format: str, angelptm: Callable, run_copy: Run, tmp_path: Path) -> None:
    path, offset, _ = first_page(run_copy, 2, 3)
    spoil(path, offset)
    outcome = angelptm("checkpoint", *arguments(run_copy, tmp_path / "deep" / "out", "--format", format))
    assert outcome.code == 2
    assert outcome.err.count("error:") == 1
    assert "CRC32C" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_dcp_refuses_a_folder_that_has_something(angelptm: Callable, trained: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    outcome = angelptm("checkpoint", *arguments(trained, tmp_path, "--format", "dcp"))
    assert outcome.code == 2
    assert "something there already" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("more", [["--max-shard", "many"], ["--format", "dcp", "--dtype", "bf16"]])
@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_options_that_make_no_sense_are_refused(
    more: list[str], angelptm: Callable, trained: Run, tmp_path: Path
) -> None:
    outcome = angelptm("checkpoint", *arguments(trained, tmp_path / "out", *more))
    assert outcome.code == 2
    assert more[-2] in outcome.err
    assert not (tmp_path / "out").exists()
