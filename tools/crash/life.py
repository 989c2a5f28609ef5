"""One process of a run, forked from one that has imported everything and computed nothing, to save the time."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import angelptm_native as native
import torch
import transformers.models.gpt2.modeling_gpt2  # noqa: F401 (imported before the fork)

from angelptm.config import Config
from angelptm.engine import Engine, planning
from angelptm.plan import NOMINAL_RATES
from angelptm.train import train
from crash.broken import BROKEN
from crash.watch import Kill, SmallWrites, Watch
from io_engine.power_cut import MetadataJournal

DEADLINE_SECONDS = 120.0


@dataclass(frozen=True)
class Files:
    """What the harness keeps beside the run's own ``root``."""

    root: Path
    notes: Path
    log: Path
    data_journal: Path
    names_journal: Path

    @classmethod
    def of(cls, folder: Path) -> Files:
        (folder / "root").mkdir(parents=True)
        names = ("root", "notes.jsonl", "log", "data.journal", "names.journal")
        return cls(*(folder / name for name in names))


@dataclass(frozen=True)
class End:
    """How a process ended. ``code`` is minus the signal's number where a signal ended it."""

    code: int
    seconds: float


def run_life(
    config: Config, files: Files, *, resume: bool, kill: Kill | None, seed: int, journals: bool, broken: str | None
) -> End:
    """Runs it to its end, whoever makes it."""
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        _child(config, files, resume, kill, seed, journals, broken)
    if kill is not None and kill.how == "timer":
        _wait(pid, kill.at)
        os.kill(pid, signal.SIGKILL)
    elif not _wait(pid, DEADLINE_SECONDS):
        with files.log.open("a") as log:
            log.write(f"ended after {DEADLINE_SECONDS} s\n")
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return End(os.waitstatus_to_exitcode(status), time.perf_counter() - start)


def _wait(pid: int, seconds: float) -> bool:
    """Whether the process ended in the time; it is not reaped, so that its id stays its own."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return True
        time.sleep(min(0.002, left))
    return False


def _child(
    config: Config, files: Files, resume: bool, kill: Kill | None, seed: int, journals: bool, broken: str | None
) -> NoReturn:
    code = 1
    try:
        log = os.open(files.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if broken is not None:
            BROKEN[broken]()
        crash = native.CrashPlan(
            seed=seed,
            kill_at=int(kill.at) if kill is not None and kill.how == "write" else 0,
            journal=str(files.data_journal) if journals else "",
        )
        journal = MetadataJournal(files.names_journal) if journals else None
        watch = Watch(files.notes, journal, kill, early=seed % 2 == 1)
        _observe(watch, crash)
        train(config, _Silence(), resume=resume, faults=native.FaultPlan(crash=crash), disk=SmallWrites(watch))
        watch.note(writes=crash.count, operations=watch.operations)
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(code)


def _observe(watch: Watch, crash: native.CrashPlan) -> None:
    """Notes what the run itself does not tell: where it resumes, which writes fall into commits, what slots it uses."""
    load, save, close = Engine.load_checkpoint, Engine.save_checkpoint, Engine.close

    def load_checkpoint(self: Engine, *given: Any, **keys: Any) -> Any:
        found = load(self, *given, **keys)
        watch.note(resumed=self.global_step)
        return found

    def save_checkpoint(self: Engine, *given: Any, **keys: Any) -> None:
        save(self, *given, **keys)
        watch.note(commit=self.global_step, writes=crash.count)

    def close_engine(self: Engine) -> None:
        self.drain()
        watch.note(slots=self._store.slot_used_count, of=self._store.slot_count)
        close(self)

    Engine.load_checkpoint = load_checkpoint  # type: ignore[method-assign]
    Engine.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    Engine.close = close_engine  # type: ignore[method-assign]


class _Silence:
    """A Reporter that writes to the log alone."""

    def say(self, text: str) -> None:
        print(text)

    def begin(self, total_steps: int) -> None: ...

    def step(self, step: int, loss: float, tokens_per_s: float, traffic: Any) -> None: ...

    def end(self) -> None: ...

    @contextmanager
    def working(self, what: str) -> Iterator[Any]:
        print(what)
        yield lambda done, total: None  # noqa: ARG005 (Tick names them)


def prepare(*, measure: bool) -> None:
    """To be called before the first fork: no thread may have been started by then. Without ``measure`` runs plan with
    given rates, since to measure the machine's takes longer than the rest of a run."""
    torch.set_num_threads(1)
    if not measure:
        planning.measure_rates = lambda *_, **__: NOMINAL_RATES
        planning.compute_speed = lambda *_: 1.0
