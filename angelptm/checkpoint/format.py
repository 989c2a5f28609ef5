"""The manifest: one file for each commit. docs/checkpoint-format.md has it byte by byte."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from angelptm.checkpoint.checksum import crc32c
from angelptm.checkpoint.header import FORMAT_VERSION, Header
from angelptm.checkpoint.json_value import dump_json, parse_json
from angelptm.checkpoint.records import (
    PAGE_RECORD,
    BadRecordError,
    Kind,
    Spans,
    check_records,
    kind_dtype,
    unit_bases,
)
from angelptm.errors import CheckpointError

MAGIC = b"APTMCKPT"
MAX_BYTES = 1 << 30
"""A manifest is never larger, so that reading one never takes more memory than this."""

_PREFIX = struct.Struct("<8sIIQQ")  # magic, format_version, record_bytes, json_bytes, page_count
_CRC_BYTES = 4
_REMEDY = "Choose another commit; `angelptm checkpoint verify` says which are intact."


@dataclass(frozen=True)
class Piece:
    """Where a part of a parameter (or of a buffer) lies.

    ``record`` indexes the page records; ``start`` and ``count`` are elements of the parameter (bytes of a buffer);
    ``offset`` is the first byte of the part in its page.
    """

    record: int
    start: int
    count: int
    offset: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """A commit: the header, and ``pages``, (page count,) of dtype PAGE_RECORD, which belongs to the manifest
    from now on and is made read-only.

    What ``decode`` returns satisfies every rule of the format. One that was made from parts is checked by ``encode``.
    """

    header: Header
    pages: npt.NDArray[Any]

    def __post_init__(self) -> None:
        assert self.pages.dtype == PAGE_RECORD
        assert self.pages.ndim == 1
        self.pages.setflags(write=False)

    def encode(self) -> bytes:
        """The content of the manifest file. Raises CheckpointError, as ``decode`` would, for one that breaks a rule."""
        path = manifest_name(self.header.step)
        _check(self.header, self.pages, path)
        text = dump_json(self.header.model_dump(mode="python"))
        prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, PAGE_RECORD.itemsize, len(text), len(self.pages))
        content = b"".join((prefix, text, bytes(-len(text) % 8), self.pages.tobytes()))
        if len(content) + _CRC_BYTES > MAX_BYTES:
            raise CheckpointError(
                path, f"a manifest of {len(content)} bytes", f"{MAX_BYTES} or less", "Use larger pages."
            )
        return content + struct.pack("<I", crc32c(content))

    @staticmethod
    def decode(content: bytes, path: str) -> Manifest:
        """Checks everything before it returns; ``path`` is for the text of the error. Raises only CheckpointError."""
        if len(content) > MAX_BYTES:
            raise CheckpointError(path, f"{len(content)} bytes", f"a manifest of {MAX_BYTES} bytes or less")
        json_bytes, page_count = _sizes(content, path)
        found = crc32c(memoryview(content)[:-_CRC_BYTES])
        (expected,) = struct.unpack("<I", content[-_CRC_BYTES:])
        if found != expected:
            raise CheckpointError(path, f"CRC32C {found:08x}", f"{expected:08x}, its last 4 bytes", _REMEDY)
        end = _PREFIX.size + json_bytes
        header = _parse_header(content[_PREFIX.size : end], path)
        start = end + -json_bytes % 8
        if any(content[end:start]):
            raise CheckpointError(path, "bytes other than 0 after the JSON", "padding of zeros")
        pages = np.frombuffer(content, PAGE_RECORD, page_count, start).copy()
        _check(header, pages, path)
        return Manifest(header, pages)

    def find(self, name: str, kind: Kind) -> list[Piece]:
        """The parts of a parameter (of a buffer, with BUFFER) in order of start; what no page holds is left out.

        Only PARAM of a trainable parameter, and kinds that the optimizer does not have, can be incomplete in a decoded
        manifest. Raises KeyError for an unknown name.
        """
        start, count = self._extents[kind is Kind.BUFFER][name]
        spans = self._spans(kind)
        chosen = spans.overlapping(start, count)
        itemsize = kind_dtype(kind, self.header.precision).itemsize
        pieces = []
        for record, low, high in zip(
            spans.records[chosen].tolist(), spans.starts[chosen].tolist(), spans.ends[chosen].tolist()
        ):
            first, last = max(low, start), min(high, start + count)
            pieces.append(Piece(record, first - start, last - first, (first - low) * itemsize))
        return pieces

    def size(self, name: str, kind: Kind) -> int:
        """Elements of a parameter; bytes of a buffer, with BUFFER. Raises KeyError for an unknown name."""
        return self._extents[kind is Kind.BUFFER][name][1]

    def describe(self, record: int) -> str:
        """What a page holds, for errors: "EXP_AVG of h.0.mlp.c_fc.weight[0:1048576]", "... and 3 more"."""
        page = self.pages[record]
        kind, start = Kind(int(page["kind"])), int(page["start"])
        end = start + int(page["count"])
        if kind is Kind.BUFFER:
            found = [(b.name, b.offset, b.bytes) for b in self.header.buffers]
        else:
            found = [(p.name, p.offset, p.numel) for p in self.header.units[int(page["unit"])].params]
        held = [item for item in found if item[1] < end and item[1] + item[2] > start]
        if not held:
            return f"{kind.name}, padding only"
        name, offset, size = held[0]
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        return f"{kind.name} of {name}[{max(start - offset, 0)}:{min(end - offset, size)}]{more}"

    @functools.cached_property
    def _extents(self) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
        """(start, count) in the laid-out element space of each parameter; in the buffer space of each buffer."""
        params = {
            param.name: (base + param.offset, param.numel)
            for base, unit in zip(unit_bases(self.header).tolist(), self.header.units)
            for param in unit.params
        }
        return params, {buffer.name: (buffer.offset, buffer.bytes) for buffer in self.header.buffers}

    @functools.cached_property
    def _spans_by_kind(self) -> dict[Kind, Spans]:
        return {}

    def _spans(self, kind: Kind) -> Spans:
        if kind not in self._spans_by_kind:
            self._spans_by_kind[kind] = Spans(self.pages, kind, unit_bases(self.header))
        return self._spans_by_kind[kind]


def manifest_name(step: int) -> str:
    """The file name of the commit of a step."""
    return f"step-{step:012d}.manifest"


def _sizes(content: bytes, path: str) -> tuple[int, int]:
    """(json_bytes, page_count) of a content whose length they explain."""
    if content[: len(MAGIC)] != MAGIC:
        raise CheckpointError(path, f"magic {content[: len(MAGIC)]!r}", repr(MAGIC), _REMEDY)
    if len(content) < _PREFIX.size + _CRC_BYTES:
        raise CheckpointError(path, f"{len(content)} bytes", f"{_PREFIX.size + _CRC_BYTES} or more", _REMEDY)
    _, version, record_bytes, json_bytes, page_count = _PREFIX.unpack_from(content)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            path,
            f"format_version {version}",
            f"{FORMAT_VERSION} or less",
            "A newer AngelPTM wrote this: upgrade to read it.",
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(path, f"format_version {version}", str(FORMAT_VERSION), _REMEDY)
    if record_bytes != PAGE_RECORD.itemsize:
        raise CheckpointError(path, f"record_bytes {record_bytes}", str(PAGE_RECORD.itemsize), _REMEDY)
    expected = _PREFIX.size + json_bytes + -json_bytes % 8 + page_count * record_bytes + _CRC_BYTES
    if len(content) != expected:
        raise CheckpointError(
            path,
            f"{len(content)} bytes",
            f"{expected} for json_bytes {json_bytes} and page_count {page_count}",
            _REMEDY,
        )
    return json_bytes, page_count


def _parse_header(text: bytes, path: str) -> Header:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise CheckpointError(path, f"header: {str(error)[:200]}", "a JSON object in UTF-8") from error
    try:
        return Header.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["header", *map(str, first["loc"])])[:200]
        found = repr(first["input"])
        found = found if len(found) <= 80 else f"{found[:77]}..."
        others = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
        raise CheckpointError(path, f"{where} {found}", f"a valid value: {first['msg'][:300]}{others}") from error


def _check(header: Header, pages: npt.NDArray[Any], path: str) -> None:
    try:
        check_records(header, pages)
    except BadRecordError as error:
        raise CheckpointError(path, error.found, error.expected) from error
