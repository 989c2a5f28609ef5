"""What the I/O tests share: files on a real disk, seeded patterns, every backend."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import io_engine
from io_engine import AlignedBuffer, Engine, FaultPlan, File

DEADLINE_SECONDS = 20.0


@pytest.fixture(params=io_engine.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if refusal := io_engine.working_backends()[name]:
        pytest.skip(refusal)
    return name


@pytest.fixture
def disk_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk with O_DIRECT: /tmp may be a tmpfs, and then the checkout's own disk is used."""
    if io_engine.open_file(tmp_path / "probe", create=True).direct:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        yield Path(folder)


@pytest.fixture
def make_file(disk_folder: Path) -> Callable[..., File]:
    def make(bytes: int = 1 << 20, **options: object) -> File:
        return io_engine.open_file(disk_folder / "file", create=True, allocate_bytes=bytes, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def open_engine(backend: str) -> Iterator[Callable[..., Engine]]:
    """Opens engines of the backend under test, and closes them at the end."""
    engines: list[Engine] = []

    def opened(files: list[File], depth: int = 4, faults: FaultPlan | None = None, **options: object) -> Engine:
        engines.append(io_engine.open(files, backend=backend, depth=depth, faults=faults, **options))  # type: ignore[arg-type]
        return engines[-1]

    yield opened
    for engine in engines:
        engine.close()


def patterned(bytes: int, seed: int = 0) -> AlignedBuffer:
    """Random bytes, the same for the same seed."""
    buffer = AlignedBuffer(bytes)
    buffer[:] = random.Random(seed).randbytes(bytes)
    return buffer
