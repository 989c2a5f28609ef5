"""tools/gpu_check.sh where there is no GPU: it says so, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_machine_without_a_gpu_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(ROOT / "tools/gpu_check.sh"), "--out", str(out)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"error: torch sees no GPU: torch {torch.__version__}" in done.stderr
    assert not out.exists()
    assert not (ROOT / ".gpu-venv").exists()


def test_unknown_option_is_refused() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tools/gpu_check.sh"), "--weels", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "unknown option --weels" in done.stderr


def test_nothing_is_missing_where_the_project_is_installed() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools/missing.py")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
