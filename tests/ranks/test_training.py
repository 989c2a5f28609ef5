"""Several ranks train as one does at the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.models import FAMILIES
from tests.engine.training import tight_config

from .spawn import run_ranks
from .work import Trained, meet_infinity, train_family

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


@pytest.mark.parametrize(("shard", "copies"), [(2, 2), (1, 4)])
def test_copies_of_the_model_stay_alike(tmp_path: Path, shard: int, copies: int) -> None:
    """Sharded among some ranks and copied among the others, with clipping and accumulation."""
    keys: dict[str, Any] = {"gradient_clipping": 0.5, "gradient_accumulation_steps": 2}
    alone = both(tmp_path, "gpt2", [1], **keys)[1][0]
    found = both(tmp_path, "gpt2", [shard * copies], distributed={"shard": shard}, **keys)[shard * copies]
    for trained in found:
        assert_alike(alone, trained)
        assert trained.losses == found[0].losses
        assert trained.norms == found[0].norms
        for one, other in zip(trained.norms, alone.norms):
            assert one is not None
            assert other is not None
            assert abs(one - other) <= 1e-5 * other
        for key, value in trained.values.items():
            assert torch.equal(value, found[0].values[key]), key


def test_each_rank_has_its_part(tmp_path: Path) -> None:
    homes = dict.fromkeys(("param", "grad", "states"), "host")
    found = both(tmp_path, "llama", [1, 4], placement=homes)
    whole, parts = found[1][0], found[4]
    for part in parts:
        assert_alike(whole, part)
        for kind, tiers in part.kind_bytes.items():
            pages = -(-whole.kind_bytes[kind]["host"] // 2**16)
            assert tiers["host"] <= (-(-pages // 4) + 1) * 2**16, kind
    for kind, tiers in whole.kind_bytes.items():
        assert sum(part.kind_bytes[kind]["host"] for part in parts) == tiers["host"], kind


def test_pages_are_gathered_many_at_once_as_they_are_one_by_one(tmp_path: Path) -> None:
    config = tight_config(next(one for one in FAMILIES if one.name == "gpt2").model(), tmp_path)
    one_by_one = run_ranks(2, tmp_path / "one", train_family, "gpt2", config, STEPS)
    at_once = run_ranks(2, tmp_path / "many", train_family, "gpt2", config, STEPS, 4, True)
    for one, other in zip(one_by_one, at_once):
        assert one.losses == other.losses
        for key, value in one.values.items():
            assert torch.equal(value, other.values[key]), key


def test_what_is_infinite_on_one_rank_is_no_step_on_any(tmp_path: Path) -> None:
    config = tight_config(next(one for one in FAMILIES if one.name == "gpt2").model(), tmp_path)
    first, last = run_ranks(2, tmp_path / "ranks", meet_infinity, config)
    assert "not finite on another rank" in first[0]
    assert "the loss is inf" in last[0]
    assert first[1:] == last[1:] == ["4 steps"]
