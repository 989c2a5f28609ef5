"""Test data: float32 and bfloat16 bit patterns, special values among them, at any element alignment."""

from __future__ import annotations

import angelptm_native as native
import numpy as np

# Zeros, denormals, halfway cases of bf16 rounding (to even down and up, carry into the exponent, into infinity),
# infinities, quiet and signalling NaNs of both signs.
SPECIAL_BITS = np.array(
    [
        *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x00008000, 0x00018000),
        *(0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x3FFF8000, 0x3FFFFFFF, 0x7F7F7FFF, 0x7F7F8000),
        *(0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFBFFFFF, 0x7FFFFFFF),
    ],
    dtype=np.uint32,
)


def floats(rng: np.random.Generator, count: int, offset: int = 0, special: float = 0.1) -> np.ndarray:
    """(count,) float32, starting ``offset`` elements past a 64 B boundary; a share ``special`` of SPECIAL_BITS."""
    out = aligned(count, np.dtype(np.float32), offset)
    out[:] = rng.standard_normal(count) * np.exp2(rng.integers(-30, 20, count))
    chosen = rng.random(count) < special
    out.view(np.uint32)[chosen] = rng.choice(SPECIAL_BITS, chosen.sum())
    return out


def halves(rng: np.random.Generator, count: int, offset: int = 0, special: float = 0.1) -> np.ndarray:
    """(count,) uint16, the bits of bfloat16."""
    out = aligned(count, np.dtype(np.uint16), offset)
    out[:] = floats(rng, count, special=special).view(np.uint32) >> 16
    return out


def of_dtype(
    dtype: native.DType, rng: np.random.Generator, count: int, offset: int = 0, special: float = 0.1
) -> np.ndarray:
    return (floats if dtype == native.DType.F32 else halves)(rng, count, offset, special)


def aligned(count: int, dtype: np.dtype, offset: int) -> np.ndarray:
    room = np.zeros((count + offset) * dtype.itemsize + 64, np.uint8)
    start = -room.ctypes.data % 64 + offset * dtype.itemsize
    return room[start : start + count * dtype.itemsize].view(dtype)
