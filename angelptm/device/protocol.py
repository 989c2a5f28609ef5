"""What the engine needs of a device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import angelptm_native as native
import torch


class Device(Protocol):
    """One arena of fixed size, views of it, and copies into it and out of tensors. Offsets and sizes are bytes.

    Some devices work on their own time: an operation has run some while after the call that asks for it. What the
    engine does about that is the same for all: it copies with the streams below, says which frames it computes with,
    and waits for marks. See csrc/device/copy_stream.h.
    """

    torch_device: torch.device
    arena_bytes: int
    read_bytes: int
    """Bytes copied out of the device's tensors so far (gradients)."""
    copies_in: native.CopyStream | None
    """Brings pages into the arena. None where it is the CPU's own memory, where updating threads may write to it, pages
    may live in it, and whoever needs a copy makes it."""
    copies_out: native.CopyStream | None
    """Brings gradients to the host; None as above."""

    def begin_steps(self) -> None:
        """Called once, when the pages are filled: what is allocated from here on is the steps' own."""
        ...

    def look_at_memory(self) -> None:
        """Called often in a step: gives back what the step freed, beyond what may stay for the next use."""
        ...

    def view(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over arena memory. It shares no version counter with any other view."""
        ...

    def address(self, offset: int) -> int:
        """The address of an arena byte: of the CPU's memory, or for ``copies_in``."""
        ...

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """The tensor's first byte as an arena offset, or None for a tensor elsewhere."""
        ...

    def use_host_memory(self, address: int, size: int) -> None:
        """Copies come from there and go there until ``close``; the memory outlives that."""
        ...

    def begin_use(self, offset: int, size: int, what: str) -> None:
        """Operations that read these frames, where ``what`` lies, are given to the device from here on."""
        ...

    def end_use(self, offset: int, size: int) -> None:
        """All of them have been given. They may not have run."""
        ...

    def computed(self, stream: native.CopyStream) -> int:
        """A mark for ``stream`` of all operations that the device was given so far."""
        ...

    def behind(self) -> AbstractContextManager[object]:
        """For another thread: what torch is given inside runs after all operations that the device was given so far,
        and after nothing that comes later."""
        ...

    def generator_state(self) -> torch.Tensor | None:
        """Of the device's random generator, (bytes,) uint8 on the CPU; None where that is torch's own of the CPU."""
        ...

    def set_generator_state(self, state: torch.Tensor) -> None: ...

    def synchronize(self) -> None:
        """Returns when all operations that the device was given have run."""
        ...

    def close(self) -> None:
        """Nothing is copied any more."""
        ...
