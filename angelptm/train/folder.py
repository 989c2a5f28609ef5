"""The run folder: what a run was asked, what it planned, what happened at each step, and its result."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from errno import EIO
from pathlib import Path
from typing import IO, Any, Protocol

from angelptm.checkpoint.disk import Disk
from angelptm.config import Config
from angelptm.errors import ConfigError
from io_engine import IoError

RECORDED = ("timeline.json.gz", "trace.json", "rates.json", "schedule.json", "prediction.json")
"""What a run records of some of its steps, for `angelptm trace` and `angelptm plan --trace`."""


class RunRecords(Protocol):
    """Where a run's records go. See RunFolder."""

    path: Path
    kept: bool

    @property
    def tokens(self) -> Path: ...

    def keep(self, config: Config, plan: dict[str, Any], resumed_step: int | None = None) -> list[dict[str, Any]]: ...

    def record(self, metrics: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def finish(self, result: dict[str, Any]) -> None: ...

    def discard(self) -> None: ...


class OtherRanksRecords:
    """Of any rank but the first, whose run folder has what there is to tell: nothing but tokens is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.kept = path.absolute(), False

    @property
    def tokens(self) -> Path:
        return self.path / "tokens"

    def keep(self, config: Config, plan: dict[str, Any], resumed_step: int | None = None) -> list[dict[str, Any]]:
        del config, plan, resumed_step
        return []

    def record(self, metrics: dict[str, Any]) -> None:
        """The first rank does."""

    def sync(self) -> None:
        """As above."""

    def finish(self, result: dict[str, Any]) -> None:
        """As above."""

    def discard(self) -> None:
        """As above."""


class RunFolder:
    """``config.yaml`` (resolved), ``plan.json``, ``metrics.jsonl`` (one line a step), ``result.json``, ``tokens/``,
    RECORDED, and ``checkpoint/`` where commits are made.

    Until ``keep`` is called the folder is on trial: ``discard`` removes what this object made, and nothing else.
    Afterwards files are replaced whole, and what a commit must not be newer than survives a power cut.
    """

    def __init__(self, path: Path, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        self.path = path.absolute()
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.kept = False
        """Whether the run has started, so that the folder stays whatever happens."""
        self._metrics: IO[str] | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
            self._disk.sync_names(self.path)  # before what lies elsewhere and is only known from here: slot files
        except OSError as error:
            self.discard()
            raise ConfigError("run_dir", str(self.path), f"a folder that can be written ({error.strerror})") from error

    @property
    def tokens(self) -> Path:
        """Where tokenized text is kept."""
        return self.path / "tokens"

    def keep(self, config: Config, plan: dict[str, Any], resumed_step: int | None = None) -> list[dict[str, Any]]:
        """The run starts: records what it is, and opens the metrics. A run that goes on after ``resumed_step`` keeps
        the lines up to that step, which are returned; what was recorded of later steps will happen again."""
        self.kept = True
        if (self.path / "result.json").exists():
            self._disk.remove(self.path / "result.json")
        for left in self.tokens.glob(".tokens-*"):
            left.unlink(missing_ok=True)  # unfinished, by a process that was killed: this one's are complete by now
        self._write("config.yaml", config.resolved_yaml())
        self._write("plan.json", json.dumps(plan, indent=2))
        former = self._former_lines(resumed_step) if resumed_step is not None else []
        for name in RECORDED if resumed_step is None else ():
            (self.path / name).unlink(missing_ok=True)  # of another run
        self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in former))
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        return former

    def _former_lines(self, last_step: int) -> list[dict[str, Any]]:
        """Whole lines of steps up to ``last_step``."""
        try:
            text = (self.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        lines = []
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut short when the process ended
            if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= last_step:
                lines.append(record)
        return lines

    def record(self, metrics: dict[str, Any]) -> None:
        """Appends one line. Raises IoError, and what was written of it is passed over when the run goes on."""
        assert self._metrics is not None, "keep comes first"
        line = json.dumps(metrics) + "\n"
        try:
            self._metrics.write(line)
            self._metrics.flush()
        except OSError as error:
            raise IoError("write", str(self.path / "metrics.jsonl"), 0, len(line), error.errno or EIO) from error

    def sync(self) -> None:
        """Returns when the lines recorded so far survive a power cut."""
        if self._metrics is not None:
            self._disk.sync(self._metrics.fileno(), self.path / "metrics.jsonl")

    def finish(self, result: dict[str, Any]) -> None:
        self._write("result.json", json.dumps(result, indent=2))
        self.close()

    def close(self) -> None:
        if self._metrics is not None:
            with suppress(OSError):  # of a line that could not be written, as record has said
                self._metrics.close()
            self._metrics = None

    def discard(self) -> None:
        """Removes the folders that did not exist before, unless the run had started."""
        self.close()
        if self.kept:
            return
        if self._made and self._made[0] == self.path:
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._made[1:]:
            try:
                folder.rmdir()
            except OSError:
                break  # Something else has been put there meanwhile.

    def _write(self, name: str, text: str) -> None:
        self._disk.publish(self.path / name, text.encode())
