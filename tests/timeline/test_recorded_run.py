"""A real run records its planned steps: what is in the file is what happened, and recording changes nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import angelptm_native as native
import pytest

from angelptm.config import Config, load_config
from angelptm.engine import Engine
from angelptm.plan import Schedule, Trace
from angelptm.timeline import Timeline, load
from angelptm.timeline.data import covered_seconds
from angelptm.timeline.figures import figures_of
from angelptm.timeline.report import render_report
from angelptm.timeline.run_files import read_run
from angelptm.train import train
from tests.train.test_disk_full import Silent

STEPS = 8
RECORDED = ("timeline.json.gz", "trace.json", "rates.json", "schedule.json")


def config(folder: Path, timeline_steps: int, steps: int = STEPS) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus").mkdir(exist_ok=True)
    (folder / "corpus" / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return load_config(
        {
            "tiers": {"device": "512KiB", "host": "1MiB", "ssd": [{"path": str(folder / "ssd")}]},
            "page_size": "64KiB",
            "placement": {"param": "ssd", "grad": "ssd", "states": "ssd"},
            "model": {"preset": "gpt2-demo", "config": {"n_layer": 3, "n_embd": 64, "n_head": 2, "n_positions": 32}},
            "data": {"path": str(folder / "corpus"), "sequence_length": 16, "validation_fraction": 0},
            "training": {"steps": steps, "sample_tokens": 0, "threads": 1},
            "execution": {"timeline_steps": timeline_steps},
            "checkpoint": {"every": 6},
            "run_dir": str(folder / "run"),
        }
    )


@dataclass
class Run:
    folder: Path
    timeline: Timeline
    losses: list[float]
    stall_seconds: dict[str, float]
    """That computing waited in the recorded steps, by cause, as the engine itself counts it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    counts: list[dict[str, float]] = []

    class Counting(Engine):
        def record_timeline(self, *args: Any, **kwargs: Any) -> Any:
            counts.append(dict(self._residency.counts.stall_seconds))
            return super().record_timeline(*args, **kwargs)

        def _take_step(self) -> None:
            was_recording = self._recording is not None
            super()._take_step()
            if was_recording and self._recording is None:
                counts.append(dict(self._residency.counts.stall_seconds))

    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("angelptm.train.run.Engine", Counting)
        slow = native.FaultPlan(delay=1.0, delay_seconds=0.01)  # so that computing must wait for the drive
        result = train(config(folder, 3), Silent(), faults=slow)
    before, after = counts
    stalls = {cause: seconds - before.get(cause, 0.0) for cause, seconds in after.items()}
    return Run(folder / "run", load(folder / "run" / RECORDED[0]), result.losses, stalls)


def test_planned_steps_are_recorded(run: Run) -> None:
    assert [step.number for step in run.timeline.steps] == [5, 6, 7]
    assert run.timeline.dropped == {}
    Trace.load(run.folder / "trace.json")
    Schedule.load(run.folder / "schedule.json")


def test_every_thread_has_its_lane(run: Run) -> None:
    kinds = {lane.name: lane.kind for lane in run.timeline.lanes}
    assert kinds["compute"] == "compute"
    assert {kinds[name] for name in kinds if re.fullmatch(r"updater \d+", name)} == {"updater"}
    assert {"fetcher", "fetcher: reads", "updater 0: reads", "updater 0: writes", "gradient copy"} <= kinds.keys()
    used = {event.lane for event in run.timeline.events}
    assert kinds.keys() - used <= {"stalls"}
    assert any(event.lane.startswith("commit") for event in run.timeline.events)


def test_computing_lies_within_its_step(run: Run) -> None:
    compute = [event for event in run.timeline.events if event.lane == "compute"]
    for step in run.timeline.steps:
        found = [event for event in compute if step.start_s <= event.start_s < step.end_s]
        assert {event.args["phase"] for event in found} == {"forward", "backward", "step"}
        assert all(event.end_s <= step.end_s + 1e-9 for event in found)
        assert {f"{phase} transformer.h.{block}" for phase in ("forward", "backward") for block in range(3)} <= {
            event.name for event in found
        }
        # Uses follow each other without overlap; what lies between them is the loss and the caller's.
        assert all(one.end_s <= two.start_s + 1e-9 for one, two in pairwise(found))
        assert covered_seconds(found, step) > 0.5 * step.seconds
    assert all(any(s.start_s <= event.start_s < s.end_s for s in run.timeline.steps) for event in compute)


def test_native_events_carry_the_names_of_units_and_kinds(run: Run) -> None:
    named = {event.name for event in run.timeline.events}
    units = r"transformer\.(wte|wpe|h\.\d|ln_f)"
    for lane, what, pattern in (
        (r"updater \d+", "update", rf"update {units}(, span \d+ of \d+)?"),
        (r"updater \d+", "check", rf"check states of {units}(, span \d+ of \d+)?"),
        (r"updater \d+: reads", "read", rf"read states of {units}(, span \d+ of \d+)?"),
        (r"updater \d+: writes", "write", rf"write states of {units}(, span \d+ of \d+)?"),
        (r"fetcher", "copy", rf"copy PARAM of {units}"),
        (r"fetcher: reads", "read", rf"read PARAM of {units}"),
        (r"engine: writes", "write", rf"write GRAD of {units}"),
    ):
        found = [e for e in run.timeline.events if re.fullmatch(lane, e.lane) and e.what == what]
        assert found, (lane, what)
        assert all(re.fullmatch(pattern, event.name) for event in found), {event.name for event in found}
    assert "update transformer.h.0, span 1 of 4" in named


def test_stalls_add_up_to_what_the_engine_counts(run: Run) -> None:
    found: dict[str, float] = {}
    for event in run.timeline.events:
        if event.lane == "stalls":
            assert event.cause in ("fetch", "update")
            assert event.args["unit"].startswith("transformer")
            found[event.name] = found.get(event.name, 0.0) + event.seconds
    counted = {cause: seconds for cause, seconds in run.stall_seconds.items() if seconds}
    assert found == pytest.approx(counted, abs=1e-6)
    assert found, "the drive keeps so small a model waiting"


def test_traffic_is_what_the_schedule_says(run: Run) -> None:
    measured, planned = run.timeline.facts["traffic_bytes"], Schedule.load(run.folder / "schedule.json").traffic
    for kind in ("MASTER", "EXP_AVG", "EXP_AVG_SQ"):
        for link in ("ssd_read", "ssd_written"):
            assert measured[kind][link] == pytest.approx(planned[kind][link], rel=0.4), (kind, link)
    assert measured["GRAD"]["device_to_host"] == planned["GRAD"]["device_to_host"]


def test_occupancy_stays_within_the_budgets(run: Run) -> None:
    budgets = run.timeline.facts["budget_bytes"]
    assert {counter.name for counter in run.timeline.counters} == {"device", "host", "ssd"}
    for counter in run.timeline.counters:
        assert counter.unit == "bytes"
        assert 0 < max(value for _, value in counter.samples) <= budgets[counter.name]
        assert all(any(step.start_s <= at <= step.end_s for at, _ in counter.samples) for step in run.timeline.steps)


def test_recording_changes_no_loss_and_none_leaves_no_file(run: Run, tmp_path: Path) -> None:
    result = train(config(tmp_path, 0), Silent())
    assert result.losses == run.losses
    assert not [name for name in (*RECORDED, "prediction.json") if (tmp_path / "run" / name).exists()]


@pytest.mark.parametrize(("steps", "recorded"), [(2, [1, 2]), (5, [3, 4, 5])])
def test_shorter_run_records_its_last_steps(tmp_path: Path, steps: int, recorded: list[int]) -> None:
    train(config(tmp_path, 3, steps), Silent())
    assert [step.number for step in load(tmp_path / "run" / RECORDED[0]).steps] == recorded


def test_resumed_run_replaces_what_was_recorded(tmp_path: Path) -> None:
    train(config(tmp_path, 2, 6), Silent())
    train(config(tmp_path, 2, 9), Silent(), resume=True)
    assert [step.number for step in load(tmp_path / "run" / RECORDED[0]).steps] == [8, 9]


def test_command_reports_the_run(run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "angelptm.cli.main", "trace", str(run.folder), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Busiest is" in done.stdout
    assert json.loads((tmp_path / "timeline.perfetto.json").read_text())["traceEvents"]
    assert (tmp_path / "report.html").exists()


def plan_with(run: Run, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "angelptm.cli.main", "plan", str(run.folder / "config.yaml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_plan_says_what_a_step_of_the_run_would_take_under_other_budgets(run: Run) -> None:
    same, larger = (
        json.loads(plan_with(run, "--trace", str(run.folder), "--json", "--set", f"tiers.host={host}").stdout)
        for host in ("1MiB", "64MiB")
    )
    assert same["prediction"]["step_seconds"] > 0
    assert same["units"] == larger["units"]
    # Of parameters, what the updater hands over is not read; how much that is depends on the plan.
    traffic = [found["prediction"]["traffic"] for found in (same, larger)]
    read = [sum(links["ssd_read"] for kind, links in found.items() if kind != "PARAM") for found in traffic]
    assert read[0] == read[1] > 0, "the run's placement says ssd"
    home = plan_with(run, "--trace", str(run.folder), "--set", "tiers.host=64MiB", "--set", "placement.states=host")
    assert home.returncode == 0, home.stderr
    assert "bottleneck" in home.stdout
    assert "fits" in home.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "precision=bf16"], r"parameters of 4 bytes, expected those of precision bf16\. Name a run of"),
        (["--set", "tiers.host=64KiB"], r"host"),
    ],
)
def test_plan_that_cannot_be_made_from_the_run_says_why(run: Run, arguments: list[str], message: str) -> None:
    done = plan_with(run, "--trace", str(run.folder), *arguments)
    assert done.returncode == 2
    assert re.search(message, " ".join(done.stderr.split())), done.stderr


def test_plan_from_a_folder_without_a_trace_says_where_one_comes_from(run: Run, tmp_path: Path) -> None:
    done = plan_with(run, "--trace", str(tmp_path))
    assert done.returncode == 2
    assert "trace.json: found no such file" in " ".join(done.stderr.split())
    assert "Name the run_dir" in " ".join(done.stderr.split())


def test_report_names_units_and_moves(run: Run) -> None:
    found = read_run(run.folder)
    html = render_report(found, figures_of(found))
    assert "fetch transformer.h.1, " in html
    assert "order of updates" in html
    assert "matmul at " in html
    assert "device to host" in html
