"""A folder of weights that somebody else wrote: no code, no network, no file outside, no memory beyond the weights'."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from angelptm.errors import DataError
from angelptm.model.materialize import materialize
from angelptm.model.sources import SafetensorsValues

from .models import GPT2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    GPT2.model().save_pretrained(tmp_path / "weights")  # type: ignore[operator]
    return tmp_path / "weights"


def change(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_code_and_kernels_that_a_config_names_are_not_used(folder: Path) -> None:
    change(
        folder,
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "someone/evil--evil.Model"},
        trust_remote_code=True,
        attn_implementation="someone/kernel",
        _attn_implementation="someone/kernel",
        _attn_implementation_internal="someone/kernel",
        _name_or_path="someone/evil",
    )
    (folder / "evil.py").write_text("raise SystemExit('the code of a folder ran')")
    model: Any = materialize(folder)
    assert type(model).__module__ == "transformers.models.gpt2.modeling_gpt2"
    assert not hasattr(model.config, "auto_map")
    assert "kernel" not in str(model.config._attn_implementation)
    change(folder, model_type="evil")
    with pytest.raises(DataError, match="Unrecognized model identifier"):
        materialize(folder)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"n_layer": 10**9}, "a number that a model can have"),
        ({"n_layer": 10**6}, "a model of more than"),
        ({"num_labels": 10**12}, "a number that a model can have"),
        ({"vocab_size": 10**12}, "of shape"),
        ({"n_embd": 2**40, "n_head": 1}, "of shape|integer|overflow|dimension"),
        ({"n_embd": 2**62, "n_head": 1}, "a model that transformers can build"),
        ({"n_positions": 2**30}, "of shape"),
        ({"n_layer": 3}, r"no tensor transformer\.h\.2"),
        ({"n_embd": -64}, "a model that transformers can build"),
        ({"n_head": 0}, "ZeroDivisionError"),
        ({"n_head": 10**400}, "an unreadable file|a number that a model can have"),
        ({"vocab_size": "96"}, "Strict"),
        ({"activation_function": "../x"}, "KeyError"),
        ({"dtype": "load it"}, "AttributeError"),
        ({"model_type": ["gpt2"]}, "no model_type"),
        ({"initializer_range": float("nan")}, "std nan"),  # the build on the meta device does not mind
        ({"x": [[[[]]] * 40] * 40}, None),
    ],
    ids=str,
)
def test_config_that_the_weights_do_not_bear_out_is_refused_without_its_memory(
    folder: Path, keys: dict[str, Any], part: str | None
) -> None:
    change(folder, **keys)
    if part is None:
        materialize(folder)
        return
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=part):
            materialize(folder)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


def test_tables_beyond_the_size_of_the_weights_are_refused(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    def build(config: Any) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_config(config)
        model.register_buffer("mask", torch.zeros(20_000, 20_000))
        return model

    with pytest.raises(DataError, match=r"16000.* bytes of buffers"):
        materialize(folder, build=build)


@pytest.mark.parametrize(
    "text", ["[]", "5", "{}", '{"model_type": 1}', "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, "\x80", ""], ids=repr
)
def test_file_that_is_no_config_is_a_data_error(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"config\.json"):
        materialize(folder)


def test_nested_or_huge_config_is_a_data_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nested: Any = 1
    for _ in range(40):
        nested = {"a": nested}
    change(folder, nested=nested)
    with pytest.raises(DataError, match="more than 32 levels"):
        materialize(folder)
    monkeypatch.setattr("angelptm.model.folder._LIMIT_BYTES", 100)
    with pytest.raises(DataError, match="of at most 100 bytes"):
        materialize(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_link_that_leads_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(f"../{name}")
    with pytest.raises(DataError, match=f"a link to .*{name}, expected a file inside"):
        materialize(folder)


def test_snapshot_of_the_hugging_face_cache_may_link_to_its_own_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / f"{path.name}-hash")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-hash")
    materialize(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../models--c--d/blobs/secret")
    with pytest.raises(DataError, match="a link to"):
        materialize(snapshot)


@pytest.mark.timeout(20)
def test_weights_that_are_no_regular_file_are_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "more.safetensors")
    with pytest.raises(DataError, match="no regular file"):
        materialize(folder)


def read_one(folder: Path) -> torch.Tensor:
    params: Any = [SimpleNamespace(name="weight", owners=[("", "weight")], shape=(2,))]
    unit: Any = SimpleNamespace(params=params)
    return SafetensorsValues(folder).values(nn.Linear(1, 1), unit)["weight"]


def write_header(folder: Path, header: object, data: bytes = bytes(8), length: int | None = None) -> None:
    text = json.dumps(header).encode()
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, None),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "unreadable"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 2**63]}, "unreadable"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "unreadable"),
        ({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}, "unreadable"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "unreadable"),
        ({"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}, "unreadable"),
        ({"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}, "floating point"),
        ({"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}, "shape"),
        ({"dtype": "F64", "shape": [1] * 5000, "data_offsets": [0, 8]}, "5000 dimensions"),
    ],
    ids=str,
)
def test_header_that_lies_is_a_data_error(tmp_path: Path, tensor: dict[str, Any], part: str | None) -> None:
    write_header(tmp_path, {"weight": tensor})
    if part is None:
        assert read_one(tmp_path).tolist() == [0, 0]
        return
    with pytest.raises(DataError, match=part):
        read_one(tmp_path)


def test_overlapping_tensors_and_lengths_beyond_the_file_are_data_errors(tmp_path: Path) -> None:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for header, length in (({"weight": tensor, "b": tensor}, None), ({}, 2**63), ({}, 10**8), ({}, 0)):
        write_header(tmp_path, header, length=length)
        with pytest.raises(DataError, match="unreadable"):
            read_one(tmp_path)


def test_weights_that_change_after_opening_are_a_data_error(folder: Path) -> None:
    model = materialize(folder)
    values = SafetensorsValues(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="unreadable"):
        values.check_parameters(model)


def test_names_in_an_error_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    save_file({"\x1b[2Jowned" + "x" * 500: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="no tensor weight") as caught:
        read_one(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_integers_do_not_pass_for_weights(folder: Path) -> None:
    content = load_file(folder / "model.safetensors")
    content["transformer.h.0.ln_1.bias"] = content["transformer.h.0.ln_1.bias"].int()
    save_file(content, folder / "model.safetensors")
    materialize(folder)  # types are seen when values are read
