"""What a run shows while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from angelptm.sizes import format_bytes

_LINE_SECONDS = 5.0


class Tick(Protocol):
    def __call__(self, done: int, total: int) -> None: ...


class Reporter(Protocol):
    """Where a run tells what it is doing."""

    def say(self, text: str) -> None:
        """One line that stays."""
        ...

    def begin(self, total_steps: int) -> None: ...

    def step(self, step: int, loss: float, tokens_per_s: float, traffic: Mapping[str, Mapping[str, int]]) -> None:
        """After each step; ``traffic`` is cumulative."""
        ...

    def end(self) -> None: ...

    def working(self, what: str) -> AbstractContextManager[Tick]:
        """A context around something that may take seconds; called inside with (done, total) bytes."""
        ...


def moved(traffic: Mapping[str, Mapping[str, int]]) -> str:
    """``device 1.2 GiB | host 3 GiB | ssd 2 GiB``: read and written together."""
    return " | ".join(f"{tier} {format_bytes(sum(both.values()))}" for tier, both in traffic.items())


class ConsoleReporter:
    """Rich bars on a terminal; elsewhere a line every few seconds. See :class:`Reporter`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._total = 0
        self._last_line = 0.0

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, total_steps: int) -> None:
        self._total = total_steps
        self._last_line = time.monotonic()
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:,.0f} tok/s"),
            TextColumn("moved: {task.fields[moved]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._progress.start()
        self._progress.add_task("train", total=total_steps, loss=float("nan"), rate=0.0, moved="")

    def step(self, step: int, loss: float, tokens_per_s: float, traffic: Mapping[str, Mapping[str, int]]) -> None:
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], completed=step, loss=loss, rate=tokens_per_s, moved=moved(traffic)
            )
        elif step in (1, self._total) or time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._total}  loss {loss:.3f}  {tokens_per_s:,.0f} tok/s  moved: {moved(traffic)}")

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextmanager
    def working(self, what: str) -> Iterator[Tick]:
        start = self._last_line = time.monotonic()
        if self._console.is_terminal:
            columns = TextColumn(what), BarColumn(bar_width=24), TimeRemainingColumn()
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(what, total=None)
                yield lambda done, total: progress.update(task, completed=done, total=total)
        else:
            self.say(f"{what} ...")

            def tick(done: int, total: int) -> None:
                if time.monotonic() - self._last_line >= _LINE_SECONDS:
                    self._last_line = time.monotonic()
                    self.say(f"{what}: {done / max(1, total):.0%}")

            yield tick
        if time.monotonic() - start > 2:
            self.say(f"{what}: {time.monotonic() - start:.1f} s")
