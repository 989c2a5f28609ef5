"""The convergence benchmark runs, at a size that says nothing about losses or speed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

# Several processes with torch and transformers.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench/convergence.py", "--small", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a table that is complete."""
    folder = tmp_path_factory.mktemp("drive")
    out = tmp_path_factory.mktemp("out") / "convergence.json"
    picture = out.with_name("convergence.png")
    done = run(["--json", "--folder", str(folder), "--out", str(out), "--plot", str(picture)])
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    assert json.loads(done.stdout) == json.loads(out.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(out.parent.iterdir()) == [out, picture]
    return out


def runs_of(out: Path) -> dict[str, dict[str, Any]]:
    return {one["mode"]: one for one in json.loads(out.read_text())["runs"]}


def test_each_run_tells_its_curve_and_its_circumstances(out: Path) -> None:
    runs = runs_of(out)
    assert runs.keys() == {"sync", "bounded-1"}
    for one in runs.values():
        assert [point["step"] for point in one["curve"]] == [0, 6, 12]
        seconds = [point["seconds"] for point in one["curve"]]
        assert seconds[0] == 0
        assert seconds == sorted(seconds)
        assert seconds[-1] == one["training_seconds"]
        assert one["validation_seconds"] > 0
        assert one["drain_seconds"] > 0
        assert 0 < one["stall_seconds"] < one["training_seconds"]
        assert one["final_validation_loss"] == one["curve"][-1]["validation_loss"] < one["curve"][0]["validation_loss"]
        assert one["tokens"] == 12 * 16
        assert one["seed"] == 1
        assert one["diverged_at"] is None
        assert len(one["config_hash"]) == 64
        assert {"cpu", "file_system"} <= one["machine"].keys()
        assert one["date"]
        assert one["commit"]


def test_modes_begin_at_the_same_values_and_lose_no_gradient(out: Path) -> None:
    sync, bounded = runs_of(out)["sync"], runs_of(out)["bounded-1"]
    assert sync["curve"][0] == bounded["curve"][0]
    assert sync["config_hash"] != bounded["config_hash"]
    assert sync["staleness"] == {}
    assert set(bounded["staleness"]) <= {"0", "1"}
    counts = bounded["gradient_counts"]
    assert counts["produced"] == counts["applied"] > 0
    assert counts["waiting"] == 0


def test_comparison_is_at_equal_tokens_and_at_equal_time(out: Path) -> None:
    found = json.loads(out.read_text())
    runs, comparison = runs_of(out), found["comparison"]
    assert found["missing"] == []
    assert comparison["seeds"] == [1]
    fastest = min(runs, key=lambda mode: runs[mode]["training_seconds"])
    assert comparison["equal_seconds"] == {"1": runs[fastest]["training_seconds"]}
    for one in comparison["modes"]:
        final, timed = one["final_loss"]["median"], one["equal_time_loss"]["median"]
        assert final == runs[one["mode"]]["final_validation_loss"]
        assert timed >= final
        assert (timed == final) == (one["mode"] == fastest)
        assert one["final_against_sync"]["median"] == final / runs["sync"]["final_validation_loss"] - 1


def test_interrupted_table_goes_on_and_sync_repeats_its_bits(out: Path, tmp_path: Path) -> None:
    found = json.loads(out.read_text())
    former = runs_of(out)
    left = tmp_path / "left.json"
    left.write_text(json.dumps({**found, "runs": [former["bounded-1"]]}))
    done = run(["--json", "--folder", str(tmp_path), "--out", str(left)])
    assert done.returncode == 0, done.stderr
    assert "bounded-1" not in done.stderr
    now = runs_of(left)
    assert now["bounded-1"] == former["bounded-1"]
    losses = [[point["validation_loss"] for point in one["curve"]] for one in (former["sync"], now["sync"])]
    assert losses[0] == losses[1]


def test_complete_table_is_shown_without_a_run_and_compared_at_its_modes_pace(out: Path) -> None:
    done = run(["--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "bounded-1" in done.stdout
    before = json.loads(out.read_text())
    assert before["pace"] is None
    done = run(["--out", str(out), "--pace", "1"])
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["runs"] == before["runs"], "they keep the times that they had"
    assert {"date", "commit", "machine"} == found["pace"]["circumstances"].keys()
    pace = found["pace"]["step_seconds"]
    assert pace.keys() == {"sync", "bounded-1"}
    assert found["comparison"]["equal_seconds"] == {"1": pytest.approx(12 * min(pace["sync"] + pace["bounded-1"]))}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--modes", "sync,bounded"], "'bounded' is not a mode"),
        (["--modes", "sync,sync"], "a mode appears twice"),
        (["--steps", "0"], "'0' is not a whole number"),
        (["--folder", "/nowhere/at/all"], "no such folder"),
    ],
)
def test_bad_argument_is_one_clear_error(arguments: list[str], said: str) -> None:
    done = run(arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_file_of_other_settings_is_refused_and_kept(out: Path) -> None:
    before = out.read_bytes()
    done = run(["--lr", "0.1", "--out", str(out)])
    assert done.returncode == 2
    assert "is of lr 0.0005, not 0.1" in done.stderr
    assert out.read_bytes() == before


def test_loss_at_equal_time_lies_on_the_line_between_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    from bench.convergence.comparison import compare

    def one(mode: str, seed: int, seconds: float, loss: float, diverged_at: int | None = None) -> dict[str, Any]:
        curve = [{"step": 0, "seconds": 0.0, "validation_loss": 6.0}]
        curve += [{"step": 10, "seconds": seconds, "validation_loss": loss}]
        return {
            "mode": mode,
            "seed": seed,
            "steps": 10,
            "training_seconds": seconds,
            "stall_seconds": 0.0,
            "drain_seconds": 0.0,
            "final_validation_loss": loss,
            "curve": curve,
            "staleness": {} if mode == "sync" else {"0": 3, "4": 1},
            "diverged_at": diverged_at,
        }

    runs = [one("sync", 1, 20.0, 2.0), one("lock-free", 1, 5.0, 2.2), one("sync", 2, 40.0, 2.0)]
    runs.append(one("lock-free", 2, 5.0, 9.0, diverged_at=3))
    comparison = compare(runs, ["sync", "lock-free"])
    assert comparison["seeds"] == [1]
    sync, lock_free = comparison["modes"]
    assert sync["equal_time_loss"] == {"median": 5.0, "min": 5.0, "max": 5.0}
    assert lock_free["equal_time_loss"]["median"] == lock_free["final_loss"]["median"] == 2.2
    assert lock_free["final_against_sync"]["median"] == pytest.approx(0.1)
    assert lock_free["staleness"] == {"mean": 1.0, "max": 4}


def test_times_at_the_measured_pace_are_steps_at_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    from bench.convergence.pace import Pace, at_pace

    curve = [{"step": step, "seconds": 9.0 * step, "validation_loss": 5.0} for step in (0, 4, 8)]
    times = {"steps": 8, "training_seconds": 72.0, "stall_seconds": 36.0, "drain_seconds": 18.0}
    runs = [{"mode": mode, **times, "curve": curve} for mode in ("sync", "lock-free")]
    assert at_pace(runs, None) == runs
    pace = Pace(10, {"sync": [0.5, 0.25, 4.0]}, {})
    assert at_pace(runs, pace) == runs, "times of both kinds do not compare"
    (sync,) = at_pace(runs[:1], pace)
    assert sync["training_seconds"] == 4.0
    assert [point["seconds"] for point in sync["curve"]] == [0.0, 2.0, 4.0]
    assert (sync["stall_seconds"], sync["drain_seconds"]) == (2.0, 1.0), "shares of the time stay"
    assert runs[0]["training_seconds"] == 72.0


def test_modes_take_turns_at_coming_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    from bench.convergence.runs import Runs

    missing = Runs({}, None).missing(["a", "b", "c"], range(1, 4))
    assert [mode for mode, _ in missing] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [seed for _, seed in missing] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_names_end_with_the_format_of_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from bench.convergence.modes import state_keys, update_keys

    assert state_keys("sync-int8") == {"exp_avg": "int8", "exp_avg_sq": "int8"}
    assert state_keys("sync-bf16") == {"exp_avg": "bf16", "exp_avg_sq": "bf16"}
    assert update_keys("sync-int8") == update_keys("sync") == {"mode": "sync"}
    assert state_keys("sync") == state_keys("lock-free") == {}
    for name in ("sync-fp8", "bounded-1-int8"):
        with pytest.raises(ValueError, match="is not a mode"):
            state_keys(name)
