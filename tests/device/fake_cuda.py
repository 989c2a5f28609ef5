"""A CUDA runtime of Python functions, by address, for tests of what calls one: operations run late, as streams and
events allow, and any call can be made to fail."""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import RLock

import angelptm_native as native

from angelptm.device.cpu import CpuDevice

NOT_READY = 600
_INT, _POINTER, _SIZE, _UNSIGNED = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
_OUT = ctypes.POINTER(ctypes.c_void_p)
COMPUTING = 7  # the handle of the stream that the model computes on


@dataclass
class _Event:
    records: int = 0
    reached: set[int] = field(default_factory=set)  # of them, by number


class FakeRuntime:
    """``addresses`` is what CudaStream wants. ``fail[name] = code`` lets the next call of that function fail."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._lock = RLock()
        self._streams: dict[int, deque[Callable[[], bool]]] = {COMPUTING: deque()}
        self._events: dict[int, _Event] = {}
        self._next = 1000
        self.fail: dict[str, int] = {}
        self.calls: list[str] = []
        self._keep: list[object] = []
        self._text = ctypes.create_string_buffer(b"the fake runtime was told to")
        self.addresses: dict[str, int] = {}
        for name, types, function in (
            ("cudaSetDevice", [_INT], lambda _: 0),
            ("cudaMemcpyAsync", [_POINTER, _POINTER, _SIZE, _INT, _POINTER], self._copy),
            ("cudaMemsetAsync", [_POINTER, _INT, _SIZE, _POINTER], self._set),
            ("cudaStreamCreateWithFlags", [_OUT, _UNSIGNED], self._create_stream),
            ("cudaStreamDestroy", [_POINTER], self._destroy_stream),
            ("cudaStreamSynchronize", [_POINTER], self._synchronize),
            ("cudaStreamWaitEvent", [_POINTER, _POINTER, _UNSIGNED], self._wait),
            ("cudaEventCreateWithFlags", [_OUT, _UNSIGNED], self._create_event),
            ("cudaEventRecord", [_POINTER, _POINTER], self._record),
            ("cudaEventQuery", [_POINTER], self._query),
            ("cudaEventDestroy", [_POINTER], self._destroy_event),
        ):
            self._add(name, ctypes.CFUNCTYPE(_INT, *types), self._watched(name, function))
        self._add("cudaGetErrorString", ctypes.CFUNCTYPE(_POINTER, _INT), lambda _: ctypes.addressof(self._text))

    def _add(self, name: str, kind: type, function: Callable[..., int]) -> None:
        callback = kind(function)
        self._keep.append(callback)
        self.addresses[name] = ctypes.cast(callback, ctypes.c_void_p).value or 0

    def _watched(self, name: str, function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: int) -> int:
            with self._lock:
                self.calls.append(name)
                return self.fail.pop(name) if name in self.fail else function(*arguments)

        return call

    @property
    def open_handles(self) -> int:
        return len(self._streams) - 1 + len(self._events)

    def run_some(self) -> None:
        """Lets a few operations run, those of any stream that may."""
        for _ in range(self._random.randrange(4)):
            self._step(self._random.choice(list(self._streams)))

    def _step(self, stream: int) -> bool:
        queue = self._streams[stream]
        if queue and queue[0]():
            queue.popleft()
            return True
        return False

    def _copy(self, to: int, source: int, size: int, kind: int, stream: int) -> int:
        assert kind == 4, "the addresses tell the direction"
        return self._put(stream, lambda: ctypes.memmove(to, source, size))

    def _set(self, to: int, value: int, size: int, stream: int) -> int:
        return self._put(stream, lambda: ctypes.memset(to, value, size))

    def _put(self, stream: int, work: Callable[[], object]) -> int:
        def run() -> bool:
            work()
            return True

        self._streams[stream].append(run)
        return 0

    def _create_stream(self, out: ctypes._Pointer[ctypes.c_void_p], flags: int) -> int:
        assert flags == 1, "not ordered with the default stream"
        self._next += 1
        self._streams[self._next] = deque()
        out[0] = self._next
        return 0

    def _destroy_stream(self, stream: int) -> int:
        assert not self._streams.pop(stream), "nothing is left to run"
        return 0

    def _synchronize(self, stream: int) -> int:
        while self._streams[stream]:
            if not self._step(stream):
                ran = [self._step(other) for other in list(self._streams)]
                assert any(ran), "streams wait for each other"
        return 0

    def _create_event(self, out: ctypes._Pointer[ctypes.c_void_p], flags: int) -> int:
        assert flags == 2, "without timing"
        self._next += 1
        self._events[self._next] = _Event()
        out[0] = self._next
        return 0

    def _destroy_event(self, event: int) -> int:
        del self._events[event]
        return 0

    def _record(self, event: int, stream: int) -> int:
        one = self._events[event]
        one.records += 1
        number = one.records
        return self._put(stream, lambda: one.reached.add(number))

    def _wait(self, stream: int, event: int, flags: int) -> int:
        assert flags == 0
        one = self._events[event]
        number = one.records  # a later record of the same event does not hold it up
        self._streams[stream].append(lambda: number == 0 or number in one.reached)
        return 0

    def _query(self, event: int) -> int:
        self.run_some()
        one = self._events[event]
        return 0 if one.records == 0 or one.records in one.reached else NOT_READY


class FakeCuda(CpuDevice):
    """CPU memory behind the streams that a CUDA device has, on a fake runtime."""

    def __init__(self, arena_bytes: int, keep_freed_bytes: int = 0, *, seed: int = 0) -> None:
        super().__init__(arena_bytes, keep_freed_bytes)
        self.runtime = FakeRuntime(seed)
        self.copies_in = native.CudaStream(self.runtime.addresses, 0)
        self.copies_out = native.CudaStream(self.runtime.addresses, 0)

    def computed(self, stream: native.CopyStream) -> int:
        return stream.computed(COMPUTING)
