"""Types of the native module, one section for each csrc/bind/bind_x.cpp."""

# ---- bind_io.cpp: files and the I/O engine. Buffers travel as address and length; the caller keeps them alive. ----

from collections.abc import Sequence

from io_engine.errors import IoError

class Backend:
    AUTO: Backend
    URING: Backend
    THREADS: Backend

class File:
    def __init__(
        self,
        path: str,
        *,
        create: bool = ...,
        read_only: bool = ...,
        direct: bool = ...,
        unlink: bool = ...,
        allocate_bytes: int = ...,
    ) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def descriptor(self) -> int: ...
    @property
    def direct(self) -> bool: ...
    @property
    def buffered_reason(self) -> str: ...
    @property
    def allocation_note(self) -> str: ...
    @property
    def memory_alignment(self) -> int: ...
    @property
    def offset_alignment(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...

class FaultPlan:
    def __init__(
        self,
        *,
        seed: int = ...,
        short_transfer: float = ...,
        eintr: float = ...,
        eagain: float = ...,
        eio: float = ...,
        enospc: float = ...,
        delay: float = ...,
        delay_seconds: float = ...,
        reorder: bool = ...,
    ) -> None: ...

class Counters:
    @property
    def read_bytes(self) -> int: ...
    @property
    def written_bytes(self) -> int: ...
    @property
    def read_count(self) -> int: ...
    @property
    def write_count(self) -> int: ...
    @property
    def resumed_count(self) -> int: ...
    @property
    def retried_count(self) -> int: ...
    @property
    def failed_count(self) -> int: ...

class Engine:
    def __init__(
        self,
        files: Sequence[File],
        depth: int,
        *,
        backend: Backend = ...,
        regions: Sequence[tuple[int, int]] = ...,
        faults: FaultPlan | None = ...,
        close_seconds: float = ...,
    ) -> None: ...
    def submit(self, transfers: Sequence[tuple[int, bool, int, int, int, int]]) -> None:
        """(tag, whether it writes, file index, offset, buffer address, bytes)"""

    def reap(self, at_least: int, seconds: float) -> list[tuple[int, IoError | None]]:
        """Raises IoError(ETIMEDOUT) naming the oldest transfer; what had finished comes with the next call."""

    def reap_some(self, at_least: int, seconds: float) -> list[tuple[int, IoError | None]]:
        """As reap, but returns fewer when the time is over."""

    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def unfinished(self) -> int: ...
    @property
    def counters(self) -> Counters: ...
    @property
    def name(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def notes(self) -> str: ...
    @property
    def chosen_because(self) -> str: ...
