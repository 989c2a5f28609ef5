"""In steady state nothing is allocated: frames and slots in use are the same after every step."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from angelptm.engine import Engine

from .conftest import MakeEngine
from .models import FAMILIES, GPT2, PLAIN, Family, loss_of
from .training import batches_of, tight_config, train_step

PLACEMENTS = {
    "ssd": {"param": "ssd", "grad": "ssd", "states": "ssd"},
    "mixed": {"param": "host", "grad": "ssd", "states": 0.5},
    "device": {"param": "device", "grad": "host", "states": "ssd"},
}


def _counts(engine: Engine) -> tuple[int, int, int]:
    engine.drain()
    engine._fetcher.let_go()  # what it keeps of published pages for the next fetch
    return engine._store.host_used_count, engine._store.slot_used_count, engine._store.page_count


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_frames_and_slots_return_after_every_step(
    placement: dict[str, Any], family: Family, make_engine: MakeEngine
) -> None:
    engine = make_engine(family.model(), placement=placement, gradient_accumulation_steps=2)
    counts, peaks = [], []
    for step in range(8):
        train_step(engine, batches_of(family, engine.config, step))
        counts.append(_counts(engine))
        peaks.append(engine._store.slot_peak_count)
    assert len(set(counts[1:])) == 1, counts
    plan = engine.plan
    assert engine._store.host_used_count <= plan.ring_frames + plan.home_frames + plan.readout_frames
    # How many writes are in flight at once is a matter of timing, but never more than the plan foresaw.
    assert peaks[-1] <= engine.plan.ssd_slots


@pytest.mark.parametrize("threads", [1, 2])
def test_peak_of_slots_stops_growing(threads: int, make_engine: MakeEngine) -> None:
    """Drained after each step, so that no write of one step is in flight beside those of the next."""
    engine = make_engine(GPT2.model(), update={"threads": threads, "ring_depth": 1}, io={"queue_depth": 1})
    peaks = []
    for step in range(8):
        train_step(engine, batches_of(GPT2, engine.config, step))
        engine.drain()
        peaks.append(engine._store.slot_peak_count)
    in_flight = threads * (engine.plan.ring_frames // threads) + 1
    assert peaks[-1] <= peaks[2] + (in_flight if threads > 1 else 0), peaks


def test_evaluation_interruption_and_access_hold_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(PLAIN.model())
    for step in range(2):
        train_step(engine, batches_of(PLAIN, engine.config, step))
    before = _counts(engine)
    with torch.no_grad():
        engine(**PLAIN.batch(9))
    assert _counts(engine) == before
    dict(engine.state_dict(master=True))
    with engine.gathered("position", modify=True):
        pass
    assert _counts(engine) == before
    loss_of(engine(**PLAIN.batch(9))).backward()
    engine.optimizer.zero_grad()
    assert _counts(engine) == before


def test_leaves_are_made_once(make_engine: MakeEngine) -> None:
    engine = make_engine(GPT2.model())
    made = []
    for step in range(7):
        train_step(engine, batches_of(GPT2, engine.config, step))
        made.append([id(leaf) for leaves in engine._leaves for at in leaves._leaves.values() for leaf in at])
    assert made[4] == made[-1], "made for the first steps, which have no plan yet, and for those with a plan"
    assert engine._residency.counts.off_plan == 0, "every fetch of a plain step is at its planned place"


def test_dropped_engine_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither files, nor threads, nor the engine itself: a process may make many."""

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def use_one() -> weakref.ref[Engine]:
        engine = Engine(GPT2.model(), tight_config(GPT2.model(), tmp_path))
        for step in range(4):
            train_step(engine, [GPT2.batch(step)])
        engine.close()
        return weakref.ref(engine)

    use_one()
    gc.collect()
    files, threads = open_files(), len(os.listdir("/proc/self/task"))
    engine = use_one()
    gc.collect()
    assert engine() is None
    assert open_files() == files
    assert len(os.listdir("/proc/self/task")) == threads
