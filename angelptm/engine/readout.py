"""Brings gradients from a device that works on its own time to the host."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import angelptm_native as native
import torch

from angelptm.device import Device

_LOOK_SECONDS = 20e-6


@dataclass
class _Piece:
    """A copy under way. ``tensor`` lives until it has been made; without a frame, only ``take`` is due."""

    mark: int
    frame: int | None
    tensor: torch.Tensor | None
    take: Callable[[int], None]


class ReadOut:
    """Pieces of tensors, copied to a few host frames and taken from there in the order in which they were asked for.

    All of it happens on the thread that calls: copies run while that computes, and what has come is taken at its next
    call.
    """

    def __init__(
        self,
        device: Device,
        stream: native.CopyStream,
        frames: Sequence[int],
        address: Callable[[int], int],
        deadline_seconds: float,
    ) -> None:
        """``frames`` are this object's for good; ``address`` says where one is."""
        self._device = device
        self._stream = stream
        self._free = list(frames)
        self._address = address
        self._deadline_seconds = deadline_seconds
        self._pieces: deque[_Piece] = deque()

    def begin(self) -> None:
        """What is read from here on may have been computed by anything that the device was given till now."""
        self._stream.wait_for(self._device.computed(self._stream))

    def read(self, tensor: torch.Tensor, start: int, size: int, take: Callable[[int], None]) -> None:
        """``size`` bytes from byte ``start`` of a contiguous tensor on, at most a frame. ``take`` gets their address
        for the time of the call. Waits for a frame, and takes what came before, where none is free."""
        self.look()
        while not self._free:
            self._take_first()
        frame = self._free.pop()
        self._stream.copy(self._address(frame), tensor.data_ptr() + start, size)
        self._pieces.append(_Piece(self._stream.mark(), frame, tensor, take))

    def then(self, done: Callable[[], None]) -> None:
        """Calls ``done`` when everything asked for so far has been taken."""
        self._pieces.append(_Piece(self._stream.mark(), None, None, lambda _address: done()))

    def look(self) -> None:
        """Takes what has come."""
        while self._pieces and self._stream.passed(self._pieces[0].mark):
            self._take_first()

    def wait(self) -> None:
        """Takes everything."""
        while self._pieces:
            self._take_first()

    def drop(self) -> None:
        """Forgets what has not been taken, once it has come."""
        while self._pieces:
            with suppress(native.DeviceError):  # whoever computes next learns of it
                self._await(self._pieces[0].mark)
            self._let_go(self._pieces.popleft())

    def _take_first(self) -> None:
        self._await(self._pieces[0].mark)
        piece = self._pieces.popleft()
        try:
            piece.take(0 if piece.frame is None else self._address(piece.frame))
        finally:
            self._let_go(piece)

    def _let_go(self, piece: _Piece) -> None:
        if piece.frame is not None:
            self._free.append(piece.frame)

    def _await(self, mark: int) -> None:
        start = time.perf_counter()
        while not self._stream.passed(mark):
            if time.perf_counter() - start > self._deadline_seconds:
                raise native.DeadlineError(
                    f"waited {self._deadline_seconds} s for a gradient to be copied from {self._device.torch_device}"
                )
            time.sleep(_LOOK_SECONDS)
