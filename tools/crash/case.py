"""A case: one run that is killed, resumed, killed again and in the end completed, and what has to hold meanwhile."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import Kind
from angelptm.config import Config
from crash.life import Files, run_life
from crash.power_cut import cut_power, names_in
from crash.variants import config_of
from crash.watch import METRICS, Kill

# Written by each process about its own steps, if it takes enough of them.
_OF_ONE_PROCESS = {"tensorboard", "trace.json", "rates.json", "schedule.json", "prediction.json", "timeline.json.gz"}


class BrokenPromiseError(Exception):
    """What was found, and what should have been."""


def expect(holds: bool, text: str) -> None:
    if not holds:
        raise BrokenPromiseError(text)


@dataclass(frozen=True)
class Case:
    """``str`` and ``parse`` are the two ways of its name, with which it can be repeated."""

    variant: str
    power_cut: bool
    seed: int
    kills: tuple[Kill, ...]

    def __str__(self) -> str:
        mode = "power-cut" if self.power_cut else "kill"
        return f"{self.variant}/{mode}/{self.seed}/{','.join(map(str, self.kills))}"

    @classmethod
    def parse(cls, text: str) -> Case:
        variant, mode, seed, kills = text.split("/")
        return cls(variant, mode == "power-cut", int(seed), tuple(map(Kill.parse, kills.split(","))))


@dataclass
class Reference:
    """The uninterrupted run: what every other one must come to, and the places where it can be interrupted."""

    steps: list[tuple[Any, ...]]
    digests: dict[str, str]
    commits: list[int]
    files: set[str]
    used_slots: int
    validation: tuple[Any, ...]
    seconds: float
    writes: int = 0
    operations: list[str] = field(default_factory=list)
    commit_writes: dict[int, int] = field(default_factory=dict)
    """Native writes before each commit, by its step."""


@dataclass
class Outcome:
    case: str
    killed: int = 0
    survived: int = 0  # the process had ended before its kill
    from_commit: int = 0
    from_start: int = 0
    failure: str = ""


def run_reference(variant: str, folder: Path, corpus: Path) -> Reference:
    files = Files.of(folder)
    config = config_of(variant, files.root, corpus)
    end = run_life(config, files, resume=False, kill=None, seed=0, journals=False, broken=None)
    if end.code != 0:
        raise RuntimeError(f"the uninterrupted run of {variant} failed:\n{files.log.read_text()}")
    found = _state_of(config, files, end.seconds)
    for note in _notes(files):
        if "operations" in note:
            found.writes, found.operations = note["writes"], note["operations"]
        elif "commit" in note:
            found.commit_writes[note["commit"]] = note["writes"]
    return found


def run_case(case: Case, reference: Reference, folder: Path, corpus: Path, broken: str | None = None) -> Outcome:
    """Leaves nothing behind unless it fails."""
    outcome = Outcome(str(case))
    files = Files.of(folder)
    config = config_of(case.variant, files.root, corpus)
    try:
        _kill_all(case, config, files, broken, outcome)
        end = run_life(config, files, resume=True, kill=None, seed=0, journals=False, broken=broken)
        expect(end.code == 0, f"the last resume ended with {end.code}:\n{_tail(files)}")
        compare(_state_of(config, files, end.seconds), reference)
    except Exception as error:
        outcome.failure = f"{type(error).__name__}: {error}"
    else:
        shutil.rmtree(folder)
    return outcome


def _kill_all(case: Case, config: Config, files: Files, broken: str | None, outcome: Outcome) -> None:
    for index, kill in enumerate(case.kills):
        before, heard = names_in(files.root), len(_notes(files))
        newest = newest_commit(config, _promised(files)) if index else None
        end = run_life(
            config,
            files,
            resume=index > 0,
            kill=kill,
            seed=case.seed + index,
            journals=case.power_cut,
            broken=broken,
        )
        expect(end.code in (0, -signal.SIGKILL), f"life {index + 1} ended with {end.code}:\n{_tail(files)}")
        expect("ended after" not in _tail(files), f"life {index + 1} hung:\n{_tail(files)}")
        outcome.killed += end.code != 0
        outcome.survived += end.code == 0
        notes = _notes(files)[heard:]
        if case.power_cut:
            cut_power(files, before, notes, case.seed + index)
        resumed = [note["resumed"] for note in notes if "resumed" in note]
        expect(resumed in ([], [newest]), f"life {index + 1} resumed from {resumed}, the newest commit was {newest}")
        newest = newest_commit(config, _promised(files))
        if newest is None:
            outcome.from_start += 1
        else:
            outcome.from_commit += 1


def newest_commit(config: Config, promised: int) -> int | None:
    """Every kept commit is whole, and the one that was promised, or a later one, is there."""
    path = Path(str(config.run_dir)) / "checkpoint"
    steps: list[int] = []
    if (path / "commits").is_dir() and ((path / "stores.json").exists() or any((path / "commits").iterdir())):
        with CheckpointFolder.read(path) as folder:
            steps = folder.commits()
            for step in steps:
                with folder.hold(step) as manifest:
                    folders = [path, *(one.path for one in config.tiers.ssd)]
                    with CommitReader(manifest, folders) as reader:
                        bad = reader.verify()
                expect(not bad, f"commit of step {step}: {len(bad)} bad pages, {bad[:1]}")
    newest = max(steps, default=None)
    expect((newest or 0) >= promised, f"commits {steps}, although that of step {promised} was durable")
    return newest


def compare(found: Reference, expected: Reference) -> None:
    for mine, theirs in zip(found.steps, expected.steps):
        expect(mine == theirs, f"step, loss, lr and norm {mine}, not {theirs}")
    expect(len(found.steps) == len(expected.steps), f"metrics of {len(found.steps)} steps, not {len(expected.steps)}")
    expect(found.validation == expected.validation, f"losses {found.validation}, not {expected.validation}")
    different = [name for name in expected.digests if found.digests.get(name) != expected.digests[name]]
    expect(not different, f"other values of {different[:3]} ({len(different)} of {len(expected.digests)})")
    expect(found.commits == expected.commits, f"commits {found.commits} are kept, not {expected.commits}")
    expect(found.files == expected.files, f"files {sorted(found.files ^ expected.files)} too many or missing")
    expect(found.used_slots == expected.used_slots, f"{found.used_slots} slots in use, not {expected.used_slots}")


def _state_of(config: Config, files: Files, seconds: float) -> Reference:
    """Of a run that came to its end."""
    run = Path(str(config.run_dir))
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    steps = [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in lines]
    validation = (result["losses"], result["validation_loss_before"], result["validation_loss_after"])
    expect((run / "checkpoint" / "LOCK").read_bytes() == b"", "the lock was not given up")
    newest_commit(config, len(steps))
    folders = [run / "checkpoint", *(one.path for one in config.tiers.ssd)]
    with CheckpointFolder.read(run) as folder:
        commits, ids = folder.commits(), folder.store_ids()
        with folder.hold() as manifest, CommitReader(manifest, folders) as reader:
            digests = {f"{kind.name} of {name}": digest for name, kind, digest in _digests(reader)}
    slots = [note["slots"] for note in _notes(files) if "slots" in note]
    return Reference(steps, digests, commits, _file_names(files.root, ids), slots[-1], validation, seconds)


def _digests(reader: CommitReader) -> Sequence[tuple[str, Kind, str]]:
    names = [param.name for unit in reader.manifest.header.units for param in unit.params]
    kinds = (Kind.MASTER, Kind.EXP_AVG, Kind.EXP_AVG_SQ)
    return [(name, kind, hashlib.sha256(reader.read(name, kind)).hexdigest()) for name in names for kind in kinds]


def _file_names(root: Path, ids: Sequence[str]) -> set[str]:
    """Relative names, the store's id replaced, since every first start draws another one. TensorBoard's files are left
    out: each part of a run has one of its own, named after the time."""
    # The id of a set of which no file was made yet when the process was killed stays known.
    ids = [one for one in ids if any(root.rglob(f"angelptm-{one}-*.pages"))]
    expect(len(ids) == 1, f"{len(ids)} sets of slot files, not 1")
    named = {path for path in names_in(root) if not _OF_ONE_PROCESS & set(path.relative_to(root).parts)}
    return {str(path.relative_to(root)).replace(ids[0], "ID") for path in named}


def _promised(files: Files) -> int:
    """The newest step whose commit was durable."""
    return max((note["published"] for note in _notes(files) if "published" in note), default=0)


def _notes(files: Files) -> list[dict[str, Any]]:
    if not files.notes.exists():
        return []
    return [json.loads(line) for line in files.notes.read_bytes().split(b"\n")[:-1]]


def _tail(files: Files) -> str:
    return files.log.read_text(errors="replace")[-1500:] if files.log.exists() else ""
