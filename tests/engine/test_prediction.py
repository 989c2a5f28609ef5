"""What the plan says of a step, and what the step then does: bytes by link, peaks by tier; and the measured rates."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import angelptm_native as native
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from angelptm.config import load_config
from angelptm.engine import Engine
from angelptm.engine.measure import measure_rates
from angelptm.engine.optimizer import RULES
from angelptm.engine.planning import TRACED_STEPS
from angelptm.errors import CapacityError

from .models import GPT2
from .training import EVERYTHING_ON_SSD, batches_of, train, train_step

PAGE = 64 * 2**10
ON_SSD = {"param": "ssd", "states": "ssd"}
CASES: dict[str, dict[str, Any]] = {
    "ssd": {"placement": ON_SSD, "device": 20, "host": 40},
    "gradients too": {"placement": EVERYTHING_ON_SSD, "device": 20, "host": 40},
    "host": {"placement": {"param": "host", "states": "host", "grad": "host"}, "device": 14, "host": 160},
    "half": {"placement": {"param": "ssd", "states": 0.5}, "device": 14, "host": 80},
    "clipped": {"placement": ON_SSD, "device": 14, "host": 40, "gradient_clipping": 1.0},
    "tiny arena": {"placement": ON_SSD, "device": 9, "host": 40},
    "demand": {"placement": ON_SSD, "device": 14, "host": 40, "execution": {"moves": "demand"}},
    "serial": {"placement": ON_SSD, "device": 14, "host": 40, "execution": {"moves": "serial"}},
}

SLOW = native.FaultPlan(delay=1.0, delay_seconds=0.01)


def engine_of(
    folder: Path, *, device: int, host: int, page: int = PAGE, faults: native.FaultPlan | None = None, **keys: Any
) -> Engine:
    """GPT-2 in four blocks under budgets of so many pages."""
    tiers = {"device": device * page, "host": host * page, "ssd": [{"path": str(folder / "pages")}]}
    config = load_config({"page_size": page, "optimizer": {"lr": 1e-2}, "tiers": tiers, **keys})
    return Engine(GPT2.model(n_layer=4), config, faults=faults)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    engine = engine_of(tmp_path, **request.param)
    yield engine
    engine.close()


def steps(engine: Engine, count: int) -> None:
    for step in range(count):
        train_step(engine, batches_of(GPT2, engine.config, step))


def moved(engine: Engine) -> dict[str, int]:
    """So far. What the updater hands over is part of what a fetch needs from the SSD, and is not read from there; how
    much that is, is a matter of milliseconds."""
    engine.drain()
    traffic = engine.traffic()
    on_ssd = any(span.param_home == "ssd" for unit in engine.plan.units for span in unit.spans)
    handed_over = engine._traffic._fetcher.totals["handed_over_bytes"] if on_ssd else 0
    return {
        "device read": traffic["device"]["read"],
        "device written": traffic["device"]["written"],
        "ssd read": traffic["ssd"]["read"] + handed_over,
        "ssd written": traffic["ssd"]["written"],
    }


def said(prediction: dict[str, Any]) -> dict[str, int]:
    def over(link: str) -> int:
        return sum(links[link] for links in prediction["traffic_bytes"].values())

    return {
        "device read": over("device_to_host"),
        "device written": over("host_to_device"),
        "ssd read": over("ssd_read") + prediction["handed_over_bytes"],
        "ssd written": over("ssd_written"),
    }


@pytest.mark.measures
def test_nothing_is_predicted_before_the_traced_steps_are_over(engine: Engine) -> None:
    steps(engine, 2)
    assert engine.prediction() is None
    steps(engine, 1)
    prediction = engine.prediction()
    assert prediction is not None
    assert json.loads(json.dumps(prediction)) == prediction
    assert prediction["step_seconds"] > 0
    assert {"busy_seconds", "stall_seconds", "bottleneck", "second_bottleneck", "rates"} <= prediction.keys()


@pytest.mark.measures
def test_predicted_traffic_is_what_moves(engine: Engine) -> None:
    steps(engine, 6)
    before, count = moved(engine), 8
    steps(engine, count)
    after = moved(engine)
    prediction = engine.prediction()
    assert prediction is not None
    for link, size in said(prediction).items():
        found = (after[link] - before[link]) / count
        # A page or two a step may be read twice: ahead of a fetch, and again where others needed its frame.
        assert found == pytest.approx(size, rel=0.02, abs=2 * PAGE), link


@pytest.mark.measures
def test_predicted_peaks_are_what_is_held(engine: Engine) -> None:
    steps(engine, 8)
    engine.drain()
    prediction = engine.prediction()
    assert prediction is not None
    for tier, size in engine.peak_bytes().items():
        assert prediction["peak_bytes"][tier] == pytest.approx(size, rel=0.02), tier
    # What is kept free for updates in flight is enough: no slot more was ever taken.
    assert engine._store.slot_peak_count * PAGE <= engine.peak_bytes()["ssd"]


@pytest.mark.measures
def test_traced_steps_compute_alone_and_tell_computing_from_waiting(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, **CASES["ssd"], faults=SLOW)
    start = time.perf_counter()
    for step in range(TRACED_STEPS):
        assert engine.prediction() is None
        train_step(engine, batches_of(GPT2, engine.config, step))
        assert not engine._updates.pending()
    took = time.perf_counter() - start
    trace = engine._planning.trace
    assert trace is not None
    # Every transfer takes 10 ms, and of these some dozens follow each other.
    assert sum(use.seconds for use in trace.uses) < 0.5 * took / TRACED_STEPS
    steps(engine, 1)
    assert engine._updates.pending()
    engine.close()


@pytest.mark.measures
def test_what_the_drive_gave_to_the_run_goes_before_what_a_probe_finds(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, **CASES["ssd"], faults=SLOW)  # which spare the probe
    steps(engine, TRACED_STEPS)
    rates, probed = engine._planning.rates, engine._store.probe_drive(0.25)
    assert rates is not None
    assert probed is not None
    assert rates.ssd_mixed_bytes_per_s < 0.5 * probed["mixed_bytes_per_s"]
    engine.close()


@pytest.mark.measures
def test_measuring_is_short_and_changes_nothing(engine: Engine) -> None:
    steps(engine, 1)
    engine.drain()
    engine._updates.recall()
    engine._planning._parts.fetcher.let_go()
    store = engine._store

    def state() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in engine.state_dict(master=True).items()}

    content, counts = state(), (store.slot_used_count, store.host_used_count, engine.traffic()["ssd"]["written"])
    start = time.perf_counter()
    rates = measure_rates(
        store, engine.plan, engine._device, rule=RULES["adamw"], grad_dtype=torch.float32, param_dtype=torch.float32
    )
    assert time.perf_counter() - start < 2, "in well under a second, on a machine that has other work too"
    assert all(
        value > 0 for name, value in vars(rates).items() if name.endswith(("per_s", "cores", "threads", "seconds"))
    )
    assert (store.slot_used_count, store.host_used_count, engine.traffic()["ssd"]["written"]) == counts
    found = state()
    assert all(torch.equal(found[name], value) for name, value in content.items())


@pytest.mark.measures
def test_a_small_store_is_measured_with_few_bytes(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, **CASES["ssd"])
    found = engine._store.probe_drive(0.25)
    engine.close()
    assert found is not None
    assert found["slots"] <= engine.config.io.queue_depth
    # Nine bursts and one to write the slots first, each of two rounds over the slots or an eighth of the store.
    store_bytes = engine._store.slot_count * PAGE
    assert found["moved_bytes"] <= 10 * (max(2 * found["slots"] * PAGE, store_bytes / 8) + found["slots"] * PAGE)


@pytest.mark.measures
def test_a_store_without_ssd_pages_is_not_measured(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, **CASES["host"])
    assert engine._store.probe_drive(0.25) is None
    engine.close()


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    device=st.integers(9, 24),
    host=st.integers(30, 90),
    page=st.sampled_from([PAGE, 2 * PAGE]),
    lead=st.sampled_from(["auto", 1, 3]),
    clip=st.sampled_from([None, 1.0]),
    placement=st.sampled_from([ON_SSD, EVERYTHING_ON_SSD, {"states": 0.5}, {}]),
)
def test_no_plan_changes_a_loss(
    device: int, host: int, page: int, lead: Any, clip: float | None, placement: Any, tmp_path_factory: Any
) -> None:
    losses = []
    for moves in ("planned", "serial"):
        folder = tmp_path_factory.mktemp("store")
        keys = {"placement": placement, "gradient_clipping": clip, "execution": {"moves": moves, "lead": lead}}
        try:
            engine = engine_of(folder, device=device, host=host, page=page, **keys)
        except CapacityError:
            return
        losses.append(torch.stack(train(engine, GPT2, 6)))
        engine.close()
    assert torch.equal(losses[0], losses[1])
