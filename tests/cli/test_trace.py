"""``angelptm trace``: two files and a summary, or one message that says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.timeline.runs import EVIL, make_run, make_ugly_run

from .conftest import Outcome


def test_trace_writes_both_files_and_says_what_took_the_time(angelptm: Callable[..., Outcome], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    done = angelptm("trace", str(run), "--step", "2")
    assert (done.code, done.err) == (0, "")
    assert "2.01 s" in done.out
    assert "waits for the update" in done.out
    assert "Busiest is compute" in done.out
    assert f"{run}/report.html" in done.out
    assert "Step 2 of" in (run / "report.html").read_text()
    assert json.loads((run / "timeline.perfetto.json").read_text())["traceEvents"]
    assert not list(run.glob("*.part"))


def test_out_leaves_the_run_folder_as_it_is(angelptm: Callable[..., Outcome], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    done = angelptm("trace", str(run), "--out", str(tmp_path / "new" / "folder"))
    assert done.code == 0
    assert sorted(path.name for path in run.iterdir()) == before
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["report.html", "timeline.perfetto.json"]


def test_errors_are_one_message(angelptm: Callable[..., Outcome], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for arguments, text in (
        ([str(tmp_path / "none")], "found no such folder, expected the folder of a run"),
        ([str(tmp_path)], "timeline.json.gz: found no such file, expected the timeline of a run"),
        ([str(run), "--step", "77"], "found no step 77, expected one of the recorded steps: 1, 2, 3, 4"),
        ([str(run), "--out", str(run / "plan.json")], "File exists"),
    ):
        done = angelptm("trace", *arguments)
        assert done.code == 2
        assert done.err.startswith("error: ")
        assert text in done.err
        assert done.out == ""


def test_names_cannot_move_the_cursor(angelptm: Callable[..., Outcome], tmp_path: Path) -> None:
    done = angelptm("trace", str(make_ugly_run(tmp_path / "run")))
    assert done.code == 0
    assert EVIL not in done.out
    assert "\x1b[31m" not in done.out


def test_command_imports_no_torch() -> None:
    code = "import sys, angelptm.cli.trace; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import sys, angelptm.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
