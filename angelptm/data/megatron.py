"""Megatron's indexed datasets: PREFIX.bin holds the tokens, PREFIX.idx says where each sequence begins.

The index, little-endian, back to back:

    9 bytes   MMIDIDX and two zero bytes
    uint64    version, 1
    uint8     token type
    uint64    number of sequences, S
    uint64    number of document indices, D
    int32[S]  tokens in each sequence
    int64[S]  byte offset of each sequence in the .bin
    int64[D]  document i begins at sequence [i]; ascending
    int8[S]   modes (only in multimodal data)

Nothing in it is believed: sizes are checked against the file's before they are used, offsets against the .bin's.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from angelptm.data.tokens import TokenArray, TokenFile, TokenSource, read_array
from angelptm.errors import DataError
from angelptm.foreign import regular_size_bytes

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_OTHER_TYPES = {6: "float64", 7: "float32"}


class MegatronTokens:
    """The sequences one after another in the index's order, wherever they lie in the .bin."""

    def __init__(self, tokens: TokenFile, lengths: npt.NDArray[np.int64], begins: npt.NDArray[np.int64]) -> None:
        """lengths, begins: (S,) tokens of each sequence, and its first token's index in the .bin."""
        self.path, self.known_max_token = tokens.path, tokens.known_max_token
        self._tokens, self._begins = tokens, begins
        self._ends = np.cumsum(lengths)
        self._lengths = lengths

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> TokenArray:
        assert 0 <= start <= start + count <= len(self), (start, count, len(self))
        parts: list[TokenArray] = []
        sequence = int(np.searchsorted(self._ends, start, side="right"))
        while count > 0:
            skip = start - int(self._ends[sequence] - self._lengths[sequence])
            take = min(count, int(self._lengths[sequence]) - skip)
            if take:
                parts.append(self._tokens.read(int(self._begins[sequence]) + skip, take))
            start, count, sequence = start + take, count - take, sequence + 1
        return np.concatenate(parts) if parts else np.empty(0, self._tokens.dtype)


def open_megatron(path: Path) -> TokenSource:
    """path: the prefix, or either of the two files. Raises DataError for anything that does not add up."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    index, data = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    type_name, lengths, offsets = _read_index(index)
    tokens = TokenFile(data, type_name)
    item_bytes, bin_bytes = tokens.dtype.itemsize, len(tokens) * tokens.dtype.itemsize
    _check(index, lengths.min(initial=0) >= 0, "a negative sequence length", "lengths of at least 0")
    _check(index, offsets.min(initial=0) >= 0, "a negative byte offset", "offsets of at least 0")
    _check(index, not (offsets % item_bytes).any(), "a byte offset inside a token", f"multiples of {item_bytes}")
    # Subtracted, not added: an offset near 2**63 plus a length would wrap around.
    inside = lengths * item_bytes <= bin_bytes - np.minimum(offsets, bin_bytes)
    _check(
        index, bool((inside & (offsets <= bin_bytes)).all()), "a sequence beyond the .bin", f"at most {bin_bytes} bytes"
    )
    begins = offsets // item_bytes
    back_to_back = np.array_equal(begins, np.cumsum(lengths) - lengths)
    if back_to_back and int(lengths.sum()) == len(tokens):
        return tokens
    return MegatronTokens(tokens, lengths, begins)


def _read_index(path: Path) -> tuple[str, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(token type, lengths in tokens, offsets in bytes); only the index's own sizes have been checked."""
    size_bytes = regular_size_bytes(path, "the index of a Megatron dataset")
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise DataError(str(path), error.strerror or "an error", "the index of a Megatron dataset") from error
    _check(path, header.startswith(_MAGIC), f"the first bytes {header[:9]!r}", f"{_MAGIC!r}, as Megatron writes")
    _check(path, len(header) == _HEADER.size, f"{len(header)} bytes", f"a header of {_HEADER.size} bytes")
    _, version, code, sequence_count, document_count = _HEADER.unpack(header)
    _check(path, version == 1, f"version {version}", "version 1")
    _check(
        path, code in _TOKEN_TYPES, f"token type {code} ({_OTHER_TYPES.get(code, 'unknown')})", f"one of {_TOKEN_TYPES}"
    )
    without_modes = _HEADER.size + 12 * sequence_count + 8 * document_count
    _check(
        path,
        size_bytes in (without_modes, without_modes + sequence_count),
        f"{size_bytes} bytes",
        f"{without_modes} bytes for {sequence_count} sequences and {document_count} document indices",
    )
    offset = _HEADER.size
    lengths = read_array(path, np.dtype("<i4"), sequence_count, offset).astype(np.int64)
    offsets = read_array(path, np.dtype("<i8"), sequence_count, offset + 4 * sequence_count)
    documents = read_array(path, np.dtype("<i8"), document_count, offset + 12 * sequence_count)
    ascending = bool((documents[1:] >= documents[:-1]).all())
    in_range = documents.min(initial=0) >= 0 and documents.max(initial=0) <= sequence_count
    _check(path, ascending and in_range, "document indices out of order", f"ascending ones from 0 to {sequence_count}")
    return _TOKEN_TYPES[code], lengths, offsets


def _check(path: Path, true: Any, found: str, expected: str) -> None:
    if not true:
        raise DataError(str(path), found, expected, "The file is damaged or of another kind.")
