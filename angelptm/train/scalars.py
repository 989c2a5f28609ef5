"""Scalars for TensorBoard: ``tensorboard --logdir RUN`` draws them while a run goes on.

Events are written with tensorboard's own records, but not with its writer: that one writes on a thread, where a full
disk would be a traceback beside the run. Here it is the run's IoError, and no half record stays behind. What a power
cut takes of these files is gone from the curves; metrics.jsonl, which commits wait for, has it still.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping, Sequence
from errno import EIO
from pathlib import Path
from typing import Any

from io_engine import IoError

FOLDER = "tensorboard"
"""Below the run folder."""


class Scalars:
    """One event file for each part of a run. A step's scalars are in the file when ``step`` returns."""

    def __init__(
        self, run_dir: Path, tokens_per_step: int, former: Sequence[Mapping[str, Any]], resumed_step: int | None
    ):
        """``former``: the metrics of the steps before ``resumed_step``. Whatever earlier parts wrote of later steps,
        TensorBoard forgets; a run that starts anew makes it forget all. Raises IoError."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._record_writer = Event, Summary, RecordWriter
        self._tokens_per_step = tokens_per_step
        self._bytes: Mapping[str, Mapping[str, int]] = next(
            (line["bytes"] for line in reversed(former) if "bytes" in line), {}
        )
        # Readers take the files of a folder in the order of their names, so the time comes first; nanoseconds
        # follow for two parts within a second.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}.{socket.gethostname()}.{os.getpid()}"
        self._path = run_dir / FOLDER / name
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._path.open("xb", buffering=0)
        except OSError as error:
            raise IoError("open", str(self._path), 0, 0, error.errno or EIO) from error
        first = 0 if resumed_step is None else resumed_step + 1
        start = SessionLog(status=SessionLog.START)
        self._write(
            Event(wall_time=now / 1e9, step=first, file_version="brain.Event:2"),
            Event(wall_time=now / 1e9, step=first, session_log=start),
        )

    def step(self, line: Mapping[str, Any], stall_seconds: float | None = None) -> None:
        """A line of the metrics: of a step, whose ``bytes`` count up over the run, or of an evaluation.

        ``stall_seconds`` is how long the step waited for pages and updates. Raises IoError.
        """
        found = {name: line[key] for key, name in _NAMES.items() if line.get(key) is not None}
        if line.get("seconds"):
            found["speed/tokens_per_s"] = self._tokens_per_step / line["seconds"]
        if "bytes" in line:
            for tier, both in line["bytes"].items():
                for way, size in both.items():
                    found[f"bytes/{tier}_{way}"] = size - self._bytes.get(tier, {}).get(way, 0)
            self._bytes = line["bytes"]
        for key, value in line.get("updates", {}).items():
            found[f"updates/{key}"] = value
        if stall_seconds is not None:
            found["speed/stall_seconds"] = stall_seconds
        if not found:
            return
        values = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in found.items()]
        self._write(self._event(wall_time=time.time(), step=line["step"], summary=self._summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, *events: Any) -> None:
        records = io.BytesIO()
        writer = self._record_writer(records)
        for event in events:
            writer.write(event.SerializeToString())
        view = memoryview(records.getvalue())
        whole = self._file.tell()
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), whole)
            raise IoError("write", str(self._path), whole, len(view), error.errno or EIO) from error


_NAMES = {
    "loss": "loss/training",
    "validation_loss": "loss/validation",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "seconds": "speed/step_seconds",
}
"""Key of the metrics → tag."""
