"""The late device: copies are what was asked for, late, and every order that nobody saw to is found."""

from __future__ import annotations

import time
from collections.abc import Callable

import angelptm_native as native
import numpy as np
import pytest

SIZE = 4096


class Memory:
    def __init__(self, count: int = 4) -> None:
        self.array = np.zeros((count, SIZE), dtype=np.uint8)

    def at(self, index: int) -> int:
        return int(self.array[index].ctypes.data)


def wait(stream: native.CopyStream, mark: int | None = None) -> None:
    mark = stream.mark() if mark is None else mark
    end = time.monotonic() + 10
    while not stream.passed(mark):
        assert time.monotonic() < end, "a copy runs some time"
        time.sleep(1e-4)


@pytest.fixture
def memory() -> Memory:
    return Memory()


def device_of(seed: int = 0, delay: int = 300) -> native.LateDevice:
    return native.LateDevice(seed, delay)


def test_copies_are_late_and_in_order(memory: Memory) -> None:
    device = device_of(delay=20_000)
    stream = device.add_stream("in")
    memory.array[0], memory.array[1] = 1, 2
    stream.copy(memory.at(2), memory.at(0), SIZE)
    stream.copy(memory.at(2), memory.at(1), SIZE)
    stream.copy(memory.at(3), 0, SIZE)
    late = not memory.array[2].any()
    wait(stream)
    assert late
    assert (memory.array[2] == 2).all()
    assert not memory.array[3].any()


def test_mark_passes_after_its_copies_alone(memory: Memory) -> None:
    device = device_of()
    stream = device.add_stream("in")
    memory.array[0] = 1
    stream.copy(memory.at(2), memory.at(0), SIZE)
    first = stream.mark()
    assert stream.passed(0)
    wait(stream, first)
    assert (memory.array[2] == 1).all()


def test_seed_decides_which_stream_is_first() -> None:
    def first_of(seed: int) -> str:
        memory, device = Memory(), device_of(seed, 3000)
        one, other = device.add_stream("in"), device.add_stream("out")
        one.copy(memory.at(0), 0, SIZE)
        other.copy(memory.at(1), 0, SIZE)
        while not ((ran := one.passed(1)) or other.passed(1)):
            time.sleep(1e-5)
        wait(one)
        wait(other)  # the memory goes with this call
        return "in" if ran else "out"

    assert {first_of(seed) for seed in range(12)} == {"in", "out"}


def test_copy_waits_for_what_computes(memory: Memory) -> None:
    device = device_of(delay=1000)
    stream = device.add_stream("in")
    device.begin_use(memory.at(2), SIZE, "block 0")
    device.end_use(memory.at(2), SIZE)
    stream.wait_for(stream.computed())
    stream.copy(memory.at(2), 0, SIZE)
    wait(stream)
    device.begin_use(memory.at(2), SIZE, "block 1")  # and nothing is found


def use_before_copy(device: native.LateDevice, stream: native.CopyStream, memory: Memory) -> None:
    stream.copy(memory.at(2), 0, SIZE)
    device.begin_use(memory.at(2), SIZE, "block 0")


def copy_to_what_is_in_use(device: native.LateDevice, stream: native.CopyStream, memory: Memory) -> None:
    device.begin_use(memory.at(2), SIZE, "block 0")
    stream.wait_for(stream.computed())
    stream.copy(memory.at(2), 0, SIZE)


def copy_without_waiting(device: native.LateDevice, stream: native.CopyStream, memory: Memory) -> None:
    device.begin_use(memory.at(2), SIZE, "block 0")
    device.end_use(memory.at(2), SIZE)
    stream.copy(memory.at(2) + 64, 0, 64)


def copy_after_too_early_a_mark(device: native.LateDevice, stream: native.CopyStream, memory: Memory) -> None:
    mark = stream.computed()
    device.begin_use(memory.at(2), SIZE, "block 0")
    device.end_use(memory.at(2), SIZE)
    stream.wait_for(mark)
    stream.copy(memory.at(2), 0, SIZE)


def use_that_begins_before_the_copy_runs(device: native.LateDevice, stream: native.CopyStream, memory: Memory) -> None:
    stream.copy(memory.at(2), 0, SIZE)
    device.begin_use(memory.at(1), 2 * SIZE, "blocks 0 and 1")


def source_that_changes(device: native.LateDevice, stream: native.CopyStream, memory: Memory) -> None:
    del device
    stream.copy(memory.at(2), memory.at(0), SIZE)
    memory.array[0, 7] = 9
    wait(stream)


FAULTS: list[tuple[Callable[[native.LateDevice, native.CopyStream, Memory], None], str]] = [
    (use_before_copy, r"block 0 is used while the copy to it by stream in has not run"),
    (copy_to_what_is_in_use, r"stream in copies to the frames of block 0, which is in use"),
    (copy_without_waiting, r"stream in copies to the former frames of block 0 without waiting"),
    (copy_after_too_early_a_mark, r"stream in copies to the former frames of block 0 without waiting"),
    (use_that_begins_before_the_copy_runs, r"blocks 0 and 1 is used while the copy"),
    (source_that_changes, r"what stream in was to copy changed before the copy ran"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_nobody_put_in_order_is_found(
    fault: Callable[[native.LateDevice, native.CopyStream, Memory], None], said: str, memory: Memory
) -> None:
    device = device_of(delay=20_000)
    stream = device.add_stream("in")
    with pytest.raises(native.DeviceError, match=said):
        fault(device, stream, memory)
