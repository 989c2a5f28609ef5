"""Throughput and latency of the backends, in interleaved rounds, with fio as the ceiling."""

from __future__ import annotations

import errno
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from io_engine.buffer import AlignedBuffer
from io_engine.engine import Engine, Ticket, open
from io_engine.errors import IoError
from io_engine.file import File, open_file
from io_engine.fio import fio_path, run_fio
from io_engine.machine import machine_facts
from io_engine.sizes import format_bytes

OPS = ("read", "write", "mixed")
_DEADLINE_SECONDS = 60.0  # for one request
_MOST_REQUESTS = 8192  # of one measurement: bounds the time of small blocks


@dataclass(frozen=True)
class BenchPlan:
    """What to measure: every combination. ``file_bytes`` is a multiple of every block size."""

    folder: str
    file_bytes: int
    block_bytes: Sequence[int]
    queue_depths: Sequence[int]
    backends: Sequence[str]
    ops: Sequence[str]
    rounds: int
    with_fio: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError("at least one round is needed")
        for block in self.block_bytes:
            if block < 512 or block % 512 or self.file_bytes % block:
                raise ValueError(
                    f"block size {format_bytes(block)} must be a multiple of 512 bytes that divides "
                    f"the file size, {format_bytes(self.file_bytes)}"
                )
        for op in self.ops:
            if op not in OPS:
                raise ValueError(f"no operation {op!r}; there are {', '.join(OPS)}")


@dataclass
class Point:
    """One combination and its samples, one for each round."""

    backend: str  # "fio" for the ceiling
    op: str
    block_bytes: int
    queue_depth: int
    bytes_per_s: list[float] = field(default_factory=list)
    latency_p50_s: list[float] = field(default_factory=list)
    latency_p99_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """As in ``--json``: medians over the rounds, and the spread of the throughput."""
        return {
            "backend": self.backend,
            "op": self.op,
            "block_bytes": self.block_bytes,
            "queue_depth": self.queue_depth,
            "bytes_per_s": statistics.median(self.bytes_per_s),
            "bytes_per_s_min": min(self.bytes_per_s),
            "bytes_per_s_max": max(self.bytes_per_s),
            "latency_p50_s": statistics.median(self.latency_p50_s),
            "latency_p99_s": statistics.median(self.latency_p99_s),
            "rounds": len(self.bytes_per_s),
        }


# Called with the number of measurements done, of all, and what comes next.
Progress = Callable[[int, int, str], None]


@contextmanager
def bench_file(folder: str, bytes: int, progress: Progress) -> Iterator[File]:
    """A file of ``bytes`` random bytes in ``folder``, every block written once, without a name: however this process
    ends, the space is given back."""
    if not os.path.isdir(folder):
        raise IoError("open", folder, 0, 0, errno.ENOTDIR, f"{folder} is not a folder")
    space = os.statvfs(folder)
    free_bytes = space.f_bavail * space.f_frsize
    if bytes > free_bytes:
        text = f"{folder} has {free_bytes} bytes free, and the test file needs {bytes}; choose a smaller --size"
        raise IoError("allocate", folder, 0, bytes, errno.ENOSPC, text)
    path = os.path.join(folder, f".io_engine-bench-{os.getpid()}")
    file = open_file(path, create=True, unlink=True, allocate_bytes=bytes)
    progress(0, 1, f"writing the test file, {format_bytes(bytes)}")
    block = min(bytes, 4 << 20)
    with AlignedBuffer(block) as buffer, open([file], backend="auto", depth=4) as engine:
        # Random, so that no device can compress it. Writes once through: fallocated blocks are slower the first time.
        buffer.write(random.Random(0).randbytes(block))
        for offset in range(0, bytes, block):
            engine.write(offset, buffer.view(0, min(block, bytes - offset)))
        for ticket in engine.reap(engine.unfinished, 600.0):
            if ticket.error:
                raise ticket.error
    yield file


def measure(engine: Engine, point: Point, buffer: AlignedBuffer, file_bytes: int) -> None:
    """One round of ``point`` on the engine's first file, in order of offset, always queue_depth requests under way.

    As many again wait in the engine, which starts them itself when one ends: the device does not wait for Python.
    ``buffer`` holds 2 * queue_depth blocks. Appends to the point's samples.
    """
    block, depth = point.block_bytes, point.queue_depth
    count = min(file_bytes // block, _MOST_REQUESTS)
    coin = random.Random(count)
    views = [buffer.view(slot * block, block) for slot in range(2 * depth)]
    started: dict[Ticket, tuple[int, float, int]] = {}  # number in order of submission, time of it, and slot
    ended: list[float] = []  # times, in order
    latencies: list[float] = []
    free, next_index = list(range(2 * depth)), 0
    begin = time.perf_counter()
    while len(latencies) < count:
        batch, slots = [], []
        while free and next_index < count:
            slot = free.pop()
            write = point.op == "write" or (point.op == "mixed" and coin.random() < 0.5)
            batch.append((write, 0, next_index * block, views[slot]))
            slots.append(slot)
            next_index += 1
        now = time.perf_counter()
        for number, (ticket, slot) in enumerate(zip(engine.submit(batch), slots), next_index - len(batch)):
            started[ticket] = (number, now, slot)
        for ticket in engine.reap(1, _DEADLINE_SECONDS):
            if ticket.error:
                raise ticket.error
            number, at, slot = started.pop(ticket)
            # The engine starts requests in order: this one when the depth-th before it made room.
            at = max(at, ended[number - depth]) if number >= depth else at
            ended.append(time.perf_counter())
            latencies.append(ended[-1] - at)
            free.append(slot)
    seconds = time.perf_counter() - begin
    latencies.sort()
    point.bytes_per_s.append(count * block / seconds)
    point.latency_p50_s.append(latencies[count // 2])
    point.latency_p99_s.append(latencies[min(count - 1, count * 99 // 100)])


def run_bench(plan: BenchPlan, progress: Progress) -> dict[str, Any]:
    """Measures all of ``plan``; the ``--json`` object.

    Each round measures every combination once, fio's next to ours and each time another backend first, so that
    whatever else the machine does, and whatever the previous measurement left in caches, meets all alike.
    """
    combinations = list(itertools.product(plan.ops, plan.block_bytes, plan.queue_depths))
    program = fio_path() if plan.with_fio else None
    backends = [*plan.backends, *(["fio"] if program else [])]
    points = [Point(backend, *combination) for combination in combinations for backend in backends]
    total, done = plan.rounds * len(points), 0
    with bench_file(plan.folder, plan.file_bytes, progress) as file:
        for round_index in range(plan.rounds):
            for point in _rotated(points, len(backends), round_index):
                what = f"{point.op} {format_bytes(point.block_bytes)} x {point.queue_depth} {point.backend}"
                progress(done, total, f"round {round_index + 1}/{plan.rounds}: {what}")
                if point.backend == "fio" and program:
                    _measure_fio(program, file, point, plan.file_bytes)
                else:
                    _measure_backend(file, point, plan.file_bytes)
                done += 1
        progress(done, total, "done")
        direct, reason = file.direct, file.buffered_reason
    return {
        "results": [point.summary() for point in points if point.backend != "fio"],
        "ceiling": [point.summary() for point in points if point.backend == "fio"],
        "machine": machine_facts(plan.folder),
        "path": os.path.abspath(plan.folder),
        "file_bytes": plan.file_bytes,
        "rounds": plan.rounds,
        "direct": direct,
        "buffered_reason": reason,
    }


def _rotated(points: list[Point], group: int, by: int) -> Iterator[Point]:
    """Each run of ``group`` points, the backends of one combination, begun at another place."""
    for first in range(0, len(points), group):
        backends = points[first : first + group]
        yield from backends[by % group :] + backends[: by % group]


def _measure_backend(file: File, point: Point, file_bytes: int) -> None:
    size = point.block_bytes * point.queue_depth * 2
    with AlignedBuffer(size) as buffer:
        buffer.write(random.Random(1).randbytes(min(size, 1 << 20)) * max(1, size >> 20))
        with open([file], backend=point.backend, depth=point.queue_depth, buffers=[buffer]) as engine:
            measure(engine, point, buffer, file_bytes)


def _measure_fio(program: str, file: File, point: Point, file_bytes: int) -> None:
    bytes = min(file_bytes, point.block_bytes * _MOST_REQUESTS)
    # The file has no name any more; this one leads to it for as long as this process holds it open.
    path = f"/proc/{os.getpid()}/fd/{file.descriptor}"
    run = run_fio(program, path, point.op, point.block_bytes, point.queue_depth, bytes, file.direct)
    point.bytes_per_s.append(run.bytes_per_s)
    point.latency_p50_s.append(run.latency_p50_s)
    point.latency_p99_s.append(run.latency_p99_s)
