"""JSON as manifests hold it: nothing that another parser could read differently, and nothing that can exhaust ours."""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic_core import PydanticCustomError

MAX_DEPTH = 64
"""Deepest nesting of a JSON value of the user's (data, model, client, scheduler, options)."""


def dump_json(value: Any) -> bytes:
    """The shortest text, in UTF-8; keys in the order of the dict."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def parse_json(content: bytes) -> Any:
    """Raises ValueError, and nothing else, for what is no JSON, and for NaN, infinities and keys that come twice."""
    try:
        return json.loads(
            content.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object_without_repeats
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} comes twice in an object")
    return found


def problem(text: str) -> PydanticCustomError:
    # As a parameter of the template, since the text may hold braces.
    return PydanticCustomError("checkpoint", "{text}", {"text": text})


def check_json(value: dict[str, Any]) -> dict[str, Any]:
    """Refuses what JSON cannot say, or what could not be read back. Not recursive, since depth is what it looks at."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if type(item) is dict:
                for key in item:
                    if type(key) is not str or not _is_unicode(key):
                        raise problem(f"the key {key!r} is not Unicode text")
                below.extend(item.values())
            elif type(item) in (list, tuple):
                below.extend(item)
            elif not _is_scalar(item):
                raise problem(f"a value that JSON cannot hold: {repr(item)[:80]}")
        if not below:
            return value
        level = below
    raise problem(f"nested deeper than {MAX_DEPTH} levels")


def _is_scalar(item: Any) -> bool:
    if type(item) is float:
        return math.isfinite(item)
    if type(item) is int:
        return item.bit_length() <= 4096  # as much as random number generators need, and less than Python will print
    return item is None or type(item) is bool or (type(item) is str and _is_unicode(item))


def check_text(text: str) -> str:
    """Refuses lone surrogates, which JSON can spell and UTF-8 cannot."""
    if not _is_unicode(text):
        raise problem("not Unicode text: it has a lone surrogate")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
