"""Hands memory that nothing uses back to the system, so that what was said about memory stays true."""

from __future__ import annotations

import angelptm_native as native

# By default glibc keeps freed blocks of up to 32 MiB for later. Tensors of that size that come and go between small
# objects leave holes: building GPT-2 medium left up to 750 MiB of them, which later tensors filled for good.
_RETURN_AT_LEAST_BYTES = 2**20


def return_freed_blocks() -> None:
    """From now on freed blocks of a MiB and more go back to the system; what is free now goes at once.

    For the whole process. A block that comes back later is fresh memory, which the system has to clear first: that is
    the price. ``native.KeptMemory`` of a device then lets some of them stay for its steps.
    """
    native.return_freed_blocks(_RETURN_AT_LEAST_BYTES)
