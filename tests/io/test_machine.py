"""What a measurement says of the version that it measured."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from io_engine.machine import source_commit


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_commit_says_whether_files_have_changed_since(tmp_path: Path) -> None:
    assert source_commit(tmp_path) == "unknown"
    file = tmp_path / "file"
    file.write_text("one")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@e", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    commit = git("rev-parse", "--short", "HEAD")
    assert source_commit(tmp_path) == commit
    file.write_text("two")
    assert source_commit(tmp_path) == f"{commit}-dirty"


def test_commit_is_unknown_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_commit(Path(__file__).parent) == "unknown"
