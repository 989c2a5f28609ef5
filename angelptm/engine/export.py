"""Parameters leave: as a mapping that reads on access, and as safetensors files that are written as a stream."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from angelptm.engine.values import Values
from angelptm.units import ParamLayout

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_EXPORTED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


class LazyState(Mapping[str, torch.Tensor]):
    """Names in ``state_dict`` order to values that are read when asked for.

    A tied parameter appears under every name, as in torch; ``first_name`` tells which one it is stored under.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, tuple[int, ParamLayout]],
        first_name: Mapping[str, str],
        values: Values,
        *,
        master: bool,
    ) -> None:
        self._values = values
        self._master = master
        self._params = params
        self._buffers: dict[str, torch.Tensor] = {
            name: buffer for name, buffer in model.state_dict().items() if buffer is not None
        }
        self._first = first_name
        self._names = list(self._buffers)

    def first_name(self, name: str) -> str:
        return self._first.get(name, name)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Of the value that ``self[name]`` reads, without reading it."""
        value = self._buffers[name]
        trainable = name in self._first and self._params[self._first[name]][1].trainable
        return tuple(value.shape), torch.float32 if self._master and trainable else value.dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._first:
            return self._buffers[name]
        unit, param = self._params[self._first[name]]
        return self._values.read(unit, param, master=self._master and param.trainable)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def export_safetensors(model: nn.Module, state: LazyState, folder: Path, max_shard_bytes: int) -> list[Path]:
    """Writes each value once, under its first name, in files of at most ``max_shard_bytes`` (a larger tensor has a file
    of its own), with the index that transformers reads. Files appear under their names only when all are complete;
    those of a former export that are not among them are removed."""
    names = [name for name in state if state.first_name(name) == name]
    shards = _shards(state, names, max_shard_bytes)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    finals = [
        folder / (f"model-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors")
        for index in range(1, len(shards) + 1)
    ]
    index = folder / "model.safetensors.index.json"
    whole = [*finals, *([index] if len(shards) > 1 else [])]
    parts = [path.with_name(path.name + ".part") for path in whole]
    try:
        for path, shard in zip(parts, shards):
            _write_file(path, state, shard)
        if len(shards) > 1:
            content = {
                "metadata": {"total_size": sum(_size(state, name) for name in names)},
                "weight_map": {name: path.name for path, shard in zip(finals, shards) for name in shard},
            }
            parts[-1].write_text(json.dumps(content, indent=2), encoding="utf-8")
        for part, final in zip(parts, whole):
            os.replace(part, final)
    except BaseException:
        for part in parts:
            part.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    # What a former export into this folder left would be loaded in place of these files, or mixed with them.
    for path in folder.iterdir():
        if _EXPORTED.fullmatch(path.name) and path not in whole:
            path.unlink()
    for attribute in ("config", "generation_config"):
        config = getattr(model, attribute, None)
        if config is not None and hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)
    return finals


def _size(state: LazyState, name: str) -> int:
    shape, dtype = state.shape_and_dtype(name)
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def _shards(state: LazyState, names: list[str], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = _size(state, name)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_file(path: Path, state: LazyState, names: list[str]) -> None:
    """The safetensors format: the header's length in 8 bytes, the header as JSON, then the values in its order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        shape, dtype = state.shape_and_dtype(name)
        size = _size(state, name)
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            value = state[name].detach().contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
