"""A folder of safetensors files that transformers loads, written as a stream: the format needs no library to write.

Used by the engine, which reads pages of a run, and by the export of a commit.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from angelptm.checkpoint.disk import PART_SUFFIX
from io_engine.errors import IoError

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "complex64": "C64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""The format's name of each dtype, by the name that torch has for it."""

_WRITTEN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: ``dtype`` as torch names it, and ``read``, which gives its bytes in parts when it is their turn; a
    part is borrowed until the next one is asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    read: Callable[[], Iterable[Any]]


def write_safetensors(
    folder: Path, tensors: Sequence[TensorEntry], max_shard_bytes: int, texts: Mapping[str, str] | None = None
) -> list[Path]:
    """Writes files of at most ``max_shard_bytes`` (a larger tensor has a file of its own), with the index that
    transformers reads, and ``texts`` (``config.json``) beside them. Returns the files that hold tensors.

    Files appear under their names only when all are complete; those of a former export that are not among them are
    removed. What ``read`` raises comes through, and IoError; the folder then is as it was.
    """
    shards = _shards(tensors, max_shard_bytes)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    finals = [
        folder / (f"model-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors")
        for index in range(1, len(shards) + 1)
    ]
    small = {folder / name: text for name, text in (texts or {}).items()}
    if len(shards) > 1:
        content = {
            "metadata": {"total_size": sum(one.bytes for one in tensors)},
            "weight_map": {one.name: path.name for path, shard in zip(finals, shards) for one in shard},
        }
        small[folder / "model.safetensors.index.json"] = json.dumps(content, indent=2)
    whole = [*finals, *small]
    parts = [path.with_name(path.name + PART_SUFFIX) for path in whole]
    try:
        for path, shard in zip(parts, shards):
            _write(path, _content(shard))
        for path, text in zip(parts[len(finals) :], small.values()):
            _write(path, [text.encode()])
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
        if _WRITTEN.fullmatch(path.name) and path not in whole:
            path.unlink()
    return finals


def _shards(tensors: Sequence[TensorEntry], max_shard_bytes: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for one in tensors:
        if shards[-1] and filled + one.bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(one)
        filled += one.bytes
    return shards


def _content(tensors: Sequence[TensorEntry]) -> Iterable[Any]:
    """The safetensors format: the header's length in 8 bytes, the header as JSON, then the values in its order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in tensors:
        header[one.name] = {
            "dtype": DTYPES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [offset, offset + one.bytes],
        }
        offset += one.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for one in tensors:
        written = 0
        for part in one.read():
            yield part
            written += memoryview(part).nbytes
        assert written == one.bytes, f"{one.name}: {written} of {one.bytes} bytes"


def _write(path: Path, parts: Iterable[Any]) -> None:
    with path.open("wb") as file:
        for part in parts:
            try:
                file.write(part)
            except OSError as error:
                size = memoryview(part).nbytes
                raise IoError("write", str(path), file.tell(), size, error.errno or errno.EIO) from error
        file.flush()
        os.fsync(file.fileno())
