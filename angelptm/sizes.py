"""Byte sizes as people write them ("512MiB") and as programs count them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: int | str) -> int:
    """``"512MiB"`` → 536870912. A bare number is bytes. Raises ValueError with the forms that are accepted."""
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ValueError(
            f"{text!r} is not a size; write bytes as a whole number, or a text such as '512MiB' or '1.5TB'"
        )
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"{text} is negative")
        return text
    match = _PATTERN.fullmatch(text)
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example '64KiB', '512MiB', '70GiB' or '1.5TB'")
    return round(float(match.group(1)) * _UNITS[unit])


def format_bytes(count: float) -> str:
    """Three significant digits in binary units: 268435456 → '256 MiB'."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 or value == int(value) else f"{value:.3g} {unit}"


def mib(count: int) -> str:
    """In whole MiB, rounded up, as a config takes it: 1048577 → '2MiB'."""
    return f"{-(-count // 2**20)}MiB"
