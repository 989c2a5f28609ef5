"""The CPU as a device: GPU memory emulated by an arena with a hard cap."""

from __future__ import annotations

import mmap
from contextlib import AbstractContextManager, nullcontext

import angelptm_native as native
import torch

from angelptm.heap import return_freed_blocks


class CpuDevice:
    """An arena of exactly ``arena_bytes`` in anonymous memory, committed by use. See :class:`Device`.

    Activations lie in the process's own heap, where up to ``keep_freed_bytes`` of what was freed stay for others.
    """

    def __init__(self, arena_bytes: int, keep_freed_bytes: int = 0) -> None:
        self.torch_device = torch.device("cpu")
        self.arena_bytes = arena_bytes
        self.read_bytes = 0
        self.copies_in: native.CopyStream | None = None
        self.copies_out: native.CopyStream | None = None
        return_freed_blocks()  # of the building of the model and the filling of its pages nothing shall stay
        self._keep_freed_bytes = keep_freed_bytes
        self._kept: native.KeptMemory | None = None
        self._memory = mmap.mmap(-1, arena_bytes)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._base = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()

    def begin_steps(self) -> None:
        self._kept = native.KeptMemory(self._keep_freed_bytes)

    def look_at_memory(self) -> None:
        if self._kept is not None:
            self._kept.look()

    def view(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # A fresh tensor for each view: a write through one of them must not bump the version that autograd checks in
        # another.
        whole = torch.frombuffer(self._memory, dtype=dtype)
        return torch.as_strided(whole, shape, stride, offset // dtype.itemsize)

    def address(self, offset: int) -> int:
        return self._base + offset

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return None
        offset = tensor.data_ptr() - self._base
        return offset if 0 <= offset < self.arena_bytes else None

    def use_host_memory(self, address: int, size: int) -> None:
        """It is the device's own."""

    def begin_use(self, offset: int, size: int, what: str) -> None:
        """Operations run at once: nothing is ever under way."""

    def end_use(self, offset: int, size: int) -> None:
        """As above."""

    def computed(self, stream: native.CopyStream) -> int:
        raise AssertionError(f"{stream}: this device has no streams")

    def behind(self) -> AbstractContextManager[object]:
        return nullcontext()

    def generator_state(self) -> torch.Tensor | None:
        return None

    def set_generator_state(self, state: torch.Tensor) -> None:
        """A GPU's says nothing here."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is under way."""
