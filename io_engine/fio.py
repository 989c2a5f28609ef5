"""fio as the ceiling: the same blocks, depth and file through a program that others trust.

fio's buffers are its default ones, on ordinary pages. Ours ask for huge pages, so a 4 MiB request reaches the device in
fewer pieces, and figures above 100 % of this ceiling are possible.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from io_engine.errors import IoError

_RW = {"read": "read", "write": "write", "mixed": "rw"}


@dataclass(frozen=True)
class FioRun:
    """Figures that fio itself reports, so that its start-up does not count."""

    bytes_per_s: float
    latency_p50_s: float
    latency_p99_s: float


def fio_path() -> str | None:
    """Where fio is installed, or None."""
    return shutil.which("fio")


def run_fio(program: str, path: str, op: str, block_bytes: int, queue_depth: int, bytes: int, direct: bool) -> FioRun:
    """Moves ``bytes`` of the existing file ``path`` in order. Raises IoError when fio fails or takes 10 minutes."""
    command = [
        program,
        "--name=ceiling",
        f"--filename={path}",
        f"--rw={_RW[op]}",
        f"--bs={block_bytes}",
        f"--iodepth={queue_depth}",
        f"--size={bytes}",
        "--ioengine=io_uring",
        f"--direct={int(direct)}",
        "--fixedbufs=1",
        "--registerfiles=1",
        "--thread=1",
        "--overwrite=1",  # the blocks exist: nothing is laid out or extended
        "--allow_file_create=0",
        "--randseed=1",
        "--output-format=json",
    ]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired as error:
        raise IoError(op, path, 0, bytes, errno.ETIMEDOUT, "fio did not end within 600 s") from error
    if finished.returncode != 0:
        reason = (finished.stderr or finished.stdout).strip()[-400:]
        raise IoError(op, path, 0, bytes, errno.EIO, f"fio failed with code {finished.returncode}: {reason}")
    # fio may print notes before the object.
    job = json.loads(finished.stdout[finished.stdout.index("{") :])["jobs"][0]
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    return FioRun(
        sum(side["bw_bytes"] for side in sides), _percentile(sides, "50.000000"), _percentile(sides, "99.000000")
    )


def _percentile(sides: list[dict[str, Any]], key: str) -> float:
    """Completion latency; of a mixed run the mean of both sides, weighted by their requests."""
    total = sum(side["total_ios"] for side in sides)
    return float(sum(side["clat_ns"]["percentile"][key] * side["total_ios"] for side in sides) / total / 1e9)
