"""The CPU's memory with a GPU's manners, for tests: see csrc/device/late_device.h."""

from __future__ import annotations

import os

import angelptm_native as native

from angelptm.device.cpu import CpuDevice

_MOST_DELAY_US = 500


class LateDevice(CpuDevice):
    """Copies run late and, of different streams, in any order that is allowed; what nobody put in order is found.

    ``seed`` decides the delays; ANGELPTM_LATE_SEED is the default's.
    """

    def __init__(self, arena_bytes: int, keep_freed_bytes: int = 0, *, seed: int | None = None) -> None:
        super().__init__(arena_bytes, keep_freed_bytes)
        seed = int(os.environ.get("ANGELPTM_LATE_SEED", "0")) if seed is None else seed
        self._late = native.LateDevice(seed, _MOST_DELAY_US)
        self.copies_in = self._late.add_stream("in")
        self.copies_out = self._late.add_stream("out")

    def begin_use(self, offset: int, size: int, what: str) -> None:
        self._late.begin_use(self.address(offset), size, what)

    def end_use(self, offset: int, size: int) -> None:
        self._late.end_use(self.address(offset), size)

    def computed(self, stream: native.CopyStream) -> int:
        return stream.computed()
