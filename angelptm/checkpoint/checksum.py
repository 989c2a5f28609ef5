"""CRC32C (Castagnoli), the checksum of manifests and of pages."""

from __future__ import annotations

from typing import Any

import angelptm_native as native


def crc32c(data: Any, seed: int = 0) -> int:
    """CRC32C of a contiguous bytes-like object; ``seed`` is the CRC of what lies before it.

    The nine bytes of "123456789" have 0xE3069283.
    """
    return native.crc32c(data, seed)
