"""The benchmark of update modes runs, and says what it claims to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_mode_is_measured_beside_dram(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/bench/modes.py"), "--small", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cases = {case["name"]: case for case in found["cases"]}
    assert list(cases) == ["torch in DRAM", "sync", "bounded(1)", "bounded(4)", "lock_free"]
    dram = cases["torch in DRAM"]
    assert dram["rate_of_dram"] == 1
    for name, case in cases.items():
        assert case["step_seconds"] > 0
        ratios = [a / b for a, b in zip(dram["step_seconds_by_round"], case["step_seconds_by_round"])]
        assert case["rate_of_dram"] == pytest.approx(sorted(ratios)[len(ratios) // 2])
        assert ("staleness" in case) == name.startswith(("bounded", "lock_free"))
    assert cases["bounded(1)"]["staleness_max"] <= 1
    assert cases["bounded(4)"]["staleness_max"] <= 4
    assert list(tmp_path.iterdir()) == [], "folders are removed"


def test_bad_arguments_end_with_a_message(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/bench/modes.py"), "--folder", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "no such folder" in done.stderr
