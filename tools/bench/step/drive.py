"""The drive's own rates: fio with the blocks, depth and mix of reads and writes that a case has."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from io_engine.bench import Point, bench_file, measure
from io_engine.buffer import AlignedBuffer
from io_engine.engine import open as open_engine
from io_engine.file import File
from io_engine.fio import fio_path

BLOCK_BYTES = 4 * 2**20
DEPTH = 8
_DEADLINE_SECONDS = 600


class Drive:
    """Rates by share of reads in whole percent; every mix that was asked for once is measured again each round."""

    def __init__(self, file: File, file_bytes: int) -> None:
        self._file, self._bytes = file, file_bytes
        self._fio = fio_path()
        self.samples: dict[int, list[float]] = {100: [], 0: []}
        self.program = "fio" if self._fio else "AngelPTM's I/O engine, as fio is not installed; mixes are computed"

    def want(self, read_percent: int) -> None:
        """A mix from now on; measured at once, so that it has as many samples as there are rounds left."""
        if read_percent not in self.samples:
            self.samples[read_percent] = [self._rate(read_percent)]

    def round(self) -> None:
        for percent, samples in self.samples.items():
            samples.append(self._rate(percent))

    def bytes_per_s(self, read_percent: int) -> float:
        return statistics.median(self.samples[read_percent])

    def _rate(self, read_percent: int) -> float:
        if self._fio:
            return self._fio_rate(self._fio, read_percent)
        if read_percent not in (0, 100):
            read = read_percent / 100
            return 1 / (read / self._rate(100) + (1 - read) / self._rate(0))
        point = Point("auto", "read" if read_percent else "write", BLOCK_BYTES, DEPTH)
        with AlignedBuffer(2 * DEPTH * BLOCK_BYTES) as buffer:
            buffer.write(os.urandom(BLOCK_BYTES) * 2 * DEPTH)
            with open_engine([self._file], backend="auto", depth=DEPTH, buffers=[buffer]) as engine:
                measure(engine, point, buffer, self._bytes)
        return point.bytes_per_s[0]

    def _fio_rate(self, program: str, read_percent: int) -> float:
        """Bytes per second of both sides together, as fio reports them: its start-up does not count."""
        op = {100: ["--rw=read"], 0: ["--rw=write"]}.get(read_percent, ["--rw=rw", f"--rwmixread={read_percent}"])
        command = [
            program,
            "--name=ceiling",
            f"--filename=/proc/{os.getpid()}/fd/{self._file.descriptor}",
            *op,
            f"--bs={BLOCK_BYTES}",
            f"--iodepth={DEPTH}",
            f"--size={self._bytes}",
            "--ioengine=io_uring",
            f"--direct={int(self._file.direct)}",
            "--fixedbufs=1",
            "--registerfiles=1",
            "--thread=1",
            "--overwrite=1",
            "--allow_file_create=0",
            "--randseed=1",
            "--output-format=json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_SECONDS, check=False)
        if done.returncode:
            raise SystemExit(f"fio failed with code {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}")
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
        seconds = max(side["io_bytes"] / side["bw_bytes"] for side in sides)  # of the side that ended last
        return float(sum(side["io_bytes"] for side in sides) / seconds)


@contextmanager
def drive_of(folder: Path, file_bytes: int) -> Iterator[Drive]:
    """With a file of its own that has no name, so that its space is given back however this ends."""
    with bench_file(str(folder), file_bytes, lambda *_: None) as file:
        yield Drive(file, file_bytes)


def device_bytes(folder: Path) -> dict[str, int] | None:
    """Bytes that the whole device under ``folder`` has moved, whoever asked for them; None where nobody counts."""
    device = os.stat(folder).st_dev
    try:
        fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    except OSError:
        return None
    return {"read": int(fields[2]) * 512, "written": int(fields[6]) * 512}
