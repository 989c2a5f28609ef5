"""CRC32C (Castagnoli), the checksum of manifests and of pages."""

from __future__ import annotations

from typing import Any

import angelptm_native


def crc32c(data: Any, seed: int = 0) -> int:
    """CRC32C of a contiguous bytes-like object; ``seed`` is the CRC of what lies before it.

    The nine bytes of "123456789" have 0xE3069283.
    """
    native = getattr(angelptm_native, "crc32c", None)
    return int(native(data, seed)) if native is not None else _crc32c_slow(data, seed)


# To be removed when the native module has crc32c everywhere: about 10 MB/s.
def _entry(index: int) -> int:
    for _ in range(8):
        index = (index >> 1) ^ (0x82F63B78 if index & 1 else 0)
    return index


_TABLE = [_entry(index) for index in range(256)]


def _crc32c_slow(data: Any, seed: int) -> int:
    table, crc = _TABLE, seed ^ 0xFFFFFFFF
    for byte in memoryview(data).cast("B"):
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF
