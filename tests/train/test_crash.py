"""Runs that are killed, or lose power, at any operation around a commit resume from it bit by bit."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.slot_files import slot_file_bytes
from angelptm.config import Config
from angelptm.train.folder import RunFolder

TOOL = Path(__file__).parents[2] / "tools" / "crash_test.py"
MEMORY = Path("/dev/shm")


@pytest.mark.slow
def test_killed_runs_equal_uninterrupted_ones_and_broken_rules_are_noticed(tmp_path: Path) -> None:
    """One process for all, since it takes longer to import torch than to kill a dozen runs."""
    results = tmp_path / "results.json"
    # Flushes cost nothing in memory, and what a power cut takes is simulated anyway.
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as folder:
        done = subprocess.run(
            [sys.executable, TOOL, "--small", "--prove", "--folder", folder, "--json", results],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    total = found["results"][-1]
    assert total["failures"] == 0
    assert total["from_commit"] > 30
    modes = {(row["mode"], row["moments"]) for row in found["results"]}
    assert {(mode, what) for mode in ("kill", "power-cut") for what in ("names", "random")} <= modes
    assert len(found["cases_until_broken_rule_was_noticed"]) >= 6


class Order:
    """Operations on files of one folder, as they happen."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def before(self, operation: str, path: Path) -> None: ...

    def after(self, operation: str, path: Path) -> None:
        self.done.append(f"{operation} {path.name}")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tiers={"device": "8MiB", "host": "8MiB"}, run_dir=str(tmp_path / "run"))


def test_metrics_and_their_name_are_durable_when_sync_returns(tmp_path: Path, config: Config) -> None:
    order = Order()
    folder = RunFolder(tmp_path / "run", Disk(order))
    folder.keep(config, {})
    named = order.done.index("rename metrics.jsonl")
    assert order.done[named - 1] == "sync_file metrics.jsonl.part"
    assert order.done[named + 1] == "sync_folder run"
    assert f"sync_folder {tmp_path.name}" in order.done  # the run folder's own name
    folder.record({"step": 1})
    folder.sync()
    assert order.done[-1] == "sync_file metrics.jsonl"
    folder.close()


def test_checkpoint_folder_whose_making_was_interrupted_takes_no_space(tmp_path: Path) -> None:
    """Every start asks for it before it makes what is missing."""
    for made in (".", "commits"):
        (tmp_path / "checkpoint" / made).mkdir(parents=True, exist_ok=True)
        assert slot_file_bytes(tmp_path / "checkpoint", [tmp_path]) == [0]


def test_unfinished_token_files_of_a_killed_run_are_removed(tmp_path: Path, config: Config) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.tokens.mkdir()
    for name in (".tokens-0.bin.x7", "tokens-0.bin", "of-the-user"):
        (folder.tokens / name).touch()
    folder.keep(config, {})
    assert sorted(path.name for path in folder.tokens.iterdir()) == ["of-the-user", "tokens-0.bin"]
    folder.close()
