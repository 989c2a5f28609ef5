"""Finds the settings and the rates of a disk, for the hardware file that configurations name."""

from __future__ import annotations

import datetime
import errno
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from io_engine.backends import working_backends
from io_engine.bench import OPS, BenchPlan, Progress, run_bench
from io_engine.errors import IoError
from io_engine.machine import machine_facts

# Within this fraction of the fastest, fewer requests in flight and smaller blocks are preferred: they hold less memory.
_AS_GOOD = 0.97


@dataclass(frozen=True)
class TunePlan:
    """What to try on the first path; the other paths are measured with what was best there."""

    paths: Sequence[str]
    file_bytes: int
    block_bytes: Sequence[int]
    queue_depths: Sequence[int]
    rounds: int


def tune(plan: TunePlan, progress: Progress) -> dict[str, Any]:
    """The content of the hardware file: ``ssd`` (free bytes, and rates in bytes/s, of each path), ``io`` (backend,
    queue_depth, block_bytes), ``machine``, ``date``."""
    # The Python backends are there for comparison; training uses the native engine.
    native = [backend for backend, refusal in working_backends().items() if not refusal and backend in _NATIVE]
    if not native:
        raise IoError("setup", "", 0, 0, errno.ENOSYS, "setup: the native module is not built, so nothing can be tuned")
    sweep = BenchPlan(
        plan.paths[0],
        plan.file_bytes,
        plan.block_bytes,
        plan.queue_depths,
        native,
        ("read", "write"),
        plan.rounds,
        with_fio=False,
    )
    best = best_settings(run_bench(sweep, progress)["results"])
    ssd = []
    for path in plan.paths:
        final = BenchPlan(
            path,
            plan.file_bytes,
            [best["block_bytes"]],
            [best["queue_depth"]],
            [best["backend"]],
            OPS,
            plan.rounds,
            with_fio=False,
        )
        rates = {result["op"]: int(result["bytes_per_s"]) for result in run_bench(final, progress)["results"]}
        ssd.append(
            {
                "path": os.path.abspath(path),
                "capacity": shutil.disk_usage(path).free,
                **{f"{op}_bytes_per_s": rates[op] for op in OPS},
                "latency_seconds": _latency_seconds(path, plan, best["backend"], progress),
            }
        )
    return {
        "ssd": ssd,
        "io": best,
        "machine": machine_facts(plan.paths[0]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _latency_seconds(path: str, plan: TunePlan, backend: str, progress: Progress) -> float:
    """Of a read of one small block by itself."""
    alone = BenchPlan(
        path, _LATENCY_FILE_BYTES, [_LATENCY_BLOCK_BYTES], [1], [backend], ("read",), plan.rounds, with_fio=False
    )
    return float(run_bench(alone, progress)["results"][0]["latency_p50_s"])


_NATIVE = ("uring", "threads")
_LATENCY_FILE_BYTES, _LATENCY_BLOCK_BYTES = 4 * 2**20, 4096


def best_settings(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cheapest settings that are as good as the fastest, by the geometric mean of reading and writing."""
    rates: dict[tuple[str, int, int], list[float]] = {}
    for result in results:
        key = (result["backend"], result["queue_depth"], result["block_bytes"])
        rates.setdefault(key, []).append(result["bytes_per_s"])
    score = {key: statistics.geometric_mean(values) for key, values in rates.items()}
    limit = _AS_GOOD * max(score.values())
    backend, depth, block = min(
        (key for key in score if score[key] >= limit), key=lambda key: (key[1] * key[2], key[1], -score[key])
    )
    return {"backend": backend, "queue_depth": depth, "block_bytes": block}


def write_hardware_file(path: str, content: dict[str, Any]) -> None:
    """Replaces ``path`` at once, so that a reader never sees half of it."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yaml.safe_dump(content, file, sort_keys=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise IoError("write", path, 0, 0, error.errno or errno.EIO) from error
