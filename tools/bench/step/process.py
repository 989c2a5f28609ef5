"""A worker as the parent sees it: started, asked, stopped."""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import runpy
import select
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Protocol

TOOLS = Path(__file__).resolve().parents[2]
_DEADLINE_SECONDS = 1800.0  # for one reply
_STOP_SECONDS = 60.0
_SHOWN_LINES = 12
_LIBRARIES = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
"""Environment of the libraries, where the user has set nothing else."""


class WorkerError(Exception):
    """A worker ended, or did not answer; says its last lines."""


class _Started(Protocol):
    """A process, however it was started."""

    def wait(self, seconds: float) -> int | None:
        """Its exit code, once it has ended; None when it has not within so many seconds."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Worker:
    """One process that answers a line with a line. It ends when its standard input does, also if the parent dies."""

    def __init__(
        self, name: str, module: str, case: dict[str, Any], python: str = sys.executable, **environment: str
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        self._left = b""
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        files = (theirs_in, theirs_out, self._errors.fileno())
        try:
            if python == sys.executable and not environment:
                self._process: _Started = _Forked(module, json.dumps(case), files)
            else:
                self._process = _Spawned([python, "-m", module, json.dumps(case)], files, environment)
        except BaseException:
            self._close_pipes()
            self._errors.close()
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)

    def reply(self) -> Any:
        """The next line that it writes. Raises WorkerError when there is none."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while b"\n" not in self._left:
            if not select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerError(f"{self.name}: no answer within {_DEADLINE_SECONDS:.0f} s\n{self._last_lines()}")
            read = os.read(self._from, 1 << 16)
            if not read:
                code = self._process.wait(_STOP_SECONDS)
                raise WorkerError(f"{self.name}: its process ended with code {code}\n{self._last_lines()}")
            self._left += read
        line, self._left = self._left.split(b"\n", 1)
        return json.loads(line)

    def ask(self, command: dict[str, Any]) -> Any:
        with contextlib.suppress(BrokenPipeError):  # reply() says why
            os.write(self._to, json.dumps(command).encode() + b"\n")
        return self.reply()

    def stop(self) -> None:
        """Lets it end by itself, and ends it when it does not."""
        self._close_pipes()
        for end in (None, self._process.terminate, self._process.kill):
            if end is not None:
                end()
            if self._process.wait(_STOP_SECONDS) is not None:
                break
        self._errors.close()

    def _close_pipes(self) -> None:
        for pipe in (self._to, self._from):
            os.close(pipe)

    def _last_lines(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return "\n".join(f"    {line}" for line in lines[-_SHOWN_LINES:])


class _Spawned:
    """A program of its own: another interpreter, or one that needs its environment before it starts."""

    def __init__(self, command: list[str], files: tuple[int, int, int], environment: dict[str, str]) -> None:
        paths = [str(TOOLS.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            command,
            stdin=files[0],
            stdout=files[1],
            stderr=files[2],
            cwd=TOOLS,  # so that `bench` is found, and nothing in tools/bench hides a library of the same name
            env={
                **_LIBRARIES,
                **os.environ,
                "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths),
                **environment,
            },
        )
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def wait(self, seconds: float) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


class _Forked:
    """A copy of a process that has imported the libraries and done nothing else: a benchmark has a dozen workers and
    starts some of them again and again, and each would take seconds for it."""

    def __init__(self, module: str, argument: str, files: tuple[int, int, int]) -> None:
        for name, value in _LIBRARIES.items():
            os.environ.setdefault(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers.models.gpt2.modeling_gpt2"])
        atexit.unregister(_end_helpers)  # once, however many workers there are
        atexit.register(_end_helpers)
        # A daemon: should the benchmark forget it, it is ended and not waited for.
        process = context.Process(target=_become, args=(module, argument, [DupFd(file) for file in files]), daemon=True)
        process.start()
        self._process = process
        self.terminate, self.kill = process.terminate, process.kill

    def wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode


def _end_helpers() -> None:
    """Ends what multiprocessing keeps beside this process, and waits for it: left to see by itself that this process
    is gone, it is there a moment longer, and a zombie where nobody collects orphans."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def _become(module: str, argument: str, files: list[Any]) -> None:
    """What ``python -m module argument`` would be, with ``files`` as its standard input, output and error."""
    for number, file in enumerate(files):
        os.dup2(file.detach(), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    os.chdir(TOOLS)
    sys.argv = [module, argument]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
