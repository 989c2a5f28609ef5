"""TensorBoard reads back what the metrics say, once for each step, also of a run that was stopped and went on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from angelptm.config import Config, load_config
from angelptm.train import train
from angelptm.train.scalars import FOLDER, Scalars
from io_engine import IoError

from .test_disk_full import Silent

PART = {"loss": 3.0, "lr": 1e-3, "grad_norm": 2.0, "seconds": 0.5}


def config(folder: Path, steps: int) -> Config:
    (folder / "corpus").mkdir(exist_ok=True)
    (folder / "corpus" / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return load_config(
        {
            "tiers": {"device": "512KiB", "host": "1MiB", "ssd": [{"path": str(folder / "ssd")}]},
            "page_size": "64KiB",
            "gradient_clipping": 1.0,
            "placement": {"param": "ssd", "grad": "ssd", "states": "ssd"},
            "model": {"preset": "gpt2-demo", "config": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}},
            "data": {"path": str(folder / "corpus"), "sequence_length": 16, "validation_fraction": 0.2},
            "training": {"steps": steps, "eval_every": 2, "eval_batches": 1, "sample_tokens": 0, "threads": 1},
            "checkpoint": {"every": 2, "keep": 4},
            "run_dir": str(folder / "run"),
        }
    )


def read(run: Path) -> dict[str, dict[int, float]]:
    """tag → step → value; a step that comes twice is an error."""
    reader = EventAccumulator(str(run / FOLDER), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    reader.Reload()
    found = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        assert len({event.step for event in events}) == len(events), f"{tag} has a step twice"
        found[tag] = {event.step: event.value for event in events}
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_scalars_are_the_metrics_and_a_resume_repeats_no_step(tmp_path: Path) -> None:
    train(config(tmp_path, 5), Silent())
    run = tmp_path / "run"
    for step in (4, 5):
        (run / f"checkpoint/commits/step-{step:012d}.manifest").unlink()
    result = train(config(tmp_path, 6), Silent(), resume=True)
    assert result.resumed_from_step == 2
    found = read(run)
    lines = [line for line in metrics(run) if "loss" in line]
    assert found["loss/training"] == pytest.approx({line["step"]: line["loss"] for line in lines})
    assert list(found["loss/training"]) == [1, 2, 3, 4, 5, 6]
    assert found["optimizer/lr"] == pytest.approx({line["step"]: line["lr"] for line in lines})
    assert found["optimizer/grad_norm"] == pytest.approx({line["step"]: line["grad_norm"] for line in lines})
    assert found["speed/step_seconds"] == pytest.approx({line["step"]: line["seconds"] for line in lines})
    assert found["speed/tokens_per_s"][3] == pytest.approx(result.tokens_per_step / lines[2]["seconds"])
    assert list(found["speed/stall_seconds"]) == [1, 2, 3, 4, 5, 6]
    for step, stall in found["speed/stall_seconds"].items():
        assert stall > 0 or step % 2, "only after an evaluation the pages may be there already"
        assert stall < found["speed/step_seconds"][step]
    for tier, both in lines[-1]["bytes"].items():
        for way, total in both.items():
            assert sum(found[f"bytes/{tier}_{way}"].values()) == pytest.approx(total, rel=1e-6)
    assert sorted(found["loss/validation"]) == [0, 2, 4, 6]
    assert found["loss/validation"][6] == pytest.approx(result.validation_loss_after)


def test_run_that_starts_anew_in_the_same_folder_replaces_the_curves(tmp_path: Path) -> None:
    for steps in (3, 2):
        scalars = Scalars(tmp_path, 16, [], None)
        for step in range(1, steps + 1):
            scalars.step({"step": step, **PART})
        scalars.close()
    assert list(read(tmp_path)["loss/training"]) == [1, 2]


def fill(scalars: Scalars) -> None:
    for step in range(1, 10_000):
        scalars.step({"step": step, **PART})


def test_full_disk_is_an_error_and_leaves_whole_records(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system of a fixed size needs the right to mount")
    scalars = Scalars(small, 16, [], None)
    try:
        with pytest.raises(IoError, match="tfevents") as error:
            fill(scalars)
        assert error.value.errno == 28
        steps = list(read(small)["loss/training"])
        assert steps == list(range(1, len(steps) + 1))
        (file,) = (small / FOLDER).iterdir()
        assert file.stat().st_size == error.value.offset
    finally:
        scalars.close()
        subprocess.run(["umount", "-l", str(small)], check=True)
