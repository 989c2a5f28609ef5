"""Makes small valid commits: a manifest and the slot files with the bytes that it speaks of."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from angelptm.checkpoint.checksum import crc32c
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.header import BufferRecord, Header, units_from_layouts
from angelptm.checkpoint.records import NONE, PAGE_RECORD, Kind, extent_bytes, kind_dtype, moment_kinds
from angelptm.states.formats import FP32, StateFormats
from angelptm.states.layout import UnitFormats, record_bytes, record_counts
from angelptm.units.layout import ParamSpec, UnitLayout, pack

PAGE_BYTES = 1 << 16

Shapes = dict[str, tuple[tuple[int, ...], bool]]  # parameter name → (shape, trainable)

SMALL: dict[str, Shapes] = {
    "embed": {"embed.weight": ((50, 33), True)},
    "h.0": {
        "h.0.weight": ((300, 129), True),
        "h.0.bias": ((129,), True),
        "h.0.none": ((0, 7), True),
        "h.0.mask": ((40, 40), False),
        "h.0.scalar": ((), False),
    },
    "head": {"head.weight": ((5, 7), False)},
}
"""One parameter that takes several pages, frozen ones, an empty one, a scalar, and a unit with nothing to train."""


@dataclass
class Commit:
    """A manifest and ``contents``: the bytes of each written page by record, at their extents."""

    manifest: Manifest
    contents: dict[int, bytes]

    def write_files(self, folder: Path) -> None:
        """Slot files whose other slots hold noise, so that a read of the wrong slot is noticed."""
        header = self.manifest.header
        noise = random.Random(1)
        for index, file in enumerate(header.files):
            content = bytearray(noise.randbytes(file.slot_count * header.page_bytes))
            for record, page in enumerate(self.manifest.pages):
                if page["file"] == index:
                    start = int(page["slot"]) * header.page_bytes
                    content[start : start + len(self.contents[record])] = self.contents[record]
            (folder / file.name).write_bytes(content)


def rng_state(seed: int = 0) -> dict[str, Any]:
    version, words, gauss = random.Random(seed).getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": {"keys": list(range(624)), "pos": 3, "has_gauss": 1, "cached_gaussian": -0.25},
        "torch": base64.b64encode(bytes(range(64))).decode(),
    }


def make_layouts(
    units: dict[str, Shapes], page_elements: int, states: Mapping[str, StateFormats] | None = None
) -> tuple[UnitLayout, ...]:
    return tuple(
        pack(
            unit,
            index,
            [
                ParamSpec(name, shape, trainable, ((unit, name.rpartition(".")[2]),), (states or {}).get(name, FP32))
                for name, (shape, trainable) in params.items()
            ],
            page_elements,
        )
        for index, (unit, params) in enumerate(units.items())
    )


def _page_ranges(start: int, elements: int, per_page: int) -> list[tuple[int, int]]:
    return [(first, min(per_page, start + elements - first)) for first in range(start, start + elements, per_page)]


def make_commit(
    units: dict[str, Shapes] | None = None,
    *,
    step: int = 7,
    seed: int = 0,
    precision: str = "bf16",
    optimizer: str = "adamw",
    page_bytes: int = PAGE_BYTES,
    buffers: dict[str, tuple[str, tuple[int, ...]]] | None = None,
    file_names: tuple[str, ...] = ("states-0.pages", "states-1.pages"),
    unwritten: float = 0.1,
    trainable_params: bool = True,
    states: Mapping[str, StateFormats] | None = None,
    **header: Any,
) -> Commit:
    """A commit with random contents, its pages in a random order over random slots.

    ``unwritten``: share of the moments' pages that were never written. ``trainable_params``: store PARAM pages of the
    trainable parameters too. ``states``: formats of parameters whose states are not all fp32, which makes records of
    all states, all of them written. ``header``: further fields, which replace those made here.
    """
    rng = random.Random(seed)
    units = SMALL if units is None else units
    item = kind_dtype(Kind.PARAM, precision).itemsize
    layouts = make_layouts(units, page_bytes // item, states)
    rows: list[tuple[int, Kind, int, int]] = []
    formats = [UnitFormats(layout, len(moment_kinds(optimizer))) for layout in layouts]
    for layout in layouts:
        if states and layout.trainable_elements:
            start = 0
            for count in record_counts(formats[layout.index], 0, layout.trainable_elements, page_bytes):
                rows.append((layout.index, Kind.STATES, start, count))
                start += count
        for kind in () if states else (Kind.MASTER, *moment_kinds(optimizer)):
            rows += [(layout.index, kind, *r) for r in _page_ranges(0, layout.trainable_elements, page_bytes // 4)]
        sections = [(layout.frozen_offset, layout.frozen_elements)]
        if trainable_params:
            sections.append((0, layout.trainable_elements))
        for start, elements in sections:
            rows += [(layout.index, Kind.PARAM, *r) for r in _page_ranges(start, elements, page_bytes // item)]
    places, buffer_bytes = [], 0
    for name, (dtype, shape) in (buffers or {}).items():
        place = BufferRecord(name=name, dtype=dtype, shape=shape, offset=-(-buffer_bytes // 64) * 64)  # type: ignore[arg-type]
        buffer_bytes = place.offset + place.bytes
        places.append(place)
    rows += [(NONE, Kind.BUFFER, *r) for r in _page_ranges(0, buffer_bytes, page_bytes)]
    rng.shuffle(rows)

    slot_count = len(rows) // max(len(file_names), 1) + 2
    free = [(file, slot) for file in range(len(file_names)) for slot in range(slot_count)]
    rng.shuffle(free)
    pages = np.zeros(len(rows), PAGE_RECORD)
    contents = {}
    for index, (unit, kind, start, count) in enumerate(rows):
        dtype = kind_dtype(kind, precision)
        size = count * dtype.itemsize
        if kind is Kind.STATES:
            size = record_bytes(formats[unit].runs(start, count), len(moment_kinds(optimizer)))
        sized = size if kind is Kind.STATES else 0
        page = (unit, kind, dtype, 0, start, count, NONE, 0, 0, sized, rng.randrange(1000))
        pages[index] = page
        if kind in (Kind.EXP_AVG, Kind.EXP_AVG_SQ) and rng.random() < unwritten:
            continue
        content = rng.randbytes(size)
        if dtype is dtype.FP32:  # numbers rather than NaN with a payload
            content = np.frombuffer(content, "<u4").astype(np.float32).tobytes()
        contents[index] = content.ljust(extent_bytes(len(content)), b"\0")
        file, slot = free.pop()
        pages[index]["file"], pages[index]["slot"], pages[index]["crc"] = file, slot, crc32c(contents[index])
    trainable = [name for params in units.values() for name, (_, train) in params.items() if train]
    fields = {
        "package_version": "0.1.0",
        "store_id": f"{seed:032x}",
        "step": step,
        "created": "2025-01-31T23:59:59.125000Z",
        "config_hash": "ab" * 32,
        "page_bytes": page_bytes,
        "precision": precision,
        "files": [{"name": name, "slot_count": slot_count} for name in file_names],
        "units": units_from_layouts(layouts),
        "buffers": places,
        "buffer_bytes": buffer_bytes,
        "optimizer": {
            "type": optimizer,
            "steps": dict.fromkeys(trainable, step),
            "groups": [
                {
                    "params": trainable,
                    "options": {"lr": 1e-3, "betas": [0.9, 0.95], "nesterov": False, "n": 1, "x": None, "y": "z"},
                }
            ],
        },
        "scheduler": {"name": "cosine", "last_epoch": step},
        "rng": rng_state(seed),
        "data": {"epoch": 0, "position": 12345},
        "model": {"model_type": "gpt2", "n_layer": 1},
        "client": {"note": "é ✓", "nested": [[1, [2.5, None]], {}]},
    }
    return Commit(Manifest(Header.model_validate(fields | header), pages), contents)


def header_json(manifest: Manifest) -> dict[str, Any]:
    """The header as a dict that may be edited, for ``assemble``."""
    value: dict[str, Any] = json.loads(json.dumps(manifest.header.model_dump()))
    return value


def assemble(
    header: dict[str, Any] | bytes,
    pages: np.ndarray | bytes,
    *,
    version: int = 1,
    record_bytes: int = 48,
    json_bytes: int | None = None,
    page_count: int | None = None,
    padding: bytes | None = None,
) -> bytes:
    """A manifest file with a right CRC around whatever it is given; written from docs/checkpoint-format.md alone."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    records = pages if isinstance(pages, bytes) else pages.tobytes()
    content = b"APTMCKPT" + struct.pack(
        "<IIQQ",
        version,
        record_bytes,
        len(text) if json_bytes is None else json_bytes,
        len(records) // 48 if page_count is None else page_count,
    )
    content += text + (bytes((8 - len(text) % 8) % 8) if padding is None else padding) + records
    return content + struct.pack("<I", crc32c(content))
