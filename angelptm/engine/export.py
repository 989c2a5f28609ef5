"""Parameters leave: as a mapping that reads on access, and as safetensors files that are written as a stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from angelptm.checkpoint.safetensors_files import TensorEntry, write_safetensors
from angelptm.engine.values import Values
from angelptm.units import ParamLayout


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
    """Writes each value once, under its first name; see ``write_safetensors``. The model's config is written too."""
    names = [name for name in state if state.first_name(name) == name]
    finals = write_safetensors(folder, [_entry(state, name) for name in names], max_shard_bytes)
    for attribute in ("config", "generation_config"):
        config = getattr(model, attribute, None)
        if config is not None and hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)
    return finals


def _entry(state: LazyState, name: str) -> TensorEntry:
    shape, dtype = state.shape_and_dtype(name)

    def read() -> Iterator[Any]:
        yield state[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return TensorEntry(name, str(dtype).removeprefix("torch."), shape, math.prod(shape) * dtype.itemsize, read)
