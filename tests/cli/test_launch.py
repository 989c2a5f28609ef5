"""angelptm launch: what the machine lacks is said before anything begins, and a run that is killed goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from angelptm.cli.launch import chosen_cores, findings
from angelptm.config import load_config
from angelptm.errors import AngelPTMError

GIB = 2**30
ROOT = Path(__file__).parents[2]


def machine(**changes: Any) -> dict[str, Any]:
    """A report of one that lacks nothing; ``changes`` by section."""
    report = {
        "memory": {"available_bytes": 64 * GIB, "cgroup_limit_bytes": None, "memlock_limit_bytes": None},
        "io_uring": {"available": True, "why": ""},
        "gpu": {"available": True, "devices": ["one"], "cuda": "13.0"},
        "paths": [{"path": "/nvme", "file_system": "ext4", "o_direct": True, "o_direct_why": ""}],
    }
    for section, values in changes.items():
        if section == "paths":
            report["paths"] = values
        else:
            report[section] = {**report[section], **values}  # type: ignore[dict-item]
    return report


def config(**keys: Any) -> Any:
    base = {
        "tiers": {"device": "4GiB", "host": "32GiB", "ssd": [{"path": "/nvme"}]},
        "checkpoint": {"every": 10},
        "model": {"preset": "gpt2"},
    }
    return load_config({**base, **keys})


def test_machine_that_lacks_nothing() -> None:
    assert findings(config(), 32 * GIB, machine()) == []
    assert findings(config(device="cuda"), 32 * GIB, machine()) == []


TMPFS = [{"path": "/tmp", "file_system": "tmpfs", "o_direct": False, "o_direct_why": "Invalid argument"}]


@pytest.mark.parametrize(
    ("keys", "changes", "serious", "said"),
    [
        ({}, {"memory": {"available_bytes": 36 * GIB}}, True, "tier host: available memory is 36 GiB, .* takes 37 GiB"),
        ({}, {"memory": {"cgroup_limit_bytes": 8 * GIB}}, True, "tier host: this control group's limit is 8 GiB"),
        ({"device": "cuda"}, {"memory": {"available_bytes": 36 * GIB}}, None, ""),
        ({"device": "cuda"}, {"gpu": {"available": False}}, True, "device: cuda: torch sees no GPU"),
        ({"device": "cuda:1"}, {}, True, "device: cuda:1: this process sees 1 GPUs"),
        (
            {"device": "cuda"},
            {"memory": {"memlock_limit_bytes": GIB}},
            True,
            "locked is limited to 1 GiB, .* ulimit -l",
        ),
        ({}, {"paths": TMPFS}, False, "tier ssd: /tmp .tmpfs. does not do O_DIRECT"),
        ({}, {"io_uring": {"available": False, "why": "forbidden"}}, False, "io: no io_uring here .forbidden."),
        ({"checkpoint": {}}, {}, False, "checkpoint.every is 0: a run that dies starts anew"),
    ],
)
def test_what_is_missing_is_named(
    keys: dict[str, Any], changes: dict[str, Any], serious: bool | None, said: str
) -> None:
    found = findings(config(**keys), 32 * GIB, machine(**changes))
    if serious is None:
        assert found == []
        return
    assert [one.serious for one in found] == [serious]
    assert re.search(said, found[0].text)


def test_cores_are_those_that_are_named_or_that_are_near_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert chosen_cores("all", "cuda") is None
    assert chosen_cores("0-3,8", "cuda") == {0, 1, 2, 3, 8}
    for text in ("", "3-1", "0-16", "0..3", "none"):
        with pytest.raises(AngelPTMError, match="expected cores of 0-15"):
            chosen_cores(text, "cpu")
    assert chosen_cores("auto", "cpu") is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert chosen_cores("auto", "cuda") is None
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: {1: gpu}[index])
    monkeypatch.setattr("angelptm.cli.launch._PCI_DEVICES", tmp_path)
    assert chosen_cores("auto", "cuda:1") is None
    (tmp_path / "0000:3b:00.0").mkdir()
    (tmp_path / "0000:3b:00.0/local_cpulist").write_text("8-15,24-31\n")
    assert chosen_cores("auto", "cuda:1") == set(range(8, 16))
    (tmp_path / "0000:3b:00.0/local_cpulist").write_text("0-31\n")
    assert chosen_cores("auto", "cuda:1") is None


def small(folder: Path, **training: Any) -> Path:
    path = folder / "config.yaml"
    content = {
        "tiers": {"device": "16MiB", "host": "64MiB", "ssd": [{"path": str(folder / "ssd")}]},
        "page_size": "1MiB",
        "placement": {"states": "ssd"},
        "model": {"preset": "gpt2-demo", "config": {"n_layer": 2, "n_embd": 64, "n_head": 2}},
        "data": {"sequence_length": 32, "micro_batch_size": 1},
        "training": {"steps": 60, "eval_batches": 1, **training},
        "checkpoint": {"every": 5},
        "run_dir": str(folder / "run"),
    }
    path.write_text(yaml.safe_dump(content))
    return path


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "angelptm.cli.main", "launch", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


@pytest.mark.slow
def test_run_that_is_killed_goes_on_from_its_last_commit(tmp_path: Path) -> None:
    launched = start(str(small(tmp_path)))
    end = time.monotonic() + 120
    while not list(tmp_path.glob("run/*/commits/*.manifest")):
        assert time.monotonic() < end
        assert launched.poll() is None, launched.communicate()[0]
        time.sleep(0.01)
    (child,) = psutil.Process(launched.pid).children()
    os.kill(child.pid, signal.SIGKILL)
    said, _ = launched.communicate(timeout=180)
    assert launched.returncode == 0, said
    assert "died of SIGKILL" in said
    assert "going on from the newest commit (try 1 of 3)" in said
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert len(result["losses"]) == 60
    assert result["resumed_from_step"] >= 5


@pytest.mark.slow
def test_run_that_is_asked_to_end_is_not_started_again(tmp_path: Path) -> None:
    launched = start(str(small(tmp_path)))
    end = time.monotonic() + 120
    while not list(tmp_path.glob("run/*/commits/*.manifest")):
        assert time.monotonic() < end
        time.sleep(0.01)
    launched.terminate()
    said, _ = launched.communicate(timeout=120)
    assert launched.returncode == 130, said
    assert "going on" not in said


@pytest.mark.slow
def test_dry_run_shows_the_plan_and_begins_nothing(tmp_path: Path) -> None:
    launched = start(str(small(tmp_path)), "--cores", "0", "--dry-run")
    said, _ = launched.communicate(timeout=120)
    assert launched.returncode == 0, said
    assert "fits." in said
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "ssd").exists()


@pytest.mark.slow
def test_error_that_explains_itself_is_not_tried_again(tmp_path: Path) -> None:
    launched = start(str(small(tmp_path)), "--set", "data.path=/no/such/file", "--set", "data.kind=nanogpt")
    said, _ = launched.communicate(timeout=120)
    assert launched.returncode == 2, said
    assert "going on" not in said
    assert said.count("error:") == 1


def test_pretraining_script_names_its_sizes() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tools/pretrain_gpt3.sh"), "99b"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "found '99b', expected one of 125m 350m 1.3b 6.7b 13b 30b 175b" in done.stderr
    sizes = done.stderr.split("one of ")[1].split()
    assert {f"{size}.yaml" for size in sizes} == {path.name for path in (ROOT / "configs/gpt3").iterdir()}
