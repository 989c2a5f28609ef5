"""Several ranks train as one does at the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.models import FAMILIES
from tests.engine.training import tight_config

from .spawn import run_ranks
from .work import Trained, train_family

STEPS = 6


def both(tmp_path: Path, name: str, counts: list[int], **keys: Any) -> dict[int, list[Trained]]:
    torch.manual_seed(0)
    model = next(one for one in FAMILIES if one.name == name).model()
    config = tight_config(model, tmp_path, **keys)
    return {count: run_ranks(count, tmp_path / f"of-{count}", train_family, name, config, STEPS) for count in counts}


def assert_alike(one: Trained, other: Trained, bound: float = 1e-6) -> None:
    for step, (found, expected) in enumerate(zip(other.losses, one.losses)):
        assert abs(found - expected) <= bound * max(1.0, abs(expected)), f"step {step}: {found} and {expected}"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_losses_are_those_of_one_rank(tmp_path: Path, name: str) -> None:
    found = both(tmp_path, name, [1, 2, 4])
    alone = found[1][0]
    for count in (2, 4):
        for trained in found[count]:
            assert_alike(alone, trained)
            assert trained.losses == found[count][0].losses
            for key, value in trained.values.items():
                assert torch.equal(value, found[count][0].values[key]), key
            for tier, size in trained.peak_bytes.items():
                assert size <= trained.planned_bytes[tier], tier
