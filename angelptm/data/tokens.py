"""Long sequences of tokens in files, read piece by piece: neither the file nor its pages come to live in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from angelptm.errors import DataError
from angelptm.foreign import regular_size_bytes

TokenArray = npt.NDArray[np.integer[Any]]
Progress = Callable[[int, int], None]
"""Called with (done, total) now and then."""

_SCAN_TOKENS = 1 << 20


class TokenSource(Protocol):
    """``path`` names the source in errors; ``known_max_token`` is None where nobody has looked yet."""

    path: Path
    known_max_token: int | None

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> TokenArray:
        """(count,) tokens from ``start`` on, in the file's dtype. Raises DataError when the file has changed."""
        ...


class TokenFile:
    """Raw tokens, back to back, from the file's begin. ``read`` opens the file anew: there is nothing to close."""

    def __init__(self, path: Path, dtype: str | np.dtype[Any], known_max_token: int | None = None) -> None:
        self.path, self.dtype, self.known_max_token = path, np.dtype(dtype).newbyteorder("<"), known_max_token
        size_bytes = regular_size_bytes(path, "a readable token file")
        if size_bytes % self.dtype.itemsize:
            raise DataError(
                str(path),
                f"{size_bytes} bytes",
                f"a multiple of {self.dtype.itemsize}, the size of a {self.dtype.name}",
            )
        self._count: int = size_bytes // self.dtype.itemsize

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, count: int) -> TokenArray:
        assert 0 <= start <= start + count <= self._count, (start, count, self._count)
        return read_array(self.path, self.dtype, count, start * self.dtype.itemsize)


class TokenRange:
    """A part of a source: tokens ``start`` to ``stop``."""

    def __init__(self, source: TokenSource, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= len(source), (start, stop, len(source))
        self.path, self.known_max_token = source.path, source.known_max_token
        self._source, self._start, self._stop = source, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, start: int, count: int) -> TokenArray:
        assert 0 <= start <= start + count <= len(self), (start, count, len(self))
        return self._source.read(self._start + start, count)


def read_array(path: Path, dtype: np.dtype[Any], count: int, offset_bytes: int) -> npt.NDArray[Any]:
    """(count,) of dtype at the offset; DataError if the file cannot give all of them."""
    try:
        found = np.fromfile(path, dtype=dtype, count=count, offset=offset_bytes)
    except OSError as error:
        raise DataError(str(path), error.strerror or str(error), "a readable token file") from error
    if len(found) != count:
        raise DataError(
            str(path),
            f"{len(found)} of {count} values at byte {offset_bytes}",
            "all of them",
            "The file was cut short.",
        )
    return found


def split_tail(source: TokenSource, fraction: float, sequence_length: int) -> tuple[TokenSource, TokenSource | None]:
    """(head, tail) where the tail has the fraction, and one sequence at least; None for fraction 0."""
    if fraction == 0:
        return source, None
    held_out = min(max(int(len(source) * fraction), sequence_length), len(source))
    cut = len(source) - held_out
    return TokenRange(source, 0, cut), TokenRange(source, cut, len(source))


def max_token(source: TokenSource, progress: Progress | None = None) -> int:
    """The largest token, -1 if there is none: a model needs a vocabulary above it. Reads everything unless known.

    Raises DataError for a negative token.
    """
    if source.known_max_token is not None:
        return source.known_max_token
    largest = -1
    for start in range(0, len(source), _SCAN_TOKENS):
        tokens = source.read(start, min(_SCAN_TOKENS, len(source) - start))
        if tokens.min() < 0:
            raise DataError(str(source.path), f"the token {tokens.min()}", "tokens of at least 0")
        largest = max(largest, int(tokens.max()))
        if progress is not None:
            progress(start + len(tokens), len(source))
    return largest
