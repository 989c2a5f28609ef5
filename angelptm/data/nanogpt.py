"""nanoGPT's token files: a .bin of raw little-endian uint16 (or uint32) tokens, or a folder with train.bin, val.bin."""

from __future__ import annotations

from pathlib import Path

from angelptm.data.tokens import TokenFile
from angelptm.errors import DataError
from angelptm.foreign import check_inside


def open_nanogpt(path: Path, dtype: str) -> tuple[TokenFile, TokenFile | None]:
    """(train, validation); validation is None where the path names one file or the folder has no val.bin.

    A link in a folder that leads out of it is a DataError: who means another file can name it."""
    if path.is_dir():
        if not (path / "train.bin").is_file():
            raise DataError(str(path), "no train.bin", "a .bin file, or a folder with train.bin and val.bin")
        held_out = path / "val.bin"
        for file in (path / "train.bin", held_out):
            check_inside(file, path)
        return TokenFile(path / "train.bin", dtype), TokenFile(held_out, dtype) if held_out.is_file() else None
    return TokenFile(path, dtype), None
