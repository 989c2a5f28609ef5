"""How near CRC32C comes to the memory's own speed.

    python tools/bench/checksum.py [--small] [--json] [--mebibytes N] [--rounds N]

One thread. Every round runs, in turn and on the same bytes, each implementation that this CPU has and ``read``: numpy's
exclusive or of all 64-bit words, which does little but load them. Two sizes:

* ``page``: 4 MiB, gone over again and again, so that it comes from the cache;
* ``cold``: 256 MiB, several times the last-level cache, so that it comes from memory.

Medians of the rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import angelptm_native as native
import numpy as np
from rich.console import Console
from rich.table import Table

from io_engine.machine import source_commit

PAGE_BYTES = 4 << 20
HUGE_PAGE_BYTES = 2 << 20
READ = "read"


@dataclass(frozen=True)
class Result:
    """One row. ``ratio``: median rate over the median rate of ``read`` on the same bytes."""

    what: str
    size: str
    bytes: int
    median_seconds: float
    min_seconds: float
    max_seconds: float
    bytes_per_s: float
    ratio: float


def random_bytes(count: int) -> np.ndarray:
    """uint64 words on a boundary of a huge page; numpy asks for huge pages by itself."""
    room = np.empty(count + HUGE_PAGE_BYTES, np.uint8)
    start = -room.ctypes.data % HUGE_PAGE_BYTES
    words = room[start : start + count].view(np.uint64)
    words[:] = np.random.default_rng(0).integers(0, 1 << 63, words.size, np.uint64)
    return words


def runs(words: np.ndarray) -> dict[str, Callable[[], object]]:
    table: dict[str, Callable[[], object]] = {READ: lambda: np.bitwise_xor.reduce(words)}
    for kind in native.crc32c_kinds():
        table[kind] = lambda kind=kind: native.crc32c_with(kind, words)
    return table


def measure(size: str, count: int, repeats: int, rounds: int, console: Console) -> list[Result]:
    """``repeats``: how often in a row each goes over the bytes for one time, the first not counted."""
    console.print(f"{size}, {count / 2**20:g} MiB ...", style="dim")
    table = runs(random_bytes(count))
    seconds: dict[str, list[float]] = {name: [] for name in table}
    names = list(table)
    for number in range(rounds + 1):  # The first warms up and is dropped.
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:  # Nobody always follows the same.
            if repeats > 1:
                table[name]()
            begin = time.perf_counter()
            for _ in range(repeats):
                table[name]()
            if number:
                seconds[name].append((time.perf_counter() - begin) / repeats)
    rates = {name: count / statistics.median(times) for name, times in seconds.items()}
    return [
        Result(
            what=name,
            size=size,
            bytes=count,
            median_seconds=statistics.median(times),
            min_seconds=min(times),
            max_seconds=max(times),
            bytes_per_s=rates[name],
            ratio=rates[name] / rates[READ],
        )
        for name, times in seconds.items()
    ]


def machine() -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": len(names) or 1,
        "implementation": native.crc32c_implementation(),
        "commit": source_commit(Path(__file__).parent),
    }


def show(results: list[Result], rounds: int, console: Console) -> None:
    about = machine()
    table = Table(title=f"CRC32C, one thread, {rounds} rounds; {about['cpu']}, commit {about['commit']}")
    for heading in ("size", "what"):
        table.add_column(heading)
    for heading in ("median ms", "min", "max", "GB/s", "of read"):
        table.add_column(heading, justify="right")
    for previous, row in zip([None, *results], results, strict=False):
        if previous and previous.size != row.size:
            table.add_section()
        times = [f"{1e3 * value:.3f}" for value in (row.median_seconds, row.min_seconds, row.max_seconds)]
        rate = [f"{row.bytes_per_s / 1e9:.1f}", f"{100 * row.ratio:.0f} %"]
        table.add_row(f"{row.size}, {row.bytes / 2**20:g} MiB", row.what, *times, *rate)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=256, help="of the cold buffer (default: 256)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--small", action="store_true", help="1 MiB cold, 2 rounds: does it run at all")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output instead of the table")
    options = parser.parse_args(arguments)
    cold_bytes, rounds = (1 << 20, 2) if options.small else (options.mebibytes << 20, options.rounds)
    console = Console(stderr=True)
    results = measure("page", PAGE_BYTES, 1 if options.small else 8, rounds, console)
    results += measure("cold", cold_bytes, 1, rounds, console)
    if options.json:
        print(json.dumps({"machine": machine(), "rounds": rounds, "results": [asdict(row) for row in results]}))
    else:
        show(results, rounds, Console())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
