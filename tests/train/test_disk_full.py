"""A disk that is full in the middle of a run: a typed error, and the last commit resumes."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from angelptm.config import Config, load_config
from angelptm.train import train
from io_engine import IoError

STEPS = 8


class Silent:
    """A reporter that shows nothing; ``at_step`` is called after each step."""

    def say(self, text: str) -> None: ...

    def begin(self, total_steps: int) -> None: ...

    def end(self) -> None: ...

    def step(self, step: int, loss: float, tokens_per_s: float, traffic: Mapping[str, Mapping[str, int]]) -> None: ...

    @contextmanager
    def working(self, what: str) -> Iterator:  # noqa: ARG002
        yield lambda *_: None


class Filler(Silent):
    """Takes all space of a folder's file system after a step."""

    def __init__(self, folder: Path, after: int) -> None:
        self._folder, self._after = folder, after

    def step(self, step: int, loss: float, tokens_per_s: float, traffic: Mapping[str, Mapping[str, int]]) -> None:
        del loss, tokens_per_s, traffic
        if step == self._after:
            with pytest.raises(OSError, match="No space left"):
                self._fill()

    def _fill(self) -> None:
        with (self._folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def config_of(run: Path, ssd: Path, corpus: Path) -> Config:
    corpus.mkdir(exist_ok=True)
    (corpus / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return load_config(
        {
            "tiers": {"device": "512KiB", "host": "1MiB", "ssd": [{"path": str(ssd)}]},
            "page_size": "64KiB",
            "placement": {"param": "ssd", "states": "ssd"},
            "optimizer": {"type": "adamw", "lr": 1e-3},
            "checkpoint": {"every": 2},
            "model": {
                "preset": "gpt2-demo",
                "config": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.1},
            },
            "data": {"path": str(corpus), "sequence_length": 32, "micro_batch_size": 2, "validation_fraction": 0},
            "training": {"steps": STEPS, "seed": 1, "threads": 1},
            "run_dir": str(run),
        }
    )


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("after", [3, 4])
def test_full_disk_stops_with_a_typed_error_and_the_last_commit_resumes(
    small_disk: Path, tmp_path: Path, after: int
) -> None:
    """The records of the run and its manifests are on the disk that fills up."""
    whole = config_of(tmp_path / "whole", tmp_path / "ssd", tmp_path / "corpus")
    train(whole, Silent())
    config = config_of(small_disk / "run", tmp_path / "ssd", tmp_path / "corpus")
    with pytest.raises(IoError) as caught:
        train(config, Filler(small_disk, after))
    assert caught.value.errno == errno.ENOSPC
    assert str(small_disk / "run") in str(caught.value)
    (small_disk / "filler").unlink()
    result = train(config, Silent(), resume=True)
    assert result.resumed_from_step is not None
    assert result.resumed_from_step >= after - after % 2 - 2
    assert losses(small_disk / "run") == losses(tmp_path / "whole")


def test_disk_without_room_for_the_slots_is_refused_at_the_start(small_disk: Path, tmp_path: Path) -> None:
    from angelptm.errors import CapacityError

    config = config_of(tmp_path / "run", small_disk / "ssd", tmp_path / "corpus")
    with pytest.raises(CapacityError) as caught:
        train(config, Silent())
    assert (caught.value.tier, caught.value.available_bytes) <= ("ssd", 4 * 2**20)
    assert "for commits" in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not list(small_disk.iterdir())
