"""Seeded damage to files: the input number i of a seed is always the same one.

Random damage (bits, bytes, ranges, lengths, integers at the fields that a target names) and damage that knows JSON, so
that a parser meets documents that are well formed and lie, not only ones that break off.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Link:
    """A symbolic link instead of a file; ``target`` is as the link says it, relative to the folder or absolute."""

    target: str


Files = dict[str, "bytes | Link"]
"""The content of a target's folder, by name."""


@dataclass(frozen=True)
class Field:
    """Where an integer lies in a file: ``format`` is struct's, with its byte order."""

    file: str
    offset: int
    format: str


_POWERS = (7, 8, 15, 16, 24, 31, 32, 40, 53, 61, 62, 63, 64)
INTEGERS = (0, 1, -1, 2, -(2**31), -(2**63), *(2**power + change for power in _POWERS for change in (-1, 0, 1)))
_FORMATS = ("<B", "<H", "<I", "<Q", "<i", "<q", ">I", ">Q")
_STRINGS = (
    "",
    "\0",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "F32",
    "I64",
    "F8_E4M3",
    "BOOL",
    "é" * 40,
    "x" * 5000,
)
_NUMBERS = (*INTEGERS, 0.5, -0.0, 1e308, float("inf"), float("nan"), 10**40)
DEEP = "@deep@"
"""Stands for 100,000 nested lists, which ``json.dumps`` could not write."""


def mutated(seed: int, index: int, seeds: Sequence[Files], fields: Sequence[Field], links: Sequence[str]) -> Files:
    """Input number ``index``: one of the seeds with one to four kinds of damage. ``links`` are where links may lead."""
    rng = random.Random(f"{seed}:{index}")
    files = dict(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        name = rng.choice(sorted(files))
        content = files[name]
        if isinstance(content, Link):
            continue
        if links and rng.random() < 0.02:
            files[name] = Link(rng.choice(links))
        elif rng.random() < 0.01:
            del files[name]
            if not files:
                return files
        elif rng.random() < 0.6 and (damage := _structured(name, fields)):
            files[name] = rng.choice(damage)(rng, content)
        else:
            files[name] = rng.choice(_RANDOM)(rng, content)
    return files


Damage = Callable[[random.Random, bytes], bytes]


def _structured(name: str, fields: Sequence[Field]) -> list[Damage]:
    if name.endswith(".json"):
        return [_json]
    if name.endswith(".safetensors"):
        return [_safetensors]
    return [_at(field) for field in fields if field.file == name]


def _at(field: Field) -> Damage:
    def write(rng: random.Random, content: bytes) -> bytes:
        return _write(content, field.offset, _packed(rng, field.format))

    return write


def _packed(rng: random.Random, form: str) -> bytes:
    bits = 8 * struct.calcsize(form)
    value = rng.choice(INTEGERS) if rng.random() < 0.7 else rng.randrange(2**bits)
    return struct.pack(form.upper().replace("=", "<"), value % 2**bits)


def _write(content: bytes, offset: int, value: bytes) -> bytes:
    return content[:offset] + value + content[offset + len(value) :]


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 4)) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.choice(
            (0, 1, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xFF, rng.randrange(256))
        )
    return bytes(changed)


def _truncate(rng: random.Random, content: bytes) -> bytes:
    cut = rng.choice((0, 1, len(content) - 1, rng.randrange(len(content) + 1)))
    return content[: max(0, cut)]


def _extend(rng: random.Random, content: bytes) -> bytes:
    return content + rng.choice((b"\0", b"\xff", b" ", b"}", rng.randbytes(rng.randrange(1, 40)), b"\0" * 4096))


def _splice(rng: random.Random, content: bytes) -> bytes:
    """A range copied, moved or removed."""
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    piece, place = content[start:stop], rng.randrange(len(content) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return content[:start] + content[stop:]
    if kind == 1:
        return content[:place] + piece + content[place:]
    if kind == 2:
        return _write(content, place, piece)
    return content[:place] + piece[:64] * rng.choice((2, 50)) + content[place:]


def _integer(rng: random.Random, content: bytes) -> bytes:
    return _write(content, rng.randrange(len(content) + 1), _packed(rng, rng.choice(_FORMATS)))


_RANDOM: tuple[Damage, ...] = (_flip, _set, _truncate, _extend, _splice, _integer)


def _json(rng: random.Random, content: bytes) -> bytes:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return rng.choice(_RANDOM)(rng, content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        document = _mutate_node(rng, document)
    try:
        text = json.dumps(document)
    except (ValueError, RecursionError):
        return content
    return _twice(rng, text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)).encode("utf-8", "surrogatepass")


def _twice(rng: random.Random, text: str) -> str:
    """Now and then an object says a key twice."""
    if rng.random() < 0.05 and text.startswith("{") and (end := text.find(",")) > 0:
        return "{" + text[1:end] + "," + text[1:]
    return text


def _safetensors(rng: random.Random, content: bytes) -> bytes:
    if len(content) < 8:
        return rng.choice(_RANDOM)(rng, content)
    (header_bytes,) = struct.unpack_from("<Q", content)
    header = _json(rng, content[8 : 8 + header_bytes])
    length = len(header) if rng.random() < 0.95 else rng.choice(INTEGERS) % 2**64
    return struct.pack("<Q", length) + header + content[8 + header_bytes :]


def _mutate_node(rng: random.Random, document: Any) -> Any:
    """One node replaced, removed, renamed, added or copied over another. ``document`` is not changed."""
    document = json.loads(json.dumps(document))
    places = [
        (holder, key) for holder, key in _places(document) if not isinstance(holder[key], str) or key != "model_type"
    ]
    if not places or rng.random() < 0.01:
        return _value(rng, document)
    holder, key = rng.choice(places)
    kind = rng.choice((0, 1, 2, 2, 2, 3, 4, 4, 5))
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice((str(key) + "x", "", "__class__", "auto_map", "num_labels", "n_layer"))] = holder[key]
    elif kind == 2:
        alike = [place for place in places if type(place[0][place[1]]) is type(holder[key])]
        source, other = rng.choice(alike)
        holder[key] = json.loads(json.dumps(source[other]))
    elif kind == 3 and isinstance(holder[key], list):
        holder[key] = holder[key] * rng.choice((0, 2, 100)) + [_value(rng, holder[key])]
    elif kind == 4 and isinstance(holder[key], int):
        holder[key] = holder[key] + rng.choice((-1, 1, 8, -8, 1000))
    else:
        holder[key] = _value(rng, holder[key])
    return document


def _value(rng: random.Random, before: Any) -> Any:
    if isinstance(before, (int, float)) and rng.random() < 0.7:
        return rng.choice(_NUMBERS)
    return rng.choice(
        (
            None,
            True,
            [],
            {},
            DEEP,
            [before],
            {"a": before},
            rng.choice(_NUMBERS),
            rng.choice(_STRINGS),
            str(before)[:100],
        )
    )


def _places(node: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every node below this one."""
    found: list[tuple[Any, Any]] = []
    left = [node]
    while left:
        holder = left.pop()
        items: Mapping[Any, Any] | dict[int, Any] = {}
        if isinstance(holder, dict):
            items = holder
        elif isinstance(holder, list):
            items = dict(enumerate(holder))
        found.extend((holder, key) for key in items)
        left.extend(items.values())
    return found
