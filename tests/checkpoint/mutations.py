"""Manifests that were changed in one place or a few and given a right CRC again, as a hostile or broken writer would.

``check_mutations(100_000)`` takes some minutes; the suite does a small share of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.records import PAGE_RECORD, Kind, moment_kinds
from angelptm.errors import CheckpointError
from tests.checkpoint.builder import assemble, header_json, make_commit

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 127, 128, 4095, 4096, 2**16, 2**16 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**56,
    2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "0", "a", "../a", "/",
    ".hidden", "a/b", "a\0b", "\ud800", "é" * 300, [], {}, [[]], [0], [2**62, 2**62], [0, 2**62], {"": None},
    {"a": [1, {}]}, ["a", "a"], "h.0.weight", "adamw", "lion", "fp32", "bf16", [[["a"]]],
]  # fmt: skip
_SNIPPETS = [b"", b"{", b"[" * 5000, b'"', b"\\ud800", b"\xff", b"\0", b"NaN", b"-", b"1e999", b"9" * 5000, b"Infinity"]
_NUMBERS = [0, 1, 2, 3, 4, 5, 6, 127, 128, 255, 4096, 2**14, 2**15, 2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside; of long lists of numbers, a few only."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        item = left.pop()
        keys = list(item) if isinstance(item, dict) else list(range(min(len(item), 20)))
        for key in keys:
            found.append((item, key))
            if isinstance(item[key], (dict, list)):
                left.append(item[key])
    return found


def _edit_json(rng: random.Random, header: dict[str, Any]) -> None:
    container, key = rng.choice(_places(header))
    old = container[key]
    match rng.randrange(7):
        case 0:
            del container[key]
        case 1 if type(old) is int:
            container[key] = old + rng.choice([-128, -1, 1, 128, 2**16, 2**56])
        case 2 if isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), json.loads(json.dumps(old)))
        case 3 if isinstance(container, dict):
            container[rng.choice(["extra", "", "name", "h.0.weight"])] = rng.choice(_VALUES)
        case 4:
            other, other_key = rng.choice(_places(header))
            container[key] = json.loads(json.dumps(other[other_key]))
        case 5 if isinstance(container, list):
            rng.shuffle(container)
        case _:
            container[key] = rng.choice(_VALUES)


def _edit_records(rng: random.Random, pages: np.ndarray) -> np.ndarray:
    if not len(pages):
        return np.zeros(1, PAGE_RECORD)
    index, other = rng.randrange(len(pages)), rng.randrange(len(pages))
    field = rng.choice(PAGE_RECORD.names)
    bits = 8 * PAGE_RECORD[field].itemsize
    match rng.randrange(7):
        case 0:
            pages = np.delete(pages, index)
        case 1:
            pages = np.append(pages, pages[index])
        case 2:
            pages[index][field] = pages[other][field]
        case 3:
            pages[index][field] = (int(pages[index][field]) + rng.choice([-128, -1, 1, 128])) % 2**bits
        case 4:
            pages[index][field] ^= PAGE_RECORD[field].type(1 << rng.randrange(bits))
        case 5:
            pages[index][field] = rng.choice(_NUMBERS) % 2**bits
        case 6:
            pages[index] = np.frombuffer(rng.randbytes(48), PAGE_RECORD)[0]
    return pages


def _edit_text(rng: random.Random, text: bytes) -> bytes:
    at = rng.randrange(len(text))
    inserted = rng.choice(_SNIPPETS)
    return text[:at] + inserted + text[at + rng.randrange(3) :]


def mutated(rng: random.Random, manifest: Manifest) -> bytes:
    """One to three edits of the header, of the records or of both; now and then of the header's text."""
    header, pages = header_json(manifest), manifest.pages.copy()
    which = rng.choice(["header", "records", "both"])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if which != "records":
            _edit_json(rng, header)
        if which != "header":
            pages = _edit_records(rng, pages)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = _edit_text(rng, text)
    return assemble(text, pages)


def use_all(manifest: Manifest) -> None:
    """What a reader does with a manifest: everything that it promises is there, and nothing is out of bounds."""
    header = manifest.header
    kinds = (Kind.MASTER, *moment_kinds(header.optimizer.type))
    for unit in header.units:
        for param in unit.params:
            for kind in kinds if param.trainable else (Kind.PARAM,):
                pieces = manifest.find(param.name, kind)
                assert sum(piece.count for piece in pieces) == param.numel
                assert [piece.start for piece in pieces] == sorted({piece.start for piece in pieces})
    for buffer in header.buffers:
        assert sum(piece.count for piece in manifest.find(buffer.name, Kind.BUFFER)) == buffer.bytes
    for index in range(len(manifest.pages)):
        assert manifest.describe(index)
    again = Manifest.decode(manifest.encode(), "again")
    assert again.header == header
    assert again.pages.tobytes() == manifest.pages.tobytes()


def check_mutations(count: int, seed: int = 0, progress: Callable[[int], None] | None = None) -> tuple[int, int]:
    """Decodes ``count`` mutants; returns how many were valid and how many refused. Anything but CheckpointError, or a
    valid one that cannot be used, is an error of the decoder, and raised."""
    rng = random.Random(seed)
    shapes: dict[str, Any] = {"a": {"a.w": ((130, 130), True), "a.f": ((3,), False)}, "h": {"h.0.weight": ((4,), True)}}
    sources = [
        make_commit(shapes, precision=precision, optimizer=optimizer, buffers={"b": ("bool", (5,))}, rng=rng_state)
        for precision, optimizer, rng_state in (("bf16", "adamw", None), ("fp32", "sgd", None))
    ]
    sources.append(make_commit(shapes, optimizer="lion", buffers={"a": ("int64", ()), "b": ("int8", (0,))}))
    weights = [5, 5, 1]  # the last one is long, with its states of generators
    valid = 0
    for done in range(count):
        content = mutated(rng, rng.choices(sources, weights)[0].manifest)
        try:
            manifest = Manifest.decode(content, "mutant")
        except CheckpointError as error:
            text = str(error)
        else:
            use_all(manifest)
            valid += 1
            text = ""
        assert len(text) < 2000
        if progress is not None:
            progress(done + 1)
    return valid, count - valid
