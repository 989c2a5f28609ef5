"""A model whose states are ten times the budgets trains in what the budgets, the activations and Python come to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "memory.py"


def run(*arguments: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(BENCH), "--json", *arguments], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])["cases"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gpt2_medium_trains_in_its_budgets(precision: str, tmp_path: Path) -> None:
    """355 M parameters, 512 MiB host, 256 MiB device, parameters and states on SSD."""
    # Few tokens: a processor without bf16 multiplies in it for a minute as it is.
    case = ["--steps", "1", "--precision", precision, "--sequence", "8"]
    (found,) = run("--without-torch", *case, "--folder", str(tmp_path))
    assert found["budget_bytes"] == (512 + 256) * 2**20
    assert found["peak_rss_bytes"] <= found["limit_bytes"]
    assert found["peak_bytes"]["device"] <= 256 * 2**20
    assert found["peak_bytes"]["host"] <= 512 * 2**20
    assert found["bytes"]["ssd"]["written"] > 2**32  # masters and moments really went there


def test_memory_bench_compares_with_torch_on_the_same_losses(tmp_path: Path) -> None:
    paged, plain = run("--small", "--precision", "fp32", "--folder", str(tmp_path))
    assert paged["losses"] == pytest.approx(plain["losses"], rel=1e-4)
