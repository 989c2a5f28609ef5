"""Which text files make a corpus, in an order that no locale or file system changes, and how they are split."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from angelptm.errors import DataError

# Installed packages are no part of the standard library, though they live inside its folder.
_STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text file. ``name`` is its path below the corpus folder, with '/', the same on every machine."""

    name: str
    path: Path
    size_bytes: int
    mtime_ns: int


def stdlib_documents() -> list[Document]:
    """The source files of the Python standard library that runs this."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return _walk(folder, (".py",), _STDLIB_EXCLUDED)


def text_documents(path: Path, extensions: Sequence[str]) -> list[Document]:
    """A file, whatever its name, or the files of a folder and its subfolders with one of the endings."""
    if path.is_dir():
        return _walk(path, tuple(extensions), frozenset({"__pycache__", ".git"}))
    if not path.is_file():
        raise DataError(str(path), "no such file or folder", "a text file or a folder of them", "Set data.path.")
    return [_document(path.name, path)]


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(train, validation), each file going by a hash of its name alone: adding files moves no other one.

    Neither side is empty if there are two files and the fraction is above 0.
    """
    if fraction == 0 or len(documents) < 2:
        return list(documents), []
    ranks = {document.name: _rank(document.name) for document in documents}
    lowest, highest = min(ranks, key=ranks.__getitem__), max(ranks, key=ranks.__getitem__)
    held_out = {name for name, rank in ranks.items() if (rank < fraction or name == lowest) and name != highest}
    train = [document for document in documents if document.name not in held_out]
    return train, [document for document in documents if document.name in held_out]


def _rank(name: str) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def _walk(folder: Path, endings: tuple[str, ...], excluded: frozenset[str]) -> list[Document]:
    """Links are left out: they lead out of the folder, or round in circles."""
    found: list[Document] = []

    def refuse(error: OSError) -> None:
        raise DataError(str(error.filename), error.strerror or "an error", "a readable folder") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name not in excluded]
        for name in names:
            path = Path(parent, name)
            if name.endswith(endings) and path.is_file() and not path.is_symlink():
                found.append(_document(path.relative_to(folder).as_posix(), path))
    if not found:
        raise DataError(
            str(folder), "no file that ends in " + ", ".join(endings), "at least one", "See data.extensions."
        )
    return sorted(found, key=lambda document: os.fsencode(document.name))


def _document(name: str, path: Path) -> Document:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(str(path), error.strerror or "an error", "a readable file") from error
    return Document(name, path, status.st_size, status.st_mtime_ns)
