"""``angelptm train --resume``: a run goes on as if it had never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

EVERY_STEP = ["--set", "checkpoint.every=1", "--set", "schedule={type: cosine, warmup_steps: 2, min_lr_ratio: 0.1}"]


def figures(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, lr) of every line of the metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line]


def forget(run: Path, *steps: int) -> None:
    """Makes the run one that was stopped before the commits of these steps."""
    for step in steps:
        (run / f"checkpoint/commits/step-{step:012d}.manifest").unlink()


@pytest.fixture
def committed(angelptm: Callable, config_file: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """The arguments of a run of 6 steps that has all its commits, and its folder."""
    steps = ["--set", "training.steps=6", "--set", "checkpoint.keep=6"]
    arguments = ["train", str(config_file), *EVERY_STEP, *steps]
    outcome = angelptm(*arguments)
    assert outcome.code == 0, outcome.err
    return arguments, tmp_path / "run"


@pytest.mark.parametrize("last", [1, 3, 5])
def test_resumed_run_repeats_the_steps_bit_by_bit(
    angelptm: Callable, committed: tuple[list[str], Path], last: int
) -> None:
    arguments, run = committed
    uninterrupted = figures(run)
    forget(run, *range(last + 1, 7))
    outcome = angelptm(*arguments, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert f"resumed after step {last}" in outcome.err
    assert figures(run) == uninterrupted
    result = json.loads(outcome.out.strip().splitlines()[-1])
    assert result["losses"] == [loss for _, loss, _ in uninterrupted]
    assert result["resumed_from_step"] == last
    assert result["validation_loss_before"] is not None


def test_other_page_size_tiers_and_budgets_go_on_with_the_same_bits(
    angelptm: Callable, committed: tuple[list[str], Path]
) -> None:
    arguments, run = committed
    uninterrupted = figures(run)
    forget(run, 4, 5, 6)
    others = ["tiers.device=2MiB", "tiers.host=16MiB", "placement={}", "page_size=128KiB"]
    outcome = angelptm(*arguments, *(part for key in others for part in ("--set", key)), "--resume")
    assert outcome.code == 0, outcome.err
    assert "0 pages adopted in place" in outcome.out
    assert figures(run) == uninterrupted


def test_other_run_goes_on_from_a_commit_and_leaves_it_alone(
    angelptm: Callable, committed: tuple[list[str], Path], tmp_path: Path
) -> None:
    arguments, run = committed
    before = sorted((path, path.stat().st_mtime_ns) for path in (run / "checkpoint").rglob("*") if path.is_file())
    other = [*arguments, "--set", f"run_dir={tmp_path / 'other'}", "--set", "training.steps=8", "--resume", str(run)]
    outcome = angelptm(*other)
    assert outcome.code == 0, outcome.err
    assert [step for step, _, _ in figures(tmp_path / "other")] == [7, 8]
    after = sorted((path, path.stat().st_mtime_ns) for path in (run / "checkpoint").rglob("*") if path.is_file())
    assert before == after


def test_path_alone_goes_on_in_that_folder(
    angelptm: Callable, committed: tuple[list[str], Path], config_file: Path
) -> None:
    arguments, run = committed
    config_file.write_text(config_file.read_text().replace(f"run_dir: {run}\n", ""))
    outcome = angelptm(*arguments, "--set", "training.steps=7", "--resume", str(run))
    assert outcome.code == 0, outcome.err
    assert [step for step, _, _ in figures(run)] == [1, 2, 3, 4, 5, 6, 7]


def test_run_without_a_commit_starts_at_the_beginning(angelptm: Callable, config_file: Path, tmp_path: Path) -> None:
    outcome = angelptm("train", str(config_file), *EVERY_STEP, "--resume")
    assert outcome.code == 0, outcome.err
    assert [step for step, _, _ in figures(tmp_path / "run")] == [1, 2, 3]


def test_folder_with_commits_is_not_started_over(angelptm: Callable, committed: tuple[list[str], Path]) -> None:
    arguments, run = committed
    before = (run / "metrics.jsonl").read_text()
    outcome = angelptm(*arguments)
    assert outcome.code == 2
    assert "--resume" in outcome.err
    assert outcome.err.count("\n") == 1
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--resume", "NOWHERE"], "no checkpoint"),
        (["--set", "run_dir=null", "--resume"], "run_dir"),
        (["--set", "model.config={n_layer: 3, n_embd: 64, n_head: 2, n_positions: 64}", "--resume"], "another model"),
        (["--set", "optimizer={type: lion, lr: 1e-3}", "--resume"], "states of adamw"),
        (["--set", "data.sequence_length=16", "--resume"], "sequence_length"),
    ],
    ids=["no_checkpoint", "no_run_dir", "model", "optimizer", "data"],
)
def test_what_cannot_be_resumed_gets_one_message(
    angelptm: Callable, committed: tuple[list[str], Path], extra: list[str], told: str, tmp_path: Path
) -> None:
    arguments, run = committed
    before = sorted((path, path.read_bytes()) for path in (run / "checkpoint").rglob("*.manifest"))
    outcome = angelptm(*arguments, *[part.replace("NOWHERE", str(tmp_path / "nowhere")) for part in extra])
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("error:") == 1
    assert sorted((path, path.read_bytes()) for path in (run / "checkpoint").rglob("*.manifest")) == before


def test_second_process_is_refused_while_the_first_trains(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "angelptm.cli.main", "train", str(config_file), *EVERY_STEP]
    command += ["--set", "training.steps=100000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/checkpoint/commits/*.manifest")):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline, "the first commit took too long"
            time.sleep(0.1)
        second = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"process {first.pid}" in second.stderr
        first.send_signal(signal.SIGTERM)
        out, err = first.communicate(timeout=60)
    finally:
        first.kill()
    assert "is committed; --resume goes on after it" in out, (out, err)
    last = figures(tmp_path / "run")[-1][0]
    newest = max(tmp_path.glob("run/checkpoint/commits/*.manifest")).name
    assert newest == f"step-{last:012d}.manifest"


def test_run_with_commits_of_its_own_does_not_go_on_from_another_one(
    angelptm: Callable, committed: tuple[list[str], Path], tmp_path: Path
) -> None:
    arguments, run = committed
    other = [*arguments, "--set", f"run_dir={tmp_path / 'other'}"]
    assert angelptm(*other).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "other").glob("*.json*")}
    outcome = angelptm(*other, "--set", "training.steps=8", "--resume", str(run))
    assert outcome.code == 2
    assert "run_dir" in outcome.err
    assert {path: path.read_bytes() for path in (tmp_path / "other").glob("*.json*")} == before
