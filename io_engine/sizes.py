"""Byte counts as people write them."""

from __future__ import annotations

import re

# "M" alone is a power of two, as fio and ds_io read it.
_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str) -> int:
    """ "4MiB", "4M", "4194304" -> 4194304; "4MB" -> 4000000. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if not match or (match.group(3) == "ib" and not match.group(2)):
        raise ValueError(f"{text!r} is not a size: write for example 4MiB, 512KiB or 1048576")
    number, prefix, suffix = match.groups()
    units = _DECIMAL if suffix == "b" else _BINARY
    return round(float(number) * units.get(prefix, 1))


def format_bytes(count: int) -> str:
    """4194304 -> "4 MiB"; exact, so odd counts stay in bytes."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} B"
