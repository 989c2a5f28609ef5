"""What is refused changes nothing: neither by loading a commit, nor by a step after a commit has failed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import angelptm
from angelptm.engine import Engine
from angelptm.errors import CheckpointError
from io_engine import IoError


class Normed(nn.Module):
    """Linear layers around a BatchNorm, whose buffers change in training."""

    def __init__(self, features: int = 24) -> None:
        super().__init__()
        self.inside = nn.Linear(16, 24)
        self.norm = nn.BatchNorm1d(24)
        self.register_buffer("seen", torch.zeros(features))
        self.outside = nn.Linear(24, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.outside(self.norm(self.inside(inputs)))


def engine_of(tmp_path: Path, **model: int) -> Engine:
    torch.manual_seed(1)
    config: dict[str, Any] = {
        "tiers": {"device": "512KiB", "host": "2MiB", "ssd": [{"path": str(tmp_path / "ssd")}]},
        "page_size": "64KiB",
        "placement": {"states": "ssd"},
        "optimizer": {"type": "adamw", "lr": 1e-2},
        "checkpoint": {"folder": str(tmp_path / "checkpoint")},
    }
    return angelptm.initialize(Normed(**model), config)


def backward(engine: Engine, seed: int) -> None:
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    engine.backward(engine(inputs).square().mean())


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.state_dict(master=True).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_commit_with_other_buffers_is_refused_before_any_page_changes(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    backward(engine, 1)
    engine.step()
    engine.save_checkpoint(wait=True)
    engine.close()
    other = engine_of(tmp_path, features=25)
    backward(other, 2)
    before = masters(other)
    with pytest.raises(CheckpointError, match="buffer seen"):
        other.load_checkpoint(tmp_path / "checkpoint")
    assert same(masters(other), before)
    other.step()  # its gradients are still there
    assert not torch.equal(masters(other)["outside.weight"], before["outside.weight"])
    other.close()


def test_step_that_meets_the_error_of_a_commit_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, straight = engine_of(tmp_path / "a"), engine_of(tmp_path / "b")
    for one in (engine, straight):
        backward(one, 1)
        one.step()

    def full(*_: object) -> None:
        raise IoError("write", "manifest", 0, 1, 28)

    with monkeypatch.context() as patch:
        patch.setattr(type(engine._commits.durable.folder), "publish", full)  # type: ignore[union-attr]
        engine.save_checkpoint()
        cut = engine._commits._cut  # type: ignore[union-attr]
        while not cut.done:  # type: ignore[union-attr]
            time.sleep(0.01)
    backward(engine, 2)
    backward(straight, 2)
    with pytest.raises(IoError):
        engine.step()
    engine.step()
    straight.step()
    engine.drain()
    straight.drain()
    assert engine.global_step == straight.global_step
    assert same(masters(engine), masters(straight))
    engine.close()
    straight.close()
