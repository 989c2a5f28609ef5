"""angelptm plan for a described machine, and angelptm measure, which describes this one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from angelptm.config.schema import load_hardware
from angelptm.foresight.machine import all_gather_rate

from ..config.test_hardware import GPU


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "hardware.yaml").write_text(yaml.safe_dump(GPU))
    path = tmp_path / "config.yaml"
    content: dict[str, Any] = {
        "device": "cuda",
        "hardware": str(tmp_path / "hardware.yaml"),
        "tiers": {"device": "auto", "host": "1GiB", "ssd": [{"path": str(tmp_path / "ssd")}]},
        "precision": "bf16",
        "model": {"preset": "gpt2-demo"},
        "data": {"sequence_length": 64, "micro_batch_size": 2},
        "gradient_accumulation_steps": 4,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_plan_of_a_described_machine(config: Path, angelptm: Callable) -> None:
    outcome = angelptm("plan", str(config), "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["tokens_per_s"] == pytest.approx(512 / found["step_seconds"])
    assert found["prediction"]["bottleneck"]
    said = angelptm("plan", str(config)).out
    assert "tokens/s" in said
    assert "a step of 4 micro-batches" in said
    assert "device memory: " in said
    assert "of 24 GiB: pages" in said
    assert "host memory: " in said


def test_plan_that_leaves_no_room_for_activations_is_refused(config: Path, angelptm: Callable) -> None:
    hardware = config.parent / "hardware.yaml"
    hardware.write_text(yaml.safe_dump({**GPU, "device": {**GPU["device"], "memory": "800MiB"}}))
    outcome = angelptm("plan", str(config), "--set", "tiers.device=64MiB")
    assert outcome.code == 2
    assert "tier device" in outcome.err
    assert "activations" in outcome.err


def test_search_shows_a_table_and_what_to_set(config: Path, angelptm: Callable) -> None:
    said = angelptm("plan", str(config), "--search").out
    assert "recompute" in said
    assert "--set data.micro_batch_size=" in said
    found = json.loads(angelptm("plan", str(config), "--search", "--json").out)["proposals"]
    assert len(found) > 3
    assert {
        one["changes"]["gradient_accumulation_steps"] * one["changes"]["data.micro_batch_size"] for one in found
    } == {8}


def test_largest_model_is_told_with_what_stops_the_next(config: Path, angelptm: Callable) -> None:
    limits = ["--set", "tiers.host=256MiB", "--set", "tiers.ssd=[]"]
    said = angelptm("plan", str(config), "--max-scale", *limits).out
    assert "layers, 0." in said
    assert "one more does not fit" in said
    found = json.loads(angelptm("plan", str(config), "--max-scale", "--json", *limits).out)
    assert found["layers"] >= 2
    assert "tier host" in found["refusal"]


def test_search_without_rates_says_where_they_come_from(config: Path, angelptm: Callable) -> None:
    for option in ("--search", "--max-scale"):
        outcome = angelptm("plan", str(config), option, "--set", "hardware=null", "--set", "tiers.device=64MiB")
        assert outcome.code == 2
        assert "--measure" in outcome.err
    assert angelptm("plan", str(config), "--search", "--max-scale").code == 2


@pytest.mark.slow
def test_measure_writes_a_file_that_a_plan_reads(tmp_path: Path, config: Path, angelptm: Callable) -> None:
    output = tmp_path / "mine.yaml"
    outcome = angelptm("measure", "--path", str(tmp_path), "--size", "16MiB", "-o", str(output))
    assert outcome.code == 0, outcome.err
    assert "GB/s" in outcome.out
    hardware = load_hardware(output)
    assert hardware.predicts
    assert hardware.device is not None
    assert hardware.device.kind == "cpu"
    assert hardware.host is not None
    assert all(rate and rate > 1e6 for rate in hardware.host.update_elements_per_s.model_dump().values())
    assert hardware.ssd[0].latency_seconds > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "hardware.yaml", "mine.yaml"]
    outcome = angelptm("plan", str(config), "--set", f"hardware={output}", "--set", "device=cpu")
    assert outcome.code == 0, outcome.err
    assert "on CPU: " in outcome.out


def test_measure_refuses_a_folder_that_is_not_there(tmp_path: Path, angelptm: Callable) -> None:
    outcome = angelptm("measure", "--path", str(tmp_path / "none"), "-o", str(tmp_path / "hardware.yaml"))
    assert outcome.code == 2
    assert "no such folder" in outcome.err
    outcome = angelptm("measure", "--path", str(tmp_path), "--size", "1KiB", "-o", str(tmp_path / "hardware.yaml"))
    assert outcome.code == 2
    assert "error: --size 1KiB: block size" in outcome.err
    assert not (tmp_path / "hardware.yaml").exists()


@pytest.mark.slow
def test_all_gather_is_measured_among_processes() -> None:
    assert all_gather_rate("cpu", 1) is None
    rate = all_gather_rate("cpu", 2)
    assert rate is not None
    assert rate > 1e6
