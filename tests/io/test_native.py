"""What only the native engine has: registration, fallbacks, use from several threads, its counters and refusals."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import angelptm_native as native
import pytest

import io_engine
from io_engine import AlignedBuffer, File, IoError

from .conftest import patterned

BACKENDS = (native.Backend.URING, native.Backend.THREADS)
KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_engine_outlives_the_thread_that_made_it_and_submitted(
    make_file: Callable[..., File], backend: native.Backend
) -> None:
    blocks = 8
    file, made = make_file(blocks * MIB), []
    source, target = patterned(blocks * MIB), AlignedBuffer(blocks * MIB)

    def make_and_submit() -> None:
        engine = native.Engine([file], 4, backend=backend)
        engine.submit([(i, True, 0, i * MIB, source.address + i * MIB, MIB) for i in range(blocks)])
        made.append(engine)

    thread = threading.Thread(target=make_and_submit)
    thread.start()
    thread.join()
    engine = made[0]
    assert sorted(engine.reap(blocks, 20.0)) == [(i, None) for i in range(blocks)]
    engine.submit([(i, False, 0, i * MIB, target.address + i * MIB, MIB) for i in range(blocks)])
    engine.reap(blocks, 20.0)
    assert target[:] == source[:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_missed_deadline_names_the_oldest_transfer(make_file: Callable[..., File], backend: native.Backend) -> None:
    file, buffer = make_file(), AlignedBuffer(16 * KIB)
    faults = native.FaultPlan(delay=1.0, delay_seconds=0.3)
    engine = native.Engine([file], 1, backend=backend, faults=faults)
    engine.submit([(9, True, 0, 8 * KIB, buffer.address, 4 * KIB), (7, False, 0, 0, buffer.address, 4 * KIB)])
    with pytest.raises(IoError, match="oldest of 2 unfinished") as caught:
        engine.reap(2, 0.05)
    error = caught.value
    assert (error.op, error.path, error.offset, error.bytes) == ("write", file.path, 8 * KIB, 4 * KIB)
    assert error.errno == errno.ETIMEDOUT
    assert engine.unfinished == 2
    assert [tag for tag, _ in engine.reap(2, 20.0)] == [9, 7]  # depth 1 keeps the order


@pytest.mark.parametrize("backend", BACKENDS)
def test_destructor_is_bounded_and_tells_what_it_leaks(
    make_file: Callable[..., File], backend: native.Backend, capfd: pytest.CaptureFixture[str]
) -> None:
    buffer = AlignedBuffer(4 * KIB)
    faults = native.FaultPlan(delay=1.0, delay_seconds=5.0)
    engine = native.Engine([make_file()], 1, backend=backend, faults=faults, close_seconds=0.1)
    engine.submit([(1, False, 0, 0, buffer.address, 4 * KIB)])
    del engine
    assert "1 requests are still with the kernel" in capfd.readouterr().err


def test_buffers_over_one_gibibyte_are_registered_in_pieces(make_file: Callable[..., File]) -> None:
    # 1 GiB + 64 KiB of address space; the pages beyond those used cost nothing but the pinning, so only 64 KiB on each
    # side of the seam are handed over.
    buffer = AlignedBuffer((1 << 30) + 64 * KIB)
    region = (buffer.address + (1 << 30) - 64 * KIB, 128 * KIB)
    file = make_file(128 * KIB)
    with patterned(128 * KIB) as source:
        buffer[(1 << 30) - 64 * KIB :] = source[:]
    engine = native.Engine([file], 2, backend=native.Backend.URING, regions=[region])
    assert engine.notes == ""
    engine.submit([(1, True, 0, 0, region[0], 128 * KIB)])
    assert engine.reap(1, 20.0) == [(1, None)]
    engine.close()


def run_python(code: str) -> str:
    """Output of ``code`` in another interpreter, so that its limits and its identity stay there."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_lock_limit_leaves_buffers_unregistered_and_says_so(disk_folder: Path) -> None:
    output = run_python(f"""
        import os, resource, io_engine
        file = io_engine.open_file({str(disk_folder / "file")!r}, create=True, allocate_bytes=1 << 20)
        buffer = io_engine.AlignedBuffer(1 << 20)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        if os.getuid() == 0:
            os.setuid(65534)  # root may lock without limit
        with io_engine.open([file], backend="uring", buffers=[buffer]) as engine:
            buffer[:5] = b"hello"
            engine.write(0, buffer).wait(20)
            buffer[:5] = bytes(5)
            engine.read(0, buffer).wait(20)
            assert buffer[:5] == b"hello"
            print(engine.notes)
    """)
    assert output.startswith("buffers not registered: ")
    assert "RLIMIT_MEMLOCK is 65536 bytes" in output


def test_auto_falls_back_to_threads_and_says_why(disk_folder: Path) -> None:
    # No descriptor left for the ring: the nearest to a kernel without io_uring that a process can arrange for itself.
    output = run_python(f"""
        import os, resource, io_engine
        file = io_engine.open_file({str(disk_folder / "file")!r}, create=True, allocate_bytes=1 << 20)
        free = os.dup(0); os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
        with io_engine.open([file], backend="auto") as engine:
            buffer = io_engine.AlignedBuffer(4096)
            engine.write(0, buffer).wait(20)
            print(engine.backend, "|", engine.chosen_because)
        try:
            io_engine.open([file], backend="uring")
        except io_engine.IoError as error:
            print(error.op, error.errno)
    """)
    chosen, refused = output.strip().split("\n")
    assert chosen.startswith("threads | uring: setup")
    assert refused == f"setup {errno.EMFILE}"


def test_auto_logs_its_choice_and_the_reason(make_file: Callable[..., File], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "io_engine"), io_engine.open([make_file()], backend="auto") as engine:
        assert f"backend {engine.backend} ({engine.chosen_because})" in caplog.text


def test_cannot_reap_more_than_is_unfinished_forever(make_file: Callable[..., File]) -> None:
    engine = native.Engine([make_file()], 1)
    # Another thread may have reaped it: the shared engine cuts the number, and does not wait for nothing.
    assert engine.reap(3, 20.0) == []


@pytest.mark.parametrize("depth", [0, 4097])
def test_depth_out_of_bounds_is_refused(make_file: Callable[..., File], depth: int) -> None:
    with pytest.raises(ValueError, match="depth"):
        native.Engine([make_file()], depth)


def test_probability_out_of_bounds_is_refused(make_file: Callable[..., File]) -> None:
    with pytest.raises(ValueError, match="probability"):
        native.Engine([make_file()], 1, faults=native.FaultPlan(eio=1.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_late_sync_names_its_file_and_is_reaped_later(make_file: Callable[..., File], backend: native.Backend) -> None:
    file = make_file()
    engine = native.Engine([file], 2, backend=backend, faults=native.FaultPlan(delay=1.0, delay_seconds=0.3))
    with pytest.raises(IoError, match="sync") as caught:
        engine.sync(0.05)
    assert (caught.value.op, caught.value.path, caught.value.errno) == ("sync", file.path, errno.ETIMEDOUT)
    with pytest.raises(RuntimeError, match="unfinished: 1"):
        engine.sync(20.0)
    assert engine.reap(1, 20.0) == [(2**64 - 1, None)]
    engine.sync(20.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sync_is_the_system_call_with_its_answer(tmp_path: Path, backend: native.Backend) -> None:
    # A character device has nothing to flush and says EINVAL, so an answer of 0 would mean that nobody asked it.
    (tmp_path / "file").write_bytes(bytes(8192))
    file = native.File(str(tmp_path / "file"), direct=False)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, file.descriptor)
    os.close(null)
    with pytest.raises(IoError) as caught:
        native.Engine([file], 2, backend=backend).sync(20.0)
    assert (caught.value.op, caught.value.errno) == ("sync", errno.EINVAL)
