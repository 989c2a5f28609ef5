"""Byte counts as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: str) -> int:
    """ "4MiB", "4M", "4194304" -> 4194304. Units are powers of two, as fio and ds_io read them; "MB" is refused, since
    half of its readers would be wrong. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:([kmgt])(?:ib)?|b)?\s*", text.lower())
    if not match:
        raise ValueError(f"{text!r} is not a size: write for example 4MiB, 512KiB or 1048576")
    return int(match.group(1)) * _UNITS[match.group(2) or ""]


def format_bytes(count: int) -> str:
    """4194304 -> "4 MiB"; exact, so odd counts stay in bytes."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} B"
