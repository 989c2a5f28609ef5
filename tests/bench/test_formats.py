"""The formats benchmark and the largest model's tool run, at sizes that say nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, code: int = 0) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_every_format_has_its_bytes_and_a_rate(tmp_path: Path) -> None:
    shown = run("tools/bench/formats.py", "--small", "--folder", str(tmp_path), "--out", str(tmp_path / "out.json"))
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    sizes = {case["name"]: case["state_bytes_per_element"] for case in found["cases"]}
    assert sizes == {
        "fp32": 24.0,
        "split, fp32 moments": 20.0,
        "split, bf16 moments": 12.0,
        "split, int8 moments": 8.125,
        "fp32, int8 moments": 12.125,
    }
    for case in found["cases"]:
        assert case["state_bytes_per_s"] == pytest.approx(case["elements_per_s"] * sizes[case["name"]])
        assert case["of_the_drive"] == pytest.approx(case["state_bytes_per_s"] / found["drive_bytes_per_s"])
    assert "of the drive" in shown


def test_largest_model_trains_and_says_what_it_took(tmp_path: Path) -> None:
    options = ["--preset", "gpt2-demo", "--device", "24MiB", "--host", "64MiB", "--page", "1MiB", "--sequence", "16"]
    out = tmp_path / "out.json"
    shown = run("tools/largest.py", *options, "--steps", "2", "--folder", str(tmp_path), "--out", str(out))
    found: dict[str, Any] = json.loads(out.read_text())
    assert len(found["losses"]) == len(found["step_seconds"]) == 2
    assert all(moved["read"] > 0 and moved["written"] > 0 for moved in found["ssd_bytes"])
    assert found["peak_bytes"]["host"] <= 64 * 2**20
    assert "bytes a parameter" in shown
    assert sorted(tmp_path.iterdir()) == [out], "no pages are left"


def test_largest_model_is_planned_without_training(tmp_path: Path) -> None:
    shown = run("tools/largest.py", "--plan", "--folder", str(tmp_path))
    assert "6.66 B parameters" in shown
    assert "STATES: 25.7 GiB ssd" in shown


def test_budgets_that_are_too_small_are_refused(tmp_path: Path) -> None:
    shown = run("tools/largest.py", "--plan", "--device", "64MiB", "--folder", str(tmp_path), code=2)
    assert "tiers.device" in shown
