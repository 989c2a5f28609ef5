"""A small store in real files, and page contents as numpy bytes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import angelptm_native as native
import numpy as np

PAGE = 65536
BACKENDS = [native.Backend.THREADS, native.Backend.URING]


def works(backend: native.Backend, folder: Path) -> bool:
    """Whether this host has the backend: io_uring is forbidden in many containers."""
    try:
        make_store(folder, backend=backend)
    except OSError:
        return False
    return True


def make_store(
    folder: Path,
    *,
    frames: int = 8,
    slots: tuple[int, ...] = (16,),
    weights: tuple[float, ...] = (1.0, 2.0, 0.5),
    page_bytes: int = PAGE,
    backend: native.Backend = native.Backend.THREADS,
    **options: Any,
) -> native.Store:
    files = [(str(folder / f"{index}.pages"), count, weights[index]) for index, count in enumerate(slots)]
    options = {"queue_depth": 4, "deadline_seconds": 20.0, **options}
    return native.Store(page_bytes, frames, files, backend=backend, **options)


def view(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


def content(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def write(store: native.Store, page: int, data: np.ndarray) -> None:
    """Hands a page's content over; it is there after ``drain``, or when it is loaded."""
    frame = store.mover.staging_frame()
    whole = view(store.mover.address(frame), store.page_bytes)
    whole[:] = 0xA5  # what lies behind the content is nobody's
    whole[: len(data)] = data
    store.mover.write_behind(page, frame)


def load(store: native.Store, pages: list[int]) -> list[np.ndarray]:
    found: dict[int, np.ndarray] = {}
    store.mover.begin_load(pages)
    while (loaded := store.mover.next_loaded()) is not None:
        index, address, size = loaded
        assert index not in found
        found[index] = view(address, size).copy()
    return [found[index] for index in range(len(pages))]


def slots_in_files(folder: Path, page_bytes: int = PAGE) -> list[list[np.ndarray]]:
    """All slots of each file of a store, read behind its back: the files have no name, but this process has them."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            name = os.readlink(entry)
        except OSError:
            continue
        if name.startswith(f"{folder}/") and name.endswith(".pages (deleted)"):
            found[name] = np.frombuffer(entry.read_bytes(), np.uint8).reshape(-1, page_bytes)
    return [list(slots) for _, slots in sorted(found.items())]


def flip(path: Path, offset: int, mask: int = 1) -> None:
    with path.open("r+b", buffering=0) as file:
        former = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([former[0] ^ mask]), offset)


def slot_of(store: native.Store, page: int) -> tuple[int, int, int]:
    """(file, offset, CRC32C) of a page's current content."""
    ((state, file, slot, crc, _),) = store.capture([page])
    assert state == native.Captured.IN_SLOT
    store.release_slots([(file, slot)])
    return file, slot * store.page_bytes, crc
