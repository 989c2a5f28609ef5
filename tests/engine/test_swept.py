"""Updates that nobody waits for. With a bound of 0 they give the bits of training without pages; with any bound, no
gradient is lost, and no step computes with parameters that lack more gradients than it may."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import angelptm_native as native
import pytest
import torch
from torch import nn

from angelptm import initialize
from angelptm.config import load_config
from angelptm.engine import Engine
from angelptm.engine.sweeping import Patience
from angelptm.errors import AngelPTMError, ConfigError, NonFiniteError
from io_engine import IoError

from .conftest import MakeBoth, MakeEngine
from .models import FAMILIES, GPT2, T5, Family
from .training import assert_same_parameters, assert_same_values, snapshot, train, train_both, train_step

STATES = {"ssd": {"states": "ssd"}, "half": {"states": 0.5}, "host": {"states": "host"}}
KEYS: dict[str, dict[str, Any]] = {
    "as-it-comes": {},
    "clipped": {"gradient_clipping": 0.05},
    "accumulated": {"gradient_accumulation_steps": 3},
    "at-step": {"execution": {"updates": "forward"}},
}
ROOM = {"tight": 0, "roomy": 8 * 2**20}
MODES: dict[str, dict[str, Any]] = {
    "bounded-1": {"mode": "bounded", "max_staleness": 1, "patience": 0},
    "bounded-3": {"mode": "bounded", "max_staleness": 3, "patience": 0},
    "patient": {"mode": "bounded", "max_staleness": 3, "patience": 0.5},
    "lock-free": {"mode": "lock_free"},
}
# In which something is late in every run, so that there is something to replay.
IMPATIENT = {name: mode for name, mode in MODES.items() if name != "patient"}


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


@pytest.mark.parametrize("moments", ["fp32", "int8"])
def test_a_bound_of_zero_is_exact_in_bf16(moments: str, make_both: MakeBoth) -> None:
    states = {"exp_avg": moments, "exp_avg_sq": moments, "int8_from_elements": 0}
    engine, reference = make_both(
        GPT2.model(),
        placement=STATES["ssd"],
        update=exact(),
        precision="bf16",
        optimizer={"lr": 1e-2, "states": states},
    )
    train_both(engine, reference, GPT2, 10)
    engine.drain()
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("device", ROOM.values(), ids=ROOM.keys())
def test_patience_without_end_is_exact(make_both: MakeBoth, device: int) -> None:
    """Every use waits for what its parameters lack, and changes to them though others were fetched ahead."""
    update = {"mode": "bounded", "max_staleness": 5, "patience": 1}
    engine, reference = make_both(GPT2.model(), placement=STATES["ssd"], update=update, device=device)
    assert engine._swept is not None
    engine._swept.patience._share = 1e9
    train_both(engine, reference, GPT2, 10)
    engine.drain()
    assert_same_parameters(engine, reference)
    assert set().union(*engine.staleness()) == {0}


def test_patience_is_a_share_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("angelptm.engine.sweeping.time.perf_counter", lambda: now)
    patience = Patience(0.05)
    assert patience.left == 0.0
    now = 14.0
    patience.begin_step()
    assert patience.left == pytest.approx(0.2)
    patience.spend(0.15)
    assert patience.left == pytest.approx(0.05)
    patience.spend(0.15)
    assert patience.left == 0.0
    now = 15.0
    patience.begin_step()
    assert patience.left == pytest.approx(0.05)
    now = 75.0  # there was an evaluation
    patience.begin_step()
    assert patience.left == pytest.approx(0.05)


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
    engine = make_engine(GPT2.model(), placement=STATES["ssd"], update={"mode": "lock_free"}, optimizer={"lr": 2e-3})
    losses = []
    for step in range(60):
        losses += train_step(engine, [GPT2.batch(step % 2)])
        if step % 5 == 4:
            engine.drain()  # steps of a model this small can leave updates behind by any number
    assert torch.stack(losses[-10:]).mean() < 0.7 * torch.stack(losses[:10]).mean()


def _frozen_in_places() -> nn.Module:
    model = GPT2.model()
    for name, param in model.named_parameters():
        param.requires_grad_(not (".c_fc." in name or "ln_1" in name))
    return model


@pytest.mark.parametrize("device", ROOM.values(), ids=ROOM.keys())
@pytest.mark.parametrize("mode", IMPATIENT.values(), ids=IMPATIENT.keys())
def test_a_replay_gives_the_bits_of_what_was_recorded(
    mode: dict[str, Any], device: int, make_engine: MakeEngine, tmp_path: Path
) -> None:
    model, events = GPT2.model(), tmp_path / "events.json"
    keys: dict[str, Any] = {"placement": STATES["ssd"], "device": device, "io": {"deadline_seconds": 20}}
    update = {**mode, "threads": 2, "ring_depth": 3}
    slow = native.FaultPlan(seed=3, delay=0.5, delay_seconds=0.004)
    first = make_engine(copy.deepcopy(model), update={**update, "record": events}, faults=slow, **keys)
    losses = train(first, GPT2, 15)
    first.drain()
    values, lags = snapshot(first.state_dict(master=True)), first.staleness()
    first.close()
    assert set().union(*lags) > {0}, "something was late, or there is nothing to replay"
    again = make_engine(copy.deepcopy(model), update={**update, "replay": events}, **keys)
    assert torch.equal(torch.stack(train(again, GPT2, 15)), torch.stack(losses))
    again.drain()
    assert_same_values(again.state_dict(master=True), values)


def test_a_replay_that_ends_early_can_be_closed(make_engine: MakeEngine, tmp_path: Path) -> None:
    model, events = GPT2.model(), tmp_path / "events.json"
    update = {"mode": "lock_free", "threads": 1, "ring_depth": 3}
    first = make_engine(copy.deepcopy(model), placement=STATES["ssd"], update={**update, "record": events})
    train(first, GPT2, 12)
    first.close()
    again = make_engine(copy.deepcopy(model), placement=STATES["ssd"], update={**update, "replay": events})
    train(again, GPT2, 5)
    again.close()


def test_events_of_another_model_are_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    events = tmp_path / "events.json"
    update = {"mode": "lock_free", "threads": 1, "ring_depth": 2}
    first = make_engine(GPT2.model(), placement=STATES["ssd"], update={**update, "record": events})
    train(first, GPT2, 2)
    first.close()
    with pytest.raises(ConfigError, match=r"update\.replay.*units"):
        make_engine(T5.model(), placement=STATES["ssd"], update={**update, "replay": events})
    events.write_text(events.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"update\.replay"):
        make_engine(GPT2.model(), placement=STATES["ssd"], update={**update, "replay": events})


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_units_that_wait_for_the_step_can_be_looked_at_before_it(mode: dict[str, Any], make_engine: MakeEngine) -> None:
    """Their accumulators are held between backward and step, and nothing that waits there may wait for them."""
    engine = make_engine(_frozen_in_places(), placement=STATES["ssd"], update=mode, io={"deadline_seconds": 10})
    for step in range(8):
        loss = engine(**GPT2.batch(step)).loss
        engine.backward(loss)
        engine.state_dict(master=True)[engine.parameter_names()[0]]
        engine.drain()
        engine.step()
    engine.backward(engine(**GPT2.batch(9)).loss)
    engine.close()


def test_clipping_by_hand_is_of_this_steps_gradients_alone(make_both: MakeBoth) -> None:
    """With every update waiting for the step, where the norm is asked for."""
    engine, reference = make_both(
        GPT2.model(), placement=STATES["ssd"], update=exact(), execution={"updates": "forward"}
    )
    for step in range(8):
        batch = GPT2.batch(step)
        reference.backward(reference.forward(**batch).loss)
        engine.backward(engine(**batch).loss)
        assert engine.clip_grad_norm_(0.05) == reference.norm()
        engine.optimizer.zero_grad()
        reference.gradients.clear()


@pytest.mark.parametrize("device", ROOM.values(), ids=ROOM.keys())
def test_backward_computes_with_what_forward_had(
    device: int, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much was published meanwhile; here everything, by a drain."""
    slow = native.FaultPlan(seed=2, delay=0.9, delay_seconds=0.01)
    engine = make_engine(
        GPT2.model(), placement=STATES["ssd"], update={"mode": "lock_free"}, device=device, faults=slow
    )
    train(engine, GPT2, 8)
    residency, seen = engine._residency, dict[int, Any]()
    enter = residency.enter_backward

    def watched(unit: int) -> None:
        enter(unit)
        seen.setdefault(unit, residency._units[unit].held)

    monkeypatch.setattr(residency, "enter_backward", watched)
    loss = engine(**GPT2.batch(8)).loss
    forward = {unit: state.held for unit, state in enumerate(residency._units)}
    behind = engine.gradient_counts()["waiting"]
    engine.drain()
    engine.backward(loss)
    assert behind > 0, "nothing was published between the two"
    assert len(seen) > 2
    assert all(seen[unit] is forward[unit] for unit in seen)
    engine.step()


def test_an_evaluation_after_a_drain_has_every_gradient(make_engine: MakeEngine) -> None:
    engine = make_engine(GPT2.model(), placement=STATES["ssd"], update={"mode": "lock_free"}, device=ROOM["roomy"])
    train(engine, GPT2, 10)
    engine.drain()
    with torch.no_grad():
        found = engine(**GPT2.batch(3)).loss
    fresh = GPT2.model()
    fresh.load_state_dict({name: value.clone() for name, value in engine.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(found, fresh(**GPT2.batch(3)).loss)


@pytest.mark.parametrize("keys", [KEYS["as-it-comes"], KEYS["clipped"]], ids=["as-it-comes", "clipped"])
def test_a_commit_has_every_gradient_up_to_its_step_and_none_after(
    keys: dict[str, Any], make_engine: MakeEngine, tmp_path: Path
) -> None:
    """While updates lag, and training goes on while it is made: what it has is what a drain at that step would have."""
    model = GPT2.model()
    slow = native.FaultPlan(seed=5, delay=0.5, delay_seconds=0.003)
    common: dict[str, Any] = {"placement": STATES["ssd"], **keys}
    update = {"mode": "bounded", "max_staleness": 3}
    engine = make_engine(
        copy.deepcopy(model), update=update, faults=slow, checkpoint={"folder": str(tmp_path / "commits")}, **common
    )
    spans = sum(len(unit.spans) for unit in engine.plan.units)
    train(engine, GPT2, 7)
    engine.save_checkpoint()
    train(engine, GPT2, 4, first=7)
    engine.wait_for_checkpoint()
    engine.drain()
    assert engine.gradient_counts()["applied"] == 11 * spans
    engine.close()
    resumed = initialize(
        copy.deepcopy(model), {**engine.config.model_dump(mode="json"), "update": {"mode": "sync"}},
        resume=tmp_path / "commits",
    )  # fmt: skip
    assert resumed.global_step == 7
    assert set(resumed._progress.steps_of.values()) == {7}
    resumed.close()


def test_an_error_of_an_update_ends_training_and_says_why(make_engine: MakeEngine) -> None:
    faults = native.FaultPlan(seed=11, enospc=0.01)
    engine = make_engine(
        GPT2.model(), placement=STATES["ssd"], update={"mode": "lock_free"}, io={"deadline_seconds": 10}, faults=faults
    )
    with pytest.raises(IoError, match="No space left"):
        train(engine, GPT2, 200)
    assert engine.global_step > 0
    with pytest.raises(IoError):
        engine.close()


def test_a_gradient_that_is_not_finite_reaches_no_accumulator_where_all_are_looked_at_first(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(GPT2.model(), placement=STATES["ssd"], update={"mode": "lock_free"}, gradient_clipping=1.0)
    train(engine, GPT2, 5)
    before = engine.gradient_counts()["produced"]
    loss = engine(**GPT2.batch(5)).loss
    loss.register_hook(lambda gradient: gradient * float("inf"))
    engine.backward(loss)
    with pytest.raises(NonFiniteError):
        engine.step()
    assert engine.gradient_counts()["produced"] == before
    assert all(bool(torch.isfinite(loss)) for loss in train(engine, GPT2, 3))
    assert_nothing_lost(engine, 8)


def test_a_gradient_that_is_not_finite_ends_a_step_that_had_added_others(make_engine: MakeEngine) -> None:
    slow = native.FaultPlan(seed=2, delay=0.9, delay_seconds=0.02)
    engine = make_engine(GPT2.model(), placement=STATES["ssd"], update={"mode": "lock_free"}, faults=slow)
    train(engine, GPT2, 8)
    loss = engine(**GPT2.batch(5)).loss
    loss.register_hook(lambda gradient: gradient * float("inf"))
    engine.backward(loss)
    with pytest.raises(NonFiniteError, match="load the last commit"):
        engine.step()
    with pytest.raises(AngelPTMError, match="half way"):
        train(engine, GPT2, 1)


@pytest.mark.parametrize("key", ["param", "grad"])
def test_parameters_and_gradients_on_the_ssd_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"placement.{key}"):
        load_config(
            {
                "tiers": {"device": "16MiB", "host": "16MiB", "ssd": [{"path": "x"}]},
                "update": {"mode": "lock_free"},
                "placement": {key: "ssd"},
            }
        )
