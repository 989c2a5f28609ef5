"""The four backends by name, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence

from io_engine.aiofiles_queue import AiofilesQueue
from io_engine.attempt import Queue
from io_engine.driver import Driver, NativeDriver, QueueDriver
from io_engine.errors import IoError
from io_engine.faults import FaultPlan, FaultQueue
from io_engine.file import File
from io_engine.liburing_queue import LiburingQueue

# Best first: that is the order in which auto tries them.
BACKENDS = ("uring", "threads", "liburing", "aiofiles")


def make_driver(
    backend: str,
    files: Sequence[File],
    depth: int,
    buffers: Sequence[memoryview],
    faults: FaultPlan | None,
    close_seconds: float,
) -> Driver:
    """The driver of a backend. Raises ValueError for an unknown name, IoError("setup") where it does not work."""
    if backend == "auto":
        return _best_driver(files, depth, buffers, faults, close_seconds)
    if backend in ("uring", "threads"):
        return NativeDriver(backend, files, depth, buffers, faults, close_seconds)
    if backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
    queue: Queue = LiburingQueue(files, depth) if backend == "liburing" else AiofilesQueue(files, depth)
    if faults is not None:
        queue = FaultQueue(queue, [file.offset_alignment for file in files], faults)
    return QueueDriver(queue, files, close_seconds)


def _best_driver(
    files: Sequence[File],
    depth: int,
    buffers: Sequence[memoryview],
    faults: FaultPlan | None,
    close_seconds: float,
) -> Driver:
    refusals: list[str] = []
    for backend in BACKENDS:
        try:
            driver = make_driver(backend, files, depth, buffers, faults, close_seconds)
        except IoError as error:
            if error.op != "setup":
                raise
            refusals.append(f"{backend}: {error}")
            last = error
            continue
        driver.chosen_because = "; ".join(refusals) or "it is the fastest and works here"
        return driver
    raise last


def working_backends() -> dict[str, str]:
    """Each backend with an empty string, or why it does not work here."""
    found: dict[str, str] = {}
    for backend in BACKENDS:
        try:
            make_driver(backend, [], 1, [], None, 1.0).close()
        except IoError as error:
            found[backend] = str(error)
        else:
            found[backend] = ""
    return found
