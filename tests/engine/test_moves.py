"""Where units are fetched to, and when, changes no bit; and no fetch ahead takes what is in use."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from angelptm.config import Config, load_config
from angelptm.engine import Engine

from .models import FAMILIES, GPT2, LLAMA, PLAIN, Family, loss_of
from .reference import Reference
from .test_early_updates import PATTERNS, Sometimes
from .training import PAGE, assert_same_parameters, tight_config, train_both, train_step

MOVES = ["planned", "demand", "serial"]
POISON = 0xFF  # four of them are a NaN


def config_with(model: nn.Module, folder: Path, extra_pages: int, **keys: Any) -> Config:
    """Budgets with some pages more than the least on the device and the host."""
    least = tight_config(model, folder, **keys)
    page = least.page_size
    tiers = {
        "device": least.tiers.device + extra_pages * page,
        "host": least.tiers.host + 2 * extra_pages * page,
        "ssd": [{"path": str(folder / "pages")}],
    }
    placement = {"param": "ssd", "grad": "ssd", "states": "ssd"}
    content = {"page_size": PAGE, "placement": placement, "optimizer": {"lr": 1e-2}} | keys
    return load_config({**content, "tiers": tiers})


@contextmanager
def both(model: nn.Module, folder: Path, extra_pages: int = 0, **keys: Any) -> Iterator[tuple[Engine, Reference]]:
    config = config_with(model, folder, extra_pages, **keys)
    reference = Reference(model, config)
    engine = Engine(model, config)
    try:
        yield engine, reference
    finally:
        engine.close()


def watch(engine: Engine) -> None:
    """Spoils the frames of each unit that leaves, and checks that no fetch ahead takes those of one in use."""
    residency, page = engine._residency, engine.plan.page_bytes
    evict, fetch_ahead = residency._evict, residency.fetch_ahead

    def spoil(unit: int) -> None:
        state = residency._units[unit]
        offset = state.offset
        evict(unit)
        if offset is not None:
            ctypes.memset(engine._device.address(offset * page), POISON, state.frames * page)

    def checked(unit: int) -> bool:
        in_use = [
            (other, state.offset)
            for other, state in enumerate(residency._units)
            if state.offset is not None and (state.pins > 0 or (state.in_backward and not state.finished))
        ]
        found = fetch_ahead(unit)
        assert all(residency._units[other].offset == offset for other, offset in in_use)
        return found

    residency._evict, residency.fetch_ahead = spoil, checked  # type: ignore[method-assign]


RECOMPUTE = {"keep": None, "reentrant": {"use_reentrant": True}, "recompute": {"use_reentrant": False}}


@pytest.mark.parametrize("extra_pages", [0, 3, 40])
@pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=RECOMPUTE.keys())
@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=lambda family: family.name)
def test_no_frame_that_autograd_still_reads_is_taken(
    family: Family, recompute: dict[str, bool] | None, extra_pages: int, tmp_path: Path
) -> None:
    model = family.model(use_cache=False)
    if recompute is not None:
        model.activation_checkpointing_enable(recompute)  # type: ignore[operator]
    placement = {"param": "ssd", "grad": "host", "states": "ssd"}
    with both(model, tmp_path, extra_pages, placement=placement) as (engine, reference):
        watch(engine)
        train_both(engine, reference, family, 8)
        assert_same_parameters(engine, reference)


@pytest.mark.parametrize("extra_pages", [0, 2, 10])
@pytest.mark.parametrize("recompute", [None, False], ids=["keep", "recompute"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_no_frame_is_taken_where_the_order_changes(
    pattern: Any, recompute: bool | None, extra_pages: int, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    with both(Sometimes(recompute), tmp_path, extra_pages) as (engine, reference):
        watch(engine)
        for step in range(9):
            batch = {**PLAIN.batch(step), **pattern(step)}
            found, expected = train_step(engine, [batch]), reference.train_step([batch])
            assert torch.equal(found[0], expected[0]), step
            if step % 3 == 1:
                with torch.no_grad():
                    engine(**PLAIN.batch(50))
        assert_same_parameters(engine, reference)
        if pattern is PATTERNS["skipped-layers"]:
            assert engine._planning._scheduler.off_plan_uses > 0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(FAMILIES),
    page_bytes=st.sampled_from([PAGE, 2 * PAGE]),
    extra_pages=st.integers(0, 30),
    accumulation=st.integers(1, 2),
    homes=st.tuples(*[st.sampled_from(["host", "ssd"])] * 3),
)
def test_losses_are_equal_however_units_move(
    tmp_path_factory: pytest.TempPathFactory,
    family: Family,
    page_bytes: int,
    extra_pages: int,
    accumulation: int,
    homes: tuple[str, str, str],
) -> None:
    for moves in MOVES:
        keys = {
            "execution": {"moves": moves},
            "page_size": page_bytes,
            "gradient_accumulation_steps": accumulation,
            "placement": dict(zip(("param", "grad", "states"), homes)),
        }
        folder = tmp_path_factory.mktemp("moves")
        with both(family.model(), folder, extra_pages, **keys) as (engine, reference):
            train_both(engine, reference, family, 5)
            assert_same_parameters(engine, reference)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_regular_model_is_fetched_ahead_where_the_arena_allows(family: Family, tmp_path: Path) -> None:
    with both(family.model(), tmp_path, 20) as (engine, reference):
        train_both(engine, reference, family, 4)
        before = (engine._residency.counts.on_demand, engine._planning._scheduler.off_plan_uses)
        ahead = engine._residency.counts.ahead
        train_both(engine, reference, family, 5, first=4)
        assert (engine._residency.counts.on_demand, engine._planning._scheduler.off_plan_uses) == before
        assert engine._residency.counts.off_plan == 0
        assert engine._residency.counts.ahead > ahead


def test_evaluation_with_gradients_is_counted_as_off_plan(tmp_path: Path) -> None:
    with both(PLAIN.model(), tmp_path) as (engine, reference):
        train_both(engine, reference, PLAIN, 4)
        before = engine._planning._scheduler.off_plan_uses
        loss = loss_of(engine(**PLAIN.batch(4)))
        assert torch.equal(loss_of(engine(**PLAIN.batch(60))), loss_of(reference.forward(**PLAIN.batch(60))))
        assert engine._planning._scheduler.off_plan_uses > before
        engine.backward(loss)
        engine.step()
        reference.train_step([PLAIN.batch(4)])
        train_both(engine, reference, PLAIN, 2, first=5)
        assert_same_parameters(engine, reference)


@pytest.mark.parametrize("seed", range(4))
def test_units_that_get_other_frames_between_steps_stay_exact(seed: int, tmp_path: Path) -> None:
    with both(PLAIN.model(), tmp_path, 60) as (engine, reference):
        watch(engine)
        chance, residency = random.Random(seed), engine._residency
        for step in range(8):
            train_both(engine, reference, PLAIN, 1, first=step)
            most = engine.plan.device_frames
            residency.place_at([chance.randint(0, most - state.frames) for state in residency._units])
        assert_same_parameters(engine, reference)
