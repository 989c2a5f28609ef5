"""What the arena has left when all parameters live in it keeps optimizer states, page by page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from angelptm.config import load_config
from angelptm.engine import Engine

from .models import GPT2
from .training import PAGE, train

STEPS = 4


def config_of(folder: Path, frames: int, **keys: Any) -> Any:
    return load_config(
        {
            "tiers": {
                "device": frames * PAGE,
                "host": 40 * PAGE,
                "ssd": [{"path": str(folder / "pages")}],
            },
            "page_size": PAGE,
            "optimizer": {"lr": 1e-2},
            **keys,
        }
    )


def trained(folder: Path, frames: int, **keys: Any) -> tuple[list[torch.Tensor], Engine, dict[str, int]]:
    engine = Engine(GPT2.model(), config_of(folder, frames, **keys))
    losses = train(engine, GPT2, STEPS)
    engine.drain()
    return losses, engine, engine.traffic()["ssd"]


def test_traffic_falls_page_by_page_and_losses_stay(tmp_path: Path) -> None:
    params = sum(unit.frame_count for unit in Engine(GPT2.model(), config_of(tmp_path, 200)).plan.units)
    moved, homes = [], []
    expected = None
    for extra in (0, 3, 6, 12, 200):
        losses, engine, ssd = trained(tmp_path, params + extra)
        expected = expected or losses
        assert torch.equal(torch.stack(losses), torch.stack(expected))
        moved.append(ssd["read"] + ssd["written"])
        homes.append(sum(engine.plan.kind_bytes[kind]["device"] for kind in ("MASTER", "EXP_AVG", "EXP_AVG_SQ")))
        assert engine.peak_bytes()["device"] <= (params + extra) * PAGE
        engine.close()
    assert homes == sorted(homes)
    assert homes[0] == 0 < homes[1]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] == 0 < moved[0]


@pytest.mark.parametrize("clipping", [None, 0.5])
def test_commit_of_states_on_the_device_resumes_elsewhere(tmp_path: Path, clipping: float | None) -> None:
    keys = {"checkpoint": {"folder": str(tmp_path / "commits")}, "gradient_clipping": clipping}
    losses, engine, _ = trained(tmp_path, 200, **keys)
    assert engine.plan.device_state_frames > 0
    engine.save_checkpoint(wait=True)
    straight = train(engine, GPT2, 2, first=STEPS)
    engine.close()
    for frames in (200, 30):
        resumed = Engine(GPT2.model(), config_of(tmp_path, frames, **keys), resume=tmp_path / "commits")
        assert torch.equal(torch.stack(train(resumed, GPT2, 2, first=STEPS)), torch.stack(straight)), frames
        resumed.close()
    assert len(losses) == STEPS
