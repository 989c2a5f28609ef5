"""What the engine needs of a device."""

from __future__ import annotations

from typing import Protocol

import torch


class Device(Protocol):
    """One arena of fixed size, views of it, and copies into it. Offsets and sizes are bytes."""

    torch_device: torch.device
    arena_bytes: int
    read_bytes: int
    """Bytes copied out of the device's tensors so far (gradients)."""

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
        """The address of an arena byte, for kernels that run where the arena is addressable."""
        ...

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """The tensor's first byte as an arena offset, or None for a tensor elsewhere."""
        ...
