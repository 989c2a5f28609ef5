"""What a person sees of a measurement: a progress bar while it runs, a table at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from io_engine.bench import Progress as ProgressCall
from io_engine.sizes import format_bytes


@contextmanager
def shown_progress() -> Iterator[ProgressCall]:
    """On standard error: a bar on a terminal, else a plain line for each tenth, and at least every 5 seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last_tenth, last_time = -1, 0.0

        def plain(done: int, total: int, what: str) -> None:
            nonlocal last_tenth, last_time
            tenth = done * 10 // max(total, 1)
            if tenth != last_tenth or time.monotonic() - last_time > 5:
                last_tenth, last_time = tenth, time.monotonic()
                print(f"[{done}/{total}] {what}", file=sys.stderr, flush=True)

        yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting")

        def moving(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield moving


def print_bench(report: dict[str, Any]) -> None:
    """The table of a bench, with the ratio to the ceiling where fio measured one."""
    ceiling = {(row["op"], row["block_bytes"], row["queue_depth"]): row["bytes_per_s"] for row in report["ceiling"]}
    table = Table(
        title=f"{report['path']}: {'O_DIRECT' if report['direct'] else 'buffered'}, {report['rounds']} rounds"
    )
    for name in ("op", "block", "depth", "backend", "GB/s", "min", "max", "of fio", "p50 ms", "p99 ms"):
        table.add_column(name, justify="left" if name in ("op", "backend") else "right")
    for row in [*report["results"], *report["ceiling"]]:
        key = (row["op"], row["block_bytes"], row["queue_depth"])
        ratio = f"{row['bytes_per_s'] / ceiling[key]:.0%}" if key in ceiling else "-"
        table.add_row(
            row["op"],
            format_bytes(row["block_bytes"]),
            str(row["queue_depth"]),
            row["backend"],
            *(f"{row[name] / 1e9:.3f}" for name in ("bytes_per_s", "bytes_per_s_min", "bytes_per_s_max")),
            ratio,
            *(f"{row[name] * 1e3:.2f}" for name in ("latency_p50_s", "latency_p99_s")),
        )
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a pipe has no width, and a narrow guess would cut columns
    console.print(table)
    if not report["direct"]:
        console.print(f"Buffered, so the page cache was measured as well: {report['buffered_reason']}")
    if not report["ceiling"]:
        console.print("No ceiling: fio is not installed, or was not asked for.")


def print_hardware(content: dict[str, Any], path: str) -> None:
    """What ``tune`` found, and where it is."""
    for disk in content["ssd"]:
        rates = ", ".join(f"{op} {disk[f'{op}_bytes_per_s'] / 1e9:.2f} GB/s" for op in ("read", "write", "mixed"))
        print(f"{disk['path']}: {rates}")
    settings = content["io"]
    print(
        f"best: {settings['backend']}, queue depth {settings['queue_depth']}, "
        f"blocks of {format_bytes(settings['block_bytes'])}"
    )
    print(f"written: {path}")
