"""Where a commit meets something else: a change by hand, a load that fails, a reader, a start that fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import angelptm
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import NONE, Kind
from angelptm.engine import Engine
from angelptm.errors import AngelPTMError, CheckpointError, CorruptPageError


class Adapted(nn.Module):
    """A frozen layer beside one that is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(64, width, bias=False)
        self.base.weight.requires_grad_(False)
        self.head = nn.Linear(width, 30)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(inputs))


def engine_of(folder: Path, **keys: Any) -> Engine:
    torch.manual_seed(1)
    width = keys.pop("width", 640)
    config: dict[str, Any] = {
        "tiers": {"device": "4MiB", "host": "8MiB", "ssd": [{"path": str(folder / "ssd")}]},
        "page_size": "64KiB",
        "placement": {"param": "device", "states": "ssd"},
        "optimizer": {"type": "adamw", "lr": 1e-2},
        "checkpoint": {"folder": str(folder / "run"), "keep": keys.pop("keep", 1)},
        "io": {"deadline_seconds": keys.pop("deadline", 30.0)},
    }
    return angelptm.initialize(Adapted(width), {**config, **keys})


def train(engine: Engine, seed: int) -> None:
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    engine.backward(engine(inputs).square().mean())
    engine.step()


def frozen_of(folder: Path, step: int) -> torch.Tensor:
    with (
        CheckpointFolder.read(folder / "run") as opened,
        opened.hold(step) as manifest,
        CommitReader(manifest, [folder / "ssd"]) as reader,
    ):
        return torch.from_numpy(reader.read("base.weight", Kind.PARAM).copy())


@pytest.mark.parametrize("placement", ["device", "host", "ssd"])
def test_frozen_parameter_changed_during_a_commit_is_in_the_next_one(tmp_path: Path, placement: str) -> None:
    engine = engine_of(tmp_path, keep=2, placement={"param": placement, "states": "ssd"})
    before = engine.state_dict()["base.weight"].flatten().clone()
    train(engine, 1)
    gate = threading.Event()
    engine.save_checkpoint(before_publish=lambda: gate.wait(10))  # type: ignore[arg-type, return-value]
    threading.Timer(0.3, gate.set).start()
    with engine.gathered("base.weight", modify=True) as values:
        values["base.weight"].data.fill_(3.0)
    train(engine, 2)
    engine.save_checkpoint(wait=True)
    assert torch.equal(frozen_of(tmp_path, 1), before)
    assert torch.equal(frozen_of(tmp_path, 2), torch.full_like(before, 3.0))
    engine.close()


def change_and_commit(engine: Engine, times: int) -> None:
    """Each commit with other frozen parameters than the one before."""
    for step in range(times):
        train(engine, step)
        engine.save_checkpoint(wait=True)
        with engine.gathered("base.weight", modify=True) as values:
            values["base.weight"].data.fill_(float(step))


def test_slots_that_changed_frozen_parameters_need_are_named_when_they_run_out(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, keep=3, width=8192, placement={"param": "device", "states": "host"})
    with pytest.raises(CheckpointError, match="frozen parameters"):
        change_and_commit(engine, 8)
    with CheckpointFolder.read(tmp_path / "run") as opened:
        assert opened.commits()
    engine.close()


def damage(folder: Path, step: int, kind: Kind) -> None:
    """Changes one byte of a page of a commit."""
    with CheckpointFolder.read(folder / "run") as opened:
        manifest = opened.load(step)
    page = manifest.pages[(manifest.pages["kind"] == kind) & (manifest.pages["file"] != NONE)][-1]
    path = folder / "ssd" / manifest.header.files[int(page["file"])].name
    with path.open("r+b") as file:
        file.seek(int(page["slot"]) * manifest.header.page_bytes)
        first = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([first[0] ^ 1]))


def test_load_that_ends_half_way_leaves_an_engine_that_neither_trains_nor_commits(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, keep=2)
    for step in (1, 2):
        train(engine, step)
        engine.save_checkpoint(wait=True)
    good = {name: value.clone() for name, value in engine.state_dict(master=True).items()}
    damage(tmp_path, 1, Kind.MASTER)
    with pytest.raises(CorruptPageError):
        engine.load_checkpoint(step=1)
    with pytest.raises(AngelPTMError, match="ended half way"):
        engine.save_checkpoint()
    with pytest.raises(AngelPTMError, match="ended half way"):
        engine.optimizer.step()
    engine.close()
    with CheckpointFolder.read(tmp_path / "run") as opened:
        assert opened.commits() == [1, 2]
    again = engine_of(tmp_path, keep=2)
    again.load_checkpoint(step=2)
    assert all(torch.equal(value, good[name]) for name, value in again.state_dict(master=True).items())
    train(again, 3)
    again.save_checkpoint(wait=True)
    again.close()


def commit_until(engine: Engine, step: int) -> None:
    for one in range(engine.global_step, step):
        train(engine, one)
        engine.save_checkpoint(wait=True)


@pytest.mark.parametrize("states", ["host", "ssd"])
def test_commit_waits_for_a_reader_whose_slots_it_needs_and_names_it(tmp_path: Path, states: str) -> None:
    engine = engine_of(tmp_path, placement={"param": "host", "states": states}, deadline=1.0)
    train(engine, 1)
    engine.save_checkpoint(wait=True)
    with CheckpointFolder.read(tmp_path / "run") as opened, opened.hold(1):
        start = time.monotonic()
        with pytest.raises(CheckpointError, match="a reader has held"):
            commit_until(engine, 6)
        assert time.monotonic() - start >= 1.0
    train(engine, 9)
    engine.save_checkpoint(wait=True)
    engine.close()


def test_engine_that_could_not_begin_leaves_no_slot_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine_of(tmp_path)
    assert not list((tmp_path / "ssd").iterdir())
    engine_of(tmp_path).close()
    assert len(list((tmp_path / "ssd").iterdir())) == 1
