"""CudaStream against a runtime of Python functions: what it calls, in which order, and what it says when one fails."""

from __future__ import annotations

import time

import angelptm_native as native
import numpy as np
import pytest

from .fake_cuda import COMPUTING, FakeRuntime

SIZE = 1000


def made(seed: int = 0) -> tuple[FakeRuntime, native.CudaStream]:
    runtime = FakeRuntime(seed)
    return runtime, native.CudaStream(runtime.addresses, 0)


def wait(stream: native.CopyStream) -> None:
    mark, end = stream.mark(), time.monotonic() + 10
    while not stream.passed(mark):
        assert time.monotonic() < end


@pytest.mark.parametrize("seed", range(5))
def test_copies_run_after_what_they_wait_for(seed: int) -> None:
    _, stream = made(seed)
    source, target = np.arange(SIZE, dtype=np.uint8), np.full(SIZE, 255, dtype=np.uint8)
    for step in range(20):
        source[:] = step
        stream.wait_for(stream.computed(COMPUTING))
        stream.copy(target.ctypes.data, source.ctypes.data, SIZE)
        wait(stream)
        assert (target == step).all()
    stream.copy(target.ctypes.data, 0, SIZE)
    wait(stream)
    assert not target.any()


def test_mark_has_not_passed_before_its_copy_ran() -> None:
    runtime, stream = made()
    source, target = np.ones(SIZE, dtype=np.uint8), np.zeros(SIZE, dtype=np.uint8)
    runtime.run_some = lambda: None  # type: ignore[method-assign]
    stream.copy(target.ctypes.data, source.ctypes.data, SIZE)
    mark = stream.mark()
    assert not stream.passed(mark)
    assert not target.any()
    assert stream.passed(0)


def test_events_are_used_again() -> None:
    runtime, stream = made()
    for _ in range(50):
        stream.wait_for(stream.computed(COMPUTING))
        wait(stream)
    assert runtime.calls.count("cudaEventCreateWithFlags") <= 4


def test_nothing_is_left_of_a_stream_that_goes() -> None:
    runtime, stream = made()
    target = np.ones(SIZE, dtype=np.uint8)
    stream.computed(COMPUTING)  # and nobody waits for it
    stream.copy(target.ctypes.data, 0, SIZE)
    stream.mark()
    del stream
    assert not target.any()  # it was waited for
    assert runtime.open_handles == 0


@pytest.mark.parametrize(
    "name",
    ["cudaMemcpyAsync", "cudaMemsetAsync", "cudaEventRecord", "cudaStreamWaitEvent", "cudaEventQuery", "cudaSetDevice"],
)
def test_failing_call_is_named(name: str) -> None:
    runtime, stream = made()
    target = np.zeros(SIZE, dtype=np.uint8)
    mark = stream.computed(COMPUTING)

    def use() -> None:
        stream.wait_for(mark)
        stream.copy(target.ctypes.data, target.ctypes.data, SIZE)
        stream.copy(target.ctypes.data, 0, SIZE)
        wait(stream)

    runtime.fail[name] = 700
    with pytest.raises(native.DeviceError, match=rf"{name} on device 0: the fake runtime was told to \(error 700\)"):
        use()


def test_runtime_without_a_function_is_refused() -> None:
    runtime = FakeRuntime()
    del runtime.addresses["cudaMemcpyAsync"]
    with pytest.raises(ValueError, match="the CUDA runtime has no cudaMemcpyAsync"):
        native.CudaStream(runtime.addresses, 0)
    runtime = FakeRuntime()
    runtime.fail["cudaStreamCreateWithFlags"] = 2
    with pytest.raises(native.DeviceError, match=r"cudaStreamCreateWithFlags on device 0"):
        native.CudaStream(runtime.addresses, 0)
