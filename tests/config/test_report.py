"""The machine report: complete, printable, and of no effect on the folders it looks at."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from angelptm import memory
from angelptm.cli import report as subject


def test_report_has_what_a_bug_report_needs(tmp_path: Path) -> None:
    found = subject.collect_report([tmp_path, tmp_path / "not" / "yet"])
    assert {"python", "torch", "transformers", "angelptm", "angelptm_native", "kernel"} <= found["versions"].keys()
    assert isinstance(found["cpu"]["features"], list)
    assert found["cpu"]["cores_usable"] >= 1
    assert {"total_bytes", "cgroup_limit_bytes", "memlock_limit_bytes"} <= found["memory"].keys()
    assert isinstance(found["io_uring"]["available"], bool)
    assert found["io_uring"]["why"]
    assert [isinstance(facts["o_direct"], bool) for facts in found["paths"]] == [True, True]
    assert found["paths"][0]["free_bytes"] > 0
    assert isinstance(found["gpu"]["available"], bool)
    assert list(tmp_path.iterdir()) == []


def test_rendering_shows_every_fact(tmp_path: Path) -> None:
    found = subject.collect_report([tmp_path])
    text = io.StringIO()
    subject.render_report(found, Console(file=text, width=200))
    for section in ("versions", "cpu", "memory", "io_uring", "gpu"):
        for name in found[section]:
            assert f"{section}.{name}" in text.getvalue()
    assert str(tmp_path) in text.getvalue()


def test_json_option_prints_one_object(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(subject.report)
    result = CliRunner().invoke(app, ["--json", str(tmp_path)])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["paths"][0]["path"] == str(tmp_path)


def test_smallest_limit_of_the_control_groups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text("1000\n")
    (tmp_path / "memory.max").write_text("2000\n")
    read = memory.read_text
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "read_text", lambda path: "0::/a/b\n" if path.name == "cgroup" else read(path))
    assert memory.host_memory().cgroup_limit_bytes == 1000


def test_refused_io_uring_and_o_direct_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(subject.os, "open", refuse)
    works, why = subject._try_direct(tmp_path)
    assert not works
    assert why == "Invalid argument"
