"""Runs that commit: their configurations, and what each step left behind, to compare with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import Kind, moment_kinds
from angelptm.config import Config, load_config
from angelptm.engine import Engine

from .models import Family
from .training import PAGE, batches_of, snapshot, tight_config, train_step

SSD = {"param": "ssd", "grad": "ssd", "states": "ssd"}
HALF = {"param": "ssd", "grad": "host", "states": 0.5}
HOST = {"param": "host", "grad": "host", "states": "host"}
DEVICE = {"param": "device", "grad": "ssd", "states": "ssd"}
DEVICE_HOST = {"param": "device", "grad": "host", "states": "host"}


def config_of(model: nn.Module, folder: Path, *, keep: int = 1, name: str = "run", **keys: Any) -> Config:
    """A tight configuration of a run that commits to ``folder / name``; with ``ssd=False`` it has no SSD tier."""
    checkpoint = {"folder": str(folder / name), "keep": keep}
    if keys.pop("ssd", True):
        return tight_config(model, folder, checkpoint=checkpoint, **keys)
    content = {"page_size": PAGE, "optimizer": {"lr": 1e-2}, "placement": {"param": "auto"}} | keys
    return load_config({**content, "tiers": {"device": 2**23, "host": 2**25}, "checkpoint": checkpoint})


@dataclass
class Recorded:
    """What a run left after each step; index 0 is before the first."""

    losses: list[torch.Tensor] = field(default_factory=list)
    masters: list[dict[str, torch.Tensor]] = field(default_factory=list)


Step = Callable[[Engine, int], list[torch.Tensor]]


def step_of(family: Family) -> Step:
    return lambda engine, step: train_step(engine, batches_of(family, engine.config, step))


def record(engine: Engine, step: Step, steps: int, first: int = 0) -> Recorded:
    """Trains without a word about commits."""
    run = Recorded(masters=[snapshot(engine.state_dict(master=True))])
    for index in range(first, first + steps):
        run.losses.append(torch.stack(step(engine, index)))
        run.masters.append(snapshot(engine.state_dict(master=True)))
    return run


def assert_bits(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.dtype == expected.dtype, what
    assert torch.equal(found, expected), what


def assert_masters(engine: Engine, expected: dict[str, torch.Tensor]) -> None:
    found = engine.state_dict(master=True)
    assert set(found) == set(expected)
    for name in expected:
        assert_bits(found[name], expected[name], name)


def assert_continues(engine: Engine, step: Step, run: Recorded, first: int) -> None:
    """From step ``first`` on the engine does what the recorded run did, to its end."""
    assert engine.global_step == first
    assert_masters(engine, run.masters[first])
    for index in range(first, len(run.losses)):
        assert_bits(torch.stack(step(engine, index)), run.losses[index], f"losses of step {index}")
    assert_masters(engine, run.masters[-1])


def committed(folder: Path, step: int, folders: Sequence[Path] = ()) -> dict[tuple[str, str], np.ndarray]:
    """All states of a commit as its reader sees them, every page against its CRC."""
    with (
        CheckpointFolder.read(folder) as opened,
        opened.hold(step) as manifest,
        CommitReader(manifest, [folder, *folders]) as reader,
    ):
        assert reader.verify() == []
        kinds = {Kind.MASTER, *moment_kinds(manifest.header.optimizer.type)}
        return {
            (param.name, Kind(kind).name): reader.read(param.name, Kind(kind)).copy()
            for unit in manifest.header.units
            for param in unit.params
            if param.trainable
            for kind in kinds
        }


def assert_committed(folder: Path, step: int, masters: dict[str, torch.Tensor], folders: Sequence[Path] = ()) -> None:
    """The commit of a step has the masters that the recorded run had then."""
    found = committed(folder, step, folders)
    for (name, kind), values in found.items():
        if kind == "MASTER":
            assert_bits(torch.from_numpy(values), masters[name].flatten(), f"{name} in the commit of step {step}")


def steps_in(folder: Path) -> list[int]:
    with CheckpointFolder.read(folder) as opened:
        return opened.commits()


def hashes(*folders: Path) -> dict[str, str]:
    """Of every file below the folders."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_slots_are_owned(engine: Engine, *, stale: bool = False) -> None:
    """Every slot in use belongs to the page table or to a commit that is kept.

    ``stale``: or is the copy that a failed commit made of a host page that has changed since; the next one replaces it.
    """
    commits = engine._commits
    assert commits is not None
    engine.drain()
    owned: set[tuple[int, int]] = set()
    for kept in commits.kept._kept.values():
        if kept.store_id == commits.durable.store_id:
            owned |= set(kept.slots)
    owned |= {copy[:2] for copy in commits._fixed.values()}
    for unit in engine._catalogue.by_unit:
        pages = [one.page for one in unit if one.page is not None]
        for state, file, slot, _, _ in engine._store.capture(pages):
            if state.name == "IN_SLOT":
                engine._store.release_slots([(file, slot)])
                owned.add((file, slot))
    more = engine._store.slot_used_count - len(owned)
    assert 0 <= more <= (commits._host_pages if stale else 0)
