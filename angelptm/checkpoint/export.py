"""A commit's parameters as safetensors files, without a model and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from angelptm.checkpoint.header import BufferRecord, ParamRecord
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import Kind
from angelptm.checkpoint.safetensors_files import DTYPES, TensorEntry, write_safetensors
from angelptm.errors import CheckpointError

Precision = Literal["fp32", "bf16"]
Array = npt.NDArray[Any]

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
_ITEMSIZES = {"fp32": 4, "bf16": 2}


def export_safetensors(reader: CommitReader, folder: Path, dtype: Precision | None, max_shard_bytes: int) -> list[Path]:
    """Writes every parameter once, under its first name, and every buffer as it is; returns the files.

    ``dtype``: of the parameters; None is the precision of training, in which they are what the run computed with.
    ``config.json`` is written where the commit knows the model's configuration. Memory: the reader's pages. Raises
    CorruptPageError, CheckpointError or IoError; the folder gets complete files or none.
    """
    header = reader.manifest.header
    precision: Precision = dtype or header.precision
    tensors = [
        TensorEntry(
            param.name,
            _TORCH_NAMES[precision],
            param.shape,
            param.numel * _ITEMSIZES[precision],
            partial(_param_bytes, reader, param, precision),
        )
        for unit in header.units
        for param in unit.params
    ]
    tensors += [
        TensorEntry(buffer.name, buffer.dtype, buffer.shape, buffer.bytes, partial(_buffer_bytes, reader, buffer))
        for buffer in header.buffers
    ]
    for one in tensors:
        if one.dtype not in DTYPES:
            raise CheckpointError(f"commit of step {header.step}", f"{one.name} of {one.dtype}", "a safetensors dtype")
    texts = {}
    if header.model is not None:
        # transformers loads in this dtype, so it has to be that of the files.
        config = {**header.model, "dtype": _TORCH_NAMES[precision]}
        config.pop("torch_dtype", None)
        texts["config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return write_safetensors(folder, tensors, max_shard_bytes, texts)


def values_of(reader: CommitReader, param: ParamRecord) -> Iterator[Array]:
    """The values of a parameter in fp32, in parts: its master, or a frozen parameter's own value."""
    for part in reader.parts(param.name, Kind.MASTER if param.trainable else Kind.PARAM):
        yield _widen(part) if part.dtype == np.uint16 else part


def _param_bytes(reader: CommitReader, param: ParamRecord, precision: Precision) -> Iterator[Any]:
    if precision == "bf16":
        for part in reader.parts(param.name, Kind.MASTER if param.trainable else Kind.PARAM):
            yield (part if part.dtype == np.uint16 else round_to_bf16(part)).data
    else:
        for part in values_of(reader, param):
            yield part.data


def _buffer_bytes(reader: CommitReader, buffer: BufferRecord) -> Iterator[Any]:
    for part in reader.parts(buffer.name, Kind.BUFFER):
        yield part.data


def _widen(bits: Array) -> Array:
    wide: Array = bits.astype("<u4") << np.uint32(16)
    return wide.view("<f4")


def round_to_bf16(values: Array) -> Array:
    """bits of float32 values rounded to the nearest bfloat16, ties away from zero, as the update kernels do."""
    rounded = (values.view("<u4") + np.uint32(0x8000)) >> np.uint32(16)
    # Adding would carry a NaN over into an infinity or a zero.
    rounded[np.isnan(values)] = 0x7FC0
    result: Array = rounded.astype("<u2")
    return result
