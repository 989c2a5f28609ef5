"""The benchmark of predictions runs, at a size that says nothing about accuracy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


def test_small_run_tells_predicted_and_measured(tmp_path: Path) -> None:
    command = [sys.executable, "tools/bench/predict.py", "--small", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)["cases"]
    assert {case["group"] for case in cases} == {"calibrate", "judge"}
    for case in cases:
        assert case["measured_seconds"] > 0
        assert case["predicted_seconds"] > 0
        for told, found in case["peak_bytes"].values():
            assert told == pytest.approx(found, rel=0.1)
    assert not list(tmp_path.iterdir())
