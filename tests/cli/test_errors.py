"""Bad input: one clear message, exit code not 0, no traceback, nothing left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CASES = {
    "unknown_key": (["--set", "training.stepz=3"], ["unknown key 'training.stepz'", "did you mean 'training.steps'"]),
    "wrong_type": (["--set", "training.steps=many"], ["training.steps", "'many'", "expected"]),
    "size_without_unit_name": (["--set", "tiers.host=1XB"], ["tiers.host", "'1XB'", "512MiB"]),
    "page_size_no_power_of_two": (["--set", "page_size=100KiB"], ["page_size", "power of two"]),
    "fp16": (["--set", "precision=fp16"], ["precision", "bf16"]),
    "no_steps": (["--set", "training.steps=0"], ["training.steps", "number of optimizer steps"]),
    "unknown_preset": (["--set", "model.preset=gtp2"], ["gtp2", "gpt2"]),
    "device_too_small": (["--set", "tiers.device=64KiB"], ["tier device", "needs", "available", "Raise tiers.device"]),
    "host_too_small": (["--set", "tiers.host=256KiB"], ["tier host", "needs", "available", "Raise tiers.host"]),
    "host_too_small_without_ssd": (
        ["--set", "tiers.ssd=[]", "--set", "placement={}"],
        ["tier host", "needs", "add tiers.ssd"],
    ),
    "ssd_size_too_small": (["--set", "tiers.ssd.0.size=1MiB"], ["tier ssd", "needs", "Raise tiers.ssd[].size"]),
    "disk_too_small": (["--set", "tiers.ssd.0.size=900TiB"], ["tier ssd", "900 TiB", "Free disk space"]),
    "ssd_path_below_a_file": (["--set", "tiers.ssd.0.path=FILE/ssd"], ["tiers.ssd.0.path", "can be written"]),
    "run_dir_below_a_file": (["--set", "run_dir=FILE/run"], ["run_dir", "can be written"]),
    "missing_data": (["--set", "data.path=/no/such/corpus"], ["/no/such/corpus"]),
    "sequence_longer_than_positions": (["--set", "data.sequence_length=128"], ["data.sequence_length", "at most 64"]),
    "corrupt_token_file": (
        ["--set", "data.kind=megatron", "--set", "data.path=FILE"],
        ["data:", "plain.idx"],
    ),
    "tokens_beyond_vocabulary": (
        ["--set", "data.kind=nanogpt", "--set", "data.path=FILE"],
        ["token", "vocabulary"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_message_and_leaves_nothing(
    case: str, angelptm: Callable, config_file: Path, tmp_path: Path
) -> None:
    arguments, expected = CASES[case]
    file = tmp_path / "plain.bin"
    file.write_bytes(b"\xff\xfe" * 4000)
    arguments = [argument.replace("FILE", str(file)) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    outcome = angelptm("train", str(config_file), *arguments)
    assert outcome.code == 2
    messages = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert len(messages) == 1, outcome.err
    for part in expected:
        assert part.replace("FILE", str(file)) in messages[0]
    assert "Traceback" not in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [("tiers: [", "line"), ("", "mapping"), ("tiers: {device: 1MiB, device: 2MiB}", "device"), ("- 1", "mapping")],
    ids=["unclosed", "empty", "duplicate_key", "list"],
)
def test_malformed_config_names_the_place(text: str, expected: str, angelptm: Callable, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    outcome = angelptm("train", str(path))
    assert outcome.code == 2
    assert expected in outcome.err
    assert "Traceback" not in outcome.err


def test_missing_config_is_named(angelptm: Callable, tmp_path: Path) -> None:
    outcome = angelptm("train", str(tmp_path / "none.yaml"))
    assert outcome.code == 2
    assert "none.yaml" in outcome.err


def test_loss_that_is_no_number_stops_the_run_and_keeps_the_record(
    angelptm: Callable, config_file: Path, tmp_path: Path
) -> None:
    outcome = angelptm("train", str(config_file), "--set", "optimizer.lr=1e30", "--set", "training.steps=20")
    assert outcome.code == 2
    assert "the loss is" in outcome.err or "gradient is inf or NaN" in outcome.err
    assert "last good step" in outcome.err
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= 1
    assert not (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "ssd").iterdir())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_stopped_run_says_so_and_keeps_its_record(name: str, config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "angelptm.cli.main", "train", str(config_file), "--set", "training.steps=100000"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the run does not start"
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"stopped; what happened until then is in {tmp_path / 'run'}" in output
    assert "Traceback" not in output
    assert all(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    assert not list((tmp_path / "ssd").iterdir())


def test_unknown_command_is_an_error(angelptm: Callable) -> None:
    assert angelptm("trian").code != 0
