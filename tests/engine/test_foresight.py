"""A step that nobody runs has the uses, gradients, activations and arithmetic of one that ran."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from angelptm.config import Config, load_config
from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of
from angelptm.foresight.step import ComputeRates, Foreseen, Roofline, Timed, activation_bytes_of, foresee
from angelptm.model.materialize import build_model

from .conftest import MakeEngine
from .models import FAMILIES, PLAIN, Family
from .training import train

RATES = ComputeRates({"fp32": 1e12, "bf16": 2e12}, 1e11, 5e11, 1 << 20, 1e-6)
WITH_LOSS = [family for family in FAMILIES if family is not PLAIN]  # PLAIN's output is a dict of its own


def shape_of(family: Family) -> dict[str, int]:
    batch = family.batch(0)
    rows, length = batch["labels"].shape
    return {"micro_batch_size": rows, "sequence_length": length}


def foreseen_of(family: Family, config: Config) -> Foreseen:
    model = family.model()
    own = load_config({**config.model_dump(mode="json"), "data": shape_of(family)})
    plan = plan_of(*lay_out(model, own), own)
    return foresee(model, own, plan, Roofline(RATES, own.precision)).repeated(own.gradient_accumulation_steps)


@pytest.mark.parametrize("family", WITH_LOSS, ids=lambda family: family.name)
@pytest.mark.parametrize(
    "keys", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=["plain", "again", "twice"]
)
def test_uses_and_gradients_are_those_of_a_run(family: Family, keys: dict[str, Any], make_engine: MakeEngine) -> None:
    engine = make_engine(family.model(), **keys)
    train(engine, family, 3)
    ran = engine._planning.trace
    assert ran is not None
    trace = foreseen_of(family, engine.config).trace
    assert [(use.site, use.phase, use.last) for use in trace.uses] == [
        (use.site, use.phase, use.last) for use in ran.uses
    ]
    assert [(one.unit, one.use) for one in trace.gradients] == [(one.unit, one.use) for one in ran.gradients]
    assert trace.layouts == ran.layouts
    assert all(use.seconds > 0 for use in trace.uses)
    assert activation_bytes_of(trace) == pytest.approx(engine.activation_bytes, rel=0.1, abs=12_000)


def config_of(folder: Path, preset: str, **keys: Any) -> Config:
    return load_config(
        {
            "tiers": {"device": "64MiB", "host": "256MiB", "ssd": [{"path": str(folder)}]},
            "model": {"preset": preset},
            "data": {"sequence_length": 64, "micro_batch_size": 2},
            **keys,
        }
    )


def made(config: Config) -> tuple[Any, Any]:
    model = build_model(config)
    return model, plan_of(*lay_out(model, config), config, buffer_bytes_of(model))


def test_arithmetic_is_six_for_each_parameter_and_token(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gpt2-demo")
    model, plan = made(config)
    found = foresee(model, config, plan, Roofline(RATES, "fp32"))
    parameters = sum(unit.layout.numel for unit in plan.units)
    # Attention comes on top; embeddings of positions multiply nothing.
    assert found.model_flops == pytest.approx(6 * parameters * 128, rel=0.1)
    again = config_of(tmp_path, "gpt2-demo", gradient_checkpointing=True)
    more = foresee(model, again, plan, Roofline(RATES, "fp32"))
    assert more.model_flops == found.model_flops, "recomputation is no part of the model's arithmetic"
    seconds = [sum(use.seconds for use in one.trace.uses) for one in (found, more)]
    assert seconds[1] > 1.1 * seconds[0]
    assert activation_bytes_of(more.trace) < activation_bytes_of(found.trace) / 2


def test_roofline_is_the_longer_of_two() -> None:
    assert RATES.seconds("fp32", 10**12, 1) == pytest.approx(1 + 1e-6)
    assert RATES.seconds("bf16", 10**12, 1) == pytest.approx(0.5 + 1e-6)
    assert RATES.seconds("fp32", 1, 10**11) == pytest.approx(1 + 1e-6)
    assert RATES.seconds("fp32", 1, 1 << 20) == pytest.approx((1 << 20) / 5e11 + 1e-6)


def test_operators_are_timed_once_for_calls_that_are_alike(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gpt2-demo")
    model, plan = made(config)
    operators = Timed(RATES, "fp32", torch.device("cpu"))
    start = time.perf_counter()
    found = foresee(model, config, plan, operators)
    assert time.perf_counter() - start < 60
    # After the two embeddings, and before the norm and the head.
    blocks = [use.seconds for use in found.trace.uses if use.phase == "forward"][2:8]
    assert max(blocks) == pytest.approx(min(blocks)), "equal blocks take equally long"
    assert 10 < len(operators._found) < 120


def test_large_operators_are_not_run(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gpt2-demo")
    model, plan = made(config)
    operators = Timed(RATES, "fp32", torch.device("cpu"), most_bytes=-1)
    found = foresee(model, config, plan, operators)
    expected = foresee(model, config, plan, Roofline(RATES, "fp32"))
    assert not operators._found
    assert found == expected


@pytest.mark.slow
def test_plan_measures_the_machine_and_foresees_a_step(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_of(tmp_path / "ssd", "gpt2-demo").model_dump(mode="json")))
    command = [sys.executable, "-m", "angelptm.cli.main", "plan", str(path), "--measure"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prediction"]["step_seconds"] > 0
    assert found["tokens_per_s"] == pytest.approx(128 / found["prediction"]["step_seconds"])
    assert found["mfu"] > 0  # of a rate that was measured while others worked: it may be above 1
    assert found["activation_bytes"] > 0
    assert found["prediction"]["peak_bytes"]["device"] <= 64 * 2**20
    assert not (tmp_path / "ssd").exists()
    assert not list(tmp_path.glob("angelptm-measure-*"))
    done = subprocess.run([*command, "--trace", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not both" in done.stderr
