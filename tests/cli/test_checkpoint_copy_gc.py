"""copy and gc as commands: training goes on from what they leave as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from angelptm.checkpoint.folder import CheckpointFolder

from .runs import Run, continuation, run_config
from .test_checkpoint_look import first_page, in_json, spoil


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("step", [1, 2])
def test_training_goes_on_from_a_copy_bit_by_bit(
    step: int, angelptm: Callable, trained: Run, run_copy: Run, tmp_path: Path
) -> None:
    expected = continuation(
        run_config(run_copy.folder / "checkpoint", run_copy.ssd, trained.precision),
        run_copy.folder / "checkpoint",
        step,
    )
    dest = tmp_path / "dest"
    copied = in_json(angelptm, "copy", str(trained.folder), str(dest), "--step", str(step), "--ssd", str(trained.ssd))
    assert copied["step"] == step
    kinds = in_json(angelptm, "show", str(trained.folder), "--step", str(step))["kinds"].values()
    assert copied["copied_pages"] == sum(kind["pages"] - kind["never_written_pages"] for kind in kinds) > 0
    assert trained.precision == "bf16" or copied["copied_pages"] > 30, "records are fewer pages"
    assert in_json(angelptm, "verify", str(dest))["intact"]
    shutil.copytree(dest, tmp_path / "other")
    elsewhere = run_config(tmp_path / "new", tmp_path / "new-ssd", trained.precision)
    assert same(continuation(elsewhere, dest), expected)
    # The copy may also be the run's own folder, with its slots on the same drive or on another one.
    assert same(continuation(run_config(dest, dest, trained.precision), dest), expected)
    others = run_config(tmp_path / "other", tmp_path / "ssd2", trained.precision)
    assert same(continuation(others, tmp_path / "other"), expected)


@pytest.mark.parametrize("keep", [1, 2])
def test_training_goes_on_after_gc_bit_by_bit(keep: int, angelptm: Callable, run_copy: Run, tmp_path: Path) -> None:
    shutil.copytree(run_copy.folder, tmp_path / "before" / "run")
    shutil.copytree(run_copy.ssd, tmp_path / "before" / "ssd")
    (file,) = run_copy.ssd.iterdir()
    with file.open("r+b") as opened:  # as on a drive: reserved as a whole
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    blocks = file.stat().st_blocks
    arguments = ("gc", str(run_copy.folder), "--ssd", str(run_copy.ssd), "--keep", str(keep))
    wanted = in_json(angelptm, *arguments, "--dry-run")
    assert file.stat().st_blocks == blocks
    found = in_json(angelptm, *arguments)
    assert abs(found["freed_bytes"] - wanted["freed_bytes"]) <= 65536, "but for the file system's own blocks"
    assert found["kept_steps"] == [1, 2][-keep:]
    assert found["freed_bytes"] == (blocks - file.stat().st_blocks) * 512 > 0
    for step in found["kept_steps"]:
        shutil.copytree(run_copy.folder, tmp_path / f"run{step}")
        shutil.copytree(run_copy.ssd, tmp_path / f"ssd{step}")
        ours = run_config(tmp_path / f"run{step}" / "checkpoint", tmp_path / f"ssd{step}", run_copy.precision)
        before = tmp_path / "before"
        shutil.copytree(before / "run", before / f"run{step}")
        shutil.copytree(before / "ssd", before / f"ssd{step}")
        theirs = run_config(before / f"run{step}" / "checkpoint", before / f"ssd{step}", run_copy.precision)
        folders = [config.checkpoint.folder for config in (ours, theirs)]
        assert all(folder is not None for folder in folders)
        assert same(continuation(ours, folders[0], step), continuation(theirs, folders[1], step))  # type: ignore[arg-type]


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_gc_refuses_a_folder_in_use_and_says_by_whom(angelptm: Callable, run_copy: Run) -> None:
    with CheckpointFolder.open(run_copy.folder):
        outcome = angelptm("checkpoint", "gc", str(run_copy.folder), "--ssd", str(run_copy.ssd))
    assert outcome.code == 2
    assert "in use by process" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_gc_and_copy_say_what_they_did(angelptm: Callable, run_copy: Run, tmp_path: Path) -> None:
    copied = angelptm("checkpoint", "copy", str(run_copy.folder), str(tmp_path / "d"), "--ssd", str(run_copy.ssd))
    assert copied.code == 0
    assert "step 2" in copied.out
    assert "33 pages copied" in copied.out
    again = angelptm("checkpoint", "copy", str(run_copy.folder), str(tmp_path / "d"), "--ssd", str(run_copy.ssd))
    assert again.code == 2
    assert "a checkpoint in it" in again.err
    found = angelptm("checkpoint", "gc", str(run_copy.folder), "--ssd", str(run_copy.ssd), "--keep", "1")
    assert found.code == 0
    assert "removed the commit of step 1" in found.out
    assert "commits kept: 2" in found.out


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_copy_of_a_damaged_page_is_an_error_that_names_it(angelptm: Callable, run_copy: Run, tmp_path: Path) -> None:
    path, offset, record = first_page(run_copy, 2, 4)
    spoil(path, offset)
    outcome = angelptm("checkpoint", "copy", str(run_copy.folder), str(tmp_path / "d"), "--ssd", str(run_copy.ssd))
    assert outcome.code == 2
    assert f"page {record}" in outcome.err
    assert str(path) in outcome.err


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_stopped_copy_says_that_the_same_command_goes_on(trained: Run, tmp_path: Path, angelptm: Callable) -> None:
    code = (
        "import sys, time; from angelptm.checkpoint import copying; from angelptm.cli.main import main\n"
        "real = copying.CommitReader.pages\n"
        "def slow(self, indices):\n"
        "    for page in real(self, indices):\n"
        "        time.sleep(0.1); yield page\n"
        "copying.CommitReader.pages = slow\n"
        "sys.argv[0] = 'angelptm'; main()\n"
    )
    arguments = ["checkpoint", "copy", str(trained.folder), str(tmp_path / "d"), "--ssd", str(trained.ssd)]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "d").glob("*.pages")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the copy does not start"
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=30)
    assert process.returncode == 130, text
    assert "the same command goes on" in text
    assert "Traceback" not in text
    assert in_json(angelptm, *arguments[1:])["kept_pages"] > 0
    assert in_json(angelptm, "verify", str(tmp_path / "d"))["intact"]
