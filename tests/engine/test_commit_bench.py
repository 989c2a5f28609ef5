"""The benchmark of commits runs, at a size that says nothing about speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_benchmark_compares_steps_with_and_without_commits(tmp_path: Path) -> None:
    command = [sys.executable, "tools/bench/checkpoint.py", "--small", "--json", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["ratios"]) == 2
    assert found["state_bytes"] == 12 * found["parameters"]
    assert 0 < found["commit_call_seconds"] <= found["commit_call_seconds_max"]
    assert found["torch_save_seconds"] <= found["torch_save_durable_seconds"]
    assert not list(tmp_path.iterdir())
