"""Updates that nobody waits for. With a bound of 0 they give the bits of training without pages; with any bound, no
gradient is lost, and no step computes with parameters that lack more gradients than it may."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from angelptm.engine import Engine

from .conftest import MakeBoth, MakeEngine
from .models import FAMILIES, GPT2, T5, Family
from .training import assert_same_parameters, train, train_both, train_step

STATES = {"ssd": {"states": "ssd"}, "half": {"states": 0.5}, "host": {"states": "host"}}
KEYS: dict[str, dict[str, Any]] = {
    "as-it-comes": {},
    "clipped": {"gradient_clipping": 0.05},
    "accumulated": {"gradient_accumulation_steps": 3},
    "at-step": {"execution": {"updates": "forward"}},
}
ROOM = {"tight": 0, "roomy": 8 * 2**20}
MODES: dict[str, dict[str, Any]] = {
    "bounded-1": {"mode": "bounded", "max_staleness": 1},
    "bounded-3": {"mode": "bounded", "max_staleness": 3},
    "lock-free": {"mode": "lock_free"},
}


def exact(**update: Any) -> dict[str, Any]:
    return {"mode": "bounded", "max_staleness": 0, **update}


def assert_nothing_lost(engine: Engine, steps: int) -> None:
    engine.drain()
    counts = engine.gradient_counts()
    spans = sum(len(unit.spans) for unit in engine.plan.units)
    assert counts == {"produced": spans * steps, "taken": spans * steps, "applied": spans * steps, "waiting": 0}


@pytest.mark.parametrize("states", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_bound_of_zero_is_exact(
    family: Family, keys: dict[str, Any], states: dict[str, Any], make_both: MakeBoth
) -> None:
    engine, reference = make_both(family.model(), placement=states, update=exact(), **keys)
    steps = 6 if family is T5 else 10
    train_both(engine, reference, family, steps)
    engine.drain()
    assert_same_parameters(engine, reference)
    assert set().union(*engine.staleness()) == {0}


def test_a_bound_of_zero_is_exact_in_bf16(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model(), placement=STATES["ssd"], update=exact(), precision="bf16")
    train_both(engine, reference, GPT2, 10)
    engine.drain()
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("device", ["tight", "roomy"])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_no_gradient_is_lost_and_none_is_later_than_it_may(
    mode: dict[str, Any], keys: dict[str, Any], device: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(GPT2.model(), placement=STATES["ssd"], update=mode, device=ROOM[device], **keys)
    assert engine.plan.params_stay == (device == "roomy")
    losses = train(engine, GPT2, 12)
    assert_nothing_lost(engine, 12)
    assert all(bool(torch.isfinite(loss)) for loss in losses)
    lags = set().union(*engine.staleness())
    if mode["mode"] == "bounded":
        assert max(lags) <= mode["max_staleness"]


def test_the_loss_falls_without_any_bound(make_engine: MakeEngine) -> None:
    engine = make_engine(GPT2.model(), placement=STATES["ssd"], update={"mode": "lock_free"})
    losses = [train_step(engine, [GPT2.batch(step % 2)])[0] for step in range(60)]
    assert torch.stack(losses[-10:]).mean() < 0.5 * torch.stack(losses[:10]).mean()
