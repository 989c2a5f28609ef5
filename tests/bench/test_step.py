"""The step-time benchmark runs, at a size that says nothing about speed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

# A dozen processes with torch and transformers.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "tools/bench/step.py", "--small"]


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of every case that needs nothing but this project."""
    folder = tmp_path_factory.mktemp("drive")
    out = tmp_path_factory.mktemp("out") / "step.json"
    done = run(["--json", "--steps", "1", "--folder", str(folder), "--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    printed: dict[str, Any] = json.loads(done.stdout)
    assert printed == json.loads(out.read_text())
    return printed


def paged(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [case for case in found["cases"] if case["kind"] == "paged"]


def test_every_case_runs_or_says_why_not(found: dict[str, Any]) -> None:
    assert {case["name"] for case in found["cases"]} >= {
        "torch",
        "torch clipped",
        "angelptm ssd",
        "angelptm ssd clipped",
        "angelptm ssd roomy",
        "angelptm half",
        "angelptm host",
        "angelptm tiny device",
        "angelptm ssd serial",
    }
    assert all(found["left_out"].values())
    assert not found["left_out"].keys() & {case["name"] for case in found["cases"]}
    assert "deepspeed.md" in found["left_out"]["deepspeed best"]


def test_losses_of_all_cases_agree(found: dict[str, Any]) -> None:
    assert found["losses"]["problems"] == []
    for clipping in (False, True):
        exact = [case for case in paged(found) if "moments" not in case["name"]]
        losses = [case["losses"] for case in exact if case["clipping"] == clipping]
        assert losses
        assert all(one == losses[0] for one in losses)
        assert losses[0][-1] < losses[0][0]


def test_limit_is_the_longer_of_computing_and_moving(found: dict[str, Any]) -> None:
    seconds = {case["name"]: case["step_seconds"] for case in found["cases"]}
    for case in paged(found):
        torch = seconds["torch clipped" if case["clipping"] else "torch"]
        assert case["limit_seconds"] == max(torch, case["drive_seconds"]) > 0
        assert case["bound_by"] == ("drive" if case["drive_seconds"] > torch else "compute")
        assert case["of_limit"] == pytest.approx(case["step_seconds"] / case["limit_seconds"])


def test_bytes_that_are_counted_are_those_that_the_kernel_saw(found: dict[str, Any]) -> None:
    cases = {case["name"]: case for case in found["cases"]}
    states = 12 * found["work"]["parameters"]
    everything = cases["angelptm ssd"]["bytes"]["tiers"]["ssd"]
    assert everything["written"] > states
    assert cases["angelptm host"]["bytes"]["tiers"]["ssd"] == {"read": 0, "written": 0}
    assert 0.3 < cases["angelptm half"]["bytes"]["tiers"]["ssd"]["written"] / everything["written"] < 0.7
    process = cases["angelptm ssd"]["bytes"]["process"]
    if process["written"]:  # 0 where the folder is in memory
        assert process["written"] == pytest.approx(everything["written"], rel=0.05)


def test_every_number_comes_with_its_ceiling_and_its_circumstances(found: dict[str, Any]) -> None:
    for case in found["cases"]:
        assert case["peak_rss_bytes"] > 2 * case["parameters"]
        assert len(case["step_seconds_rounds"]) == found["rounds"]
        assert case["step_seconds_min"] <= case["step_seconds"] <= case["step_seconds_max"]
    assert all(len(case["config_hash"]) == 64 for case in paged(found))
    ceilings = found["ceilings"]
    for name in ("matmul_bf16_flops", "matmul_fp32_flops", "memory_bytes_per_s"):
        assert len(ceilings[name]["samples"]) == found["rounds"]
        assert ceilings[name]["median"] > 0
    rates = ceilings["drive"]["bytes_per_s_by_read_percent"]
    for case in paged(found):
        if case["ssd_read_percent"] is not None:
            assert len(rates[str(case["ssd_read_percent"])]["samples"]) >= found["rounds"]
    assert {"cpu", "torch", "commit", "file_system"} <= found["machine"].keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "angel"], "--cases angel: there are"),
        (["--rounds", "0"], "'0' is not a whole number"),
        (["--preset", "gpt5"], "invalid choice: 'gpt5'"),
        (["--sequence", "100000"], "has 256 positions"),
        (["--folder", "/nowhere/at/all"], "no such folder"),
        (["--deepspeed", "/nowhere/python"], "--deepspeed /nowhere/python: no such program"),
    ],
)
def test_bad_argument_is_one_clear_error(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = run(["--folder", str(tmp_path), *arguments])
    assert done.returncode not in (0, 1)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_worker_that_dies_is_shown_and_nothing_stays(tmp_path: Path) -> None:
    process = start(tmp_path)
    (forks,) = (one for one in psutil.Process(process.pid).children() if "forkserver" in " ".join(one.cmdline()))
    worker = max(forks.children(), key=psutil.Process.create_time)  # the other one measures ceilings
    worker.send_signal(signal.SIGINT)
    said = rest_of(process)
    assert process.returncode == 1
    assert "error: angelptm ssd: its process ended with code" in said
    assert "    KeyboardInterrupt" in said  # its last line
    assert not list(tmp_path.iterdir())
    assert not worker.is_running()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_no_process_and_no_file(sent: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path)
    process.send_signal(sent)
    assert "Traceback" not in rest_of(process)
    assert process.returncode in (130, 143)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def start(folder: Path) -> subprocess.Popen[str]:
    """A run of one case, returned in its second round."""
    arguments = [*COMMAND, "--cases", "angelptm ssd", "--rounds", "1000", "--steps", "1", "--folder", str(folder)]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    assert any(line.startswith("round 2") for line in process.stderr)
    return process


def rest_of(process: subprocess.Popen[str]) -> str:
    """What it still writes until it ends."""
    said = process.communicate(timeout=120)[1]
    assert said is not None
    return said


def test_losses_that_differ_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    from bench.step.cases import Case
    from bench.step.result import check_losses
    from bench.step.rounds import Series

    def series(name: str, kind: str, *lives: list[float]) -> Any:
        return Series(Case(name, kind, False, 0), 1, losses=list(lives))

    one = series("one", "paged", [5.0, 4.0])
    assert check_losses([one, series("torch", "resident", [5.001, 4.1])], "bf16")["problems"] == []
    for other, said in (
        (series("other", "paged", [5.0, 4.0000001]), "not bit-equal to those of one"),
        (series("other", "paged", [5.0, 4.0], [5.0, 4.0000001]), "started again"),
        (series("torch", "resident", [5.1, 4.0]), "its first loss is off by 2.0e-02"),
        (series("torch", "resident", [5.0, 5.0]), "the mean by 1.1e-01"),
        (series("torch", "resident", [5.0, float("nan")]), "not finite"),
    ):
        problems = check_losses([one, other], "bf16")["problems"]
        assert len(problems) == 1, problems
        assert said in problems[0]
