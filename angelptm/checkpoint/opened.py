"""A commit that was found and is held: for everything that reads one and is no training run."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.reader import CommitReader
from angelptm.errors import CheckpointError

_CONFIG_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class OpenCommit:
    """``folder`` is the checkpoint folder; ``reader`` is valid inside the ``with`` block."""

    folder: CheckpointFolder
    manifest: Manifest
    reader: CommitReader


@contextlib.contextmanager
def open_commit(path: Path, step: int | None, ssd_folders: Sequence[Path]) -> Iterator[OpenCommit]:
    """The commit of a step, or the newest, of the checkpoint or run folder at ``path``, held against being retired.

    Slot files are looked for in the checkpoint folder and in ``ssd_folders``. A folder that a configuration names is
    never opened: the error for a missing file only says that there is one. Raises CheckpointError, IoError.
    """
    with CheckpointFolder.read(path) as folder:
        chosen = choose_step(folder, step)
        with folder.hold(chosen) as manifest, open_reader(folder, manifest, ssd_folders) as reader:
            yield OpenCommit(folder, manifest, reader)


def choose_step(folder: CheckpointFolder, step: int | None) -> int:
    """``step``, or the newest. Raises CheckpointError, which lists what there is, for a step without a commit."""
    steps = folder.commits()
    if not steps:
        raise CheckpointError(str(folder.path), "no commit", "one or more", "Did a run get as far as its first?")
    if step is not None and step not in steps:
        listed = ", ".join(map(str, steps[-8:]))
        raise CheckpointError(
            str(folder.path), f"commits of step {'..., ' if len(steps) > 8 else ''}{listed}", f"one of step {step}"
        )
    return steps[-1] if step is None else step


def open_reader(folder: CheckpointFolder, manifest: Manifest, ssd_folders: Sequence[Path]) -> CommitReader:
    """A reader of a commit of ``folder``. Raises CheckpointError with a hint where a slot file is missing."""
    try:
        return CommitReader(manifest, [folder.path, *ssd_folders])
    except CheckpointError as error:
        raise _with_hint(error, folder, ssd_folders) from error


def _with_hint(error: CheckpointError, folder: CheckpointFolder, ssd_folders: Sequence[Path]) -> CheckpointError:
    remedy = "Name the folder that has it: --ssd FOLDER, once for each."
    known = {Path(one).resolve() for one in ssd_folders}
    named = [one for one in configured_folders(folder.path.parent) if Path(one).resolve() not in known]
    if named:
        remedy += f" The run's config.yaml names {', '.join(f'--ssd {one}' for one in named)}."
    return CheckpointError(error.path, error.found, error.expected, remedy)


def configured_folders(run_folder: Path) -> list[str]:
    """Folders of ``tiers.ssd`` in a run's config.yaml that exist: a hint for people and nothing else, as anybody may
    have written that file. Empty where there is none, or none that makes sense."""
    import yaml

    path = run_folder / "config.yaml"
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _CONFIG_MAX_BYTES:
            return []
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        named = [str(one["path"]) for one in content["tiers"]["ssd"]]
        return [one for one in named if one.isprintable() and Path(one).is_dir()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError):
        return []
