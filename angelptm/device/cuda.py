"""A CUDA device: the arena is one allocation of torch's, host memory is page-locked, copies have streams of their own.

Not one line of this depends on CUDA at build time: libcudart is the one that torch has loaded.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import angelptm_native as native
import torch

from angelptm.errors import AngelPTMError, CapacityError

_FUNCTIONS = (
    "cudaSetDevice",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamSynchronize",
    "cudaStreamWaitEvent",
    "cudaEventCreateWithFlags",
    "cudaEventRecord",
    "cudaEventQuery",
    "cudaEventDestroy",
    "cudaGetErrorString",
)
_REGISTER_PORTABLE = 1


def loaded_runtime() -> ctypes.CDLL:
    """libcudart as this process has it. Raises AngelPTMError where there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[5] if line.count("/") else ""
        if Path(path).name.startswith("libcudart"):
            return ctypes.CDLL(path)
    raise AngelPTMError(
        f"device: cuda needs a torch that is built with CUDA; torch {torch.__version__} has loaded no libcudart. "
        "Install a CUDA build of torch, or set device: cpu."
    )


def addresses_of(runtime: ctypes.CDLL) -> dict[str, int]:
    """Of the functions that CudaStream calls, by name."""
    return {name: ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value or 0 for name in _FUNCTIONS}


class CudaDevice:
    """See :class:`angelptm.device.Device`. ``index``: None is torch's current device."""

    def __init__(self, arena_bytes: int, index: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise AngelPTMError(
                f"device: cuda: torch {torch.__version__} sees no GPU ({_why_none()}). Look at nvidia-smi and "
                "CUDA_VISIBLE_DEVICES, or set device: cpu."
            )
        count = torch.cuda.device_count()
        if index is not None and index >= count:
            raise AngelPTMError(f"device: cuda:{index}: this process sees {count} GPUs, cuda:0 to cuda:{count - 1}")
        index = torch.cuda.current_device() if index is None else index
        self.torch_device = torch.device("cuda", index)
        self.arena_bytes = arena_bytes
        self.read_bytes = 0
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        if arena_bytes > free:
            raise CapacityError(
                "device",
                arena_bytes,
                free,
                f"the arena on {self.torch_device} ({torch.cuda.get_device_name(self.torch_device)})",
                "Lower tiers.device, and leave room for activations; or free the GPU's memory.",
            )
        self._arena = torch.empty(arena_bytes, dtype=torch.uint8, device=self.torch_device)
        self._base = self._arena.data_ptr()
        self._runtime = loaded_runtime()
        addresses = addresses_of(self._runtime)
        self.copies_in: native.CopyStream | None = native.CudaStream(addresses, index)
        self.copies_out: native.CopyStream | None = native.CudaStream(addresses, index)
        self._registered: list[int] = []
        self._side = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]  # of other threads

    def begin_steps(self) -> None:
        """torch's allocator keeps what steps free, for steps to come."""

    def look_at_memory(self) -> None:
        """As above."""

    def view(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        empty: Any = torch.empty(0, dtype=dtype, device=self.torch_device)
        # Not a view in autograd's sense: it has a version counter of its own.
        found: torch.Tensor = empty.set_(self._arena.untyped_storage(), offset // dtype.itemsize, shape, stride)
        return found

    def address(self, offset: int) -> int:
        return self._base + offset

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        if tensor.device != self.torch_device or tensor.layout is not torch.strided:
            return None
        offset = tensor.data_ptr() - self._base
        return offset if 0 <= offset < self.arena_bytes else None

    def use_host_memory(self, address: int, size: int) -> None:
        """Page-locks it. torch's own pinned allocator would take up to twice as much."""
        with torch.cuda.device(self.torch_device):
            result = self._runtime.cudaHostRegister(
                ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(_REGISTER_PORTABLE)
            )
        if result != 0:
            self._runtime.cudaGetLastError()  # else the next kernel launch would report it
            raise AngelPTMError(
                f"tiers.host: CUDA cannot page-lock {size} bytes of host memory: {_text_of(self._runtime, result)}. "
                "Lower tiers.host, or raise the limits of locked memory (ulimit -l, the container's) and of memory."
            )
        self._registered.append(address)

    def begin_use(self, offset: int, size: int, what: str) -> None:
        """The streams' order is enough."""

    def end_use(self, offset: int, size: int) -> None:
        """As above."""

    def computed(self, stream: native.CopyStream) -> int:
        return stream.computed(torch.cuda.current_stream(self.torch_device).cuda_stream)

    def behind(self) -> AbstractContextManager[object]:
        return _Behind(self._side, torch.cuda.current_stream(self.torch_device).record_event())

    def generator_state(self) -> torch.Tensor | None:
        return torch.cuda.get_rng_state(self.torch_device)

    def set_generator_state(self, state: torch.Tensor) -> None:
        if state.numel() == torch.cuda.get_rng_state(self.torch_device).numel():
            torch.cuda.set_rng_state(state, self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def close(self) -> None:
        if self._registered:
            self.synchronize()
        while self._registered:
            self._runtime.cudaHostUnregister(ctypes.c_void_p(self._registered.pop()))


class _Behind:
    """Work of a thread on a stream that waits for an event."""

    def __init__(self, stream: Any, event: Any) -> None:
        self._stream, self._event = stream, event
        self._context = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self._context.__enter__()  # type: ignore[no-untyped-call]
        self._stream.wait_event(self._event)

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _text_of(runtime: ctypes.CDLL, result: int) -> str:
    function = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)(("cudaGetErrorString", runtime))
    return f"{(function(result) or b'no description').decode()} (error {result})"


def _why_none() -> str:
    if torch.version.cuda is None:
        return "it is built without CUDA"
    return f"it is built with CUDA {torch.version.cuda}; the driver may be missing or too old"
