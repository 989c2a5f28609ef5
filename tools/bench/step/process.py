"""A worker as the parent sees it: started, asked, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parents[2]
_DEADLINE_SECONDS = 1800.0  # for one reply
_STOP_SECONDS = 60.0
_SHOWN_LINES = 12


class WorkerError(Exception):
    """A worker ended, or did not answer; says its last lines."""


class Worker:
    """One process that answers a line with a line. It ends when its standard input does, also if the parent dies."""

    def __init__(
        self, name: str, module: str, case: dict[str, Any], python: str = sys.executable, **environment: str
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        self._left = b""
        paths = [str(TOOLS.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=TOOLS,  # so that `bench` is found, and nothing in tools/bench hides a library of the same name
            env={
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
                **os.environ,
                "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths),
                **environment,
            },
        )

    def reply(self) -> Any:
        """The next line that it writes. Raises WorkerError when there is none."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while b"\n" not in self._left:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerError(f"{self.name}: no answer within {_DEADLINE_SECONDS:.0f} s\n{self._last_lines()}")
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            if not read:
                code = self._process.wait(_STOP_SECONDS)
                raise WorkerError(f"{self.name}: its process ended with code {code}\n{self._last_lines()}")
            self._left += read
        line, self._left = self._left.split(b"\n", 1)
        return json.loads(line)

    def ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reply() says why
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        return self.reply()

    def stop(self) -> None:
        """Lets it end by itself, and ends it when it does not."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        for end in (None, self._process.terminate, self._process.kill):
            if end is not None:
                end()
            try:
                self._process.wait(_STOP_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
        self._errors.close()

    def _last_lines(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return "\n".join(f"    {line}" for line in lines[-_SHOWN_LINES:])
