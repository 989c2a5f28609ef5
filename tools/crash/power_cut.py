"""What a power cut takes of a run's files: io_engine.power_cut does slots and what Disk publishes, this the rest."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crash.life import Files
from crash.watch import METRICS
from io_engine.power_cut import apply_power_cut

_PUBLISHED = (".manifest", ".part", "stores.json", "config.yaml", "plan.json", "result.json", METRICS)


def names_in(root: Path) -> set[Path]:
    return set(root.rglob("*"))


def cut_power(files: Files, before: set[Path], notes: Sequence[dict[str, Any]], seed: int) -> None:
    """``before``: what there was when the process started; ``notes``: those of this process."""
    generator = random.Random(seed)
    apply_power_cut(files.data_journal, seed, [files.root], files.names_journal)
    _cut_metrics(files.root / "run" / METRICS, notes, generator)
    durable = before | {Path(note["folder"]) / name for note in notes if "folder" in note for name in note["names"]}
    lost = generator.choice((0.0, 0.5, 1.0))
    for path in sorted(names_in(files.root) - durable):
        if path.name.endswith(_PUBLISHED) or not os.path.lexists(path) or generator.random() >= lost:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _cut_metrics(path: Path, notes: Sequence[dict[str, Any]], generator: random.Random) -> None:
    """Lines are appended without Disk: behind what was synced last anything may be missing or zeros."""
    if not path.exists():
        return
    sizes = [note["metrics_bytes"] for note in notes if note.get("inode") == path.stat().st_ino]
    if not sizes:
        return
    content = path.read_bytes()
    kept = generator.randint(sizes[-1], max(sizes[-1], len(content)))
    end = generator.choice((b"", bytes(len(content) - kept)))
    path.write_bytes(content[:kept] + end)
