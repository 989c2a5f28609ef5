"""nanoGPT's token files: a .bin of raw little-endian uint16 (or uint32) tokens, or a folder with train.bin, val.bin."""

from __future__ import annotations

from pathlib import Path

from angelptm.data.tokens import TokenFile
from angelptm.errors import DataError


def open_nanogpt(path: Path, dtype: str) -> tuple[TokenFile, TokenFile | None]:
    """(train, validation); validation is None where the path names one file or the folder has no val.bin."""
    if path.is_dir():
        if not (path / "train.bin").is_file():
            raise DataError(str(path), "no train.bin", "a .bin file, or a folder with train.bin and val.bin")
        held_out = path / "val.bin"
        return TokenFile(path / "train.bin", dtype), TokenFile(held_out, dtype) if held_out.is_file() else None
    return TokenFile(path, dtype), None
