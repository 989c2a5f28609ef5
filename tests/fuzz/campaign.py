"""Many inputs for one target, and what came of them."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .guard import DEADLINE_SECONDS, Failure, Guard
from .mutations import Files, Link, mutated
from .targets import OUTSIDE, Target

MAX_FAILURES = 20
"""A campaign stops there: one defect shows itself in many inputs."""


@dataclass
class Outcome:
    """``failures`` maps the index of an input to what happened."""

    target: str
    seed: int
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: dict[int, Failure] = field(default_factory=dict)


def workplace() -> Path:
    """A new folder, in memory if the machine has such a place. The caller removes it."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None)).resolve()


def run_campaign(
    target: Target,
    seed: int,
    indices: Iterable[int],
    deadline_seconds: float = DEADLINE_SECONDS,
    on_input: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Runs the inputs with these indices. The seeds themselves run first and must be accepted.

    on_input: called with the index of each input before it runs, -1 for the seeds.
    """
    outcome, work = Outcome(target.name, seed), workplace()
    folder = work / "folder"
    try:
        (work / OUTSIDE).mkdir()
        write(work / OUTSIDE, target.outside())
        seeds = target.seeds()
        start = time.perf_counter()
        on_input(-1)
        for files in seeds:  # before the guard: whatever is loaded once is loaded here
            write(folder, files)
            assert target.run(folder), f"{target.name}: a seed is refused"
        with Guard(folder, deadline_seconds) as guard:
            for index in indices:
                on_input(index)
                write(folder, mutated(seed, index, seeds, target.fields, target.links()))
                result = guard.run(lambda: target.run(folder), target.allowed)
                outcome.inputs += 1
                if isinstance(result, Failure):
                    outcome.failures[index] = result
                    if len(outcome.failures) >= MAX_FAILURES:
                        break
                elif result:
                    outcome.accepted += 1
                else:
                    outcome.refused += 1
        outcome.seconds = time.perf_counter() - start
        return outcome
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write(folder: Path, files: Files) -> None:
    """Makes the folder hold these files and nothing else."""
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
    else:
        folder.mkdir()
    for name, content in files.items():
        if isinstance(content, Link):
            (folder / name).symlink_to(content.target)
        else:
            (folder / name).write_bytes(content)
