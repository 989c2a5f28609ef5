"""One owner at a time, whoever it is and however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.errors import CheckpointError, StoreLockedError
from tests.checkpoint.conftest import in_child, tiny_commit

_HOLD = """
import sys, time
from pathlib import Path
from angelptm.checkpoint.folder import CheckpointFolder
folder = CheckpointFolder.open(Path(sys.argv[1]), create=True)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that has the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "checkpoint"), "train", "a config.yaml"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_process_is_refused_and_told_who_has_it(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    for create in (False, True):
        with pytest.raises(StoreLockedError) as caught:
            CheckpointFolder.open(tmp_path / "checkpoint", create=create)
        text = str(caught.value)
        assert f"process {other.pid} on host {os.uname().nodename} since 20" in text
        assert "train 'a config.yaml'`" in text
        assert str(tmp_path / "checkpoint") in text
    CheckpointFolder.read(tmp_path / "checkpoint").commits()  # reading goes on


def test_lock_of_a_killed_process_is_taken_over_and_reported(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    with CheckpointFolder.open(tmp_path / "checkpoint") as folder:
        assert folder.taken_over_from is not None
        assert folder.taken_over_from.pid == other.pid
    with CheckpointFolder.open(tmp_path / "checkpoint") as folder:
        assert folder.taken_over_from is None, "the one before gave it up properly"


def test_same_process_is_refused_and_the_attempt_does_not_cost_the_lock(folder: CheckpointFolder) -> None:
    link = folder.path.parent / "link"
    link.symlink_to(folder.path)
    for path in (folder.path, link):
        with pytest.raises(StoreLockedError, match=f"process {os.getpid()} "):
            CheckpointFolder.open(path)
    CheckpointFolder.read(folder.path).commits()

    def attempt() -> None:
        with pytest.raises(StoreLockedError, match=f"process {os.getppid()} "):
            CheckpointFolder.open(folder.path)

    assert in_child(attempt) == 0, "closing a second descriptor would have released the lock"
    folder.close()
    folder.close()
    CheckpointFolder.open(folder.path).close()


def test_forked_child_neither_has_nor_keeps_the_lock(tmp_path: Path) -> None:
    """The parent is killed; its child, which lives on, does not stand in the way."""
    reading, writing = os.pipe()

    def refused() -> None:
        with pytest.raises(StoreLockedError):
            CheckpointFolder.open(tmp_path)

    def parent() -> None:
        folder = CheckpointFolder.open(tmp_path, create=True)
        child = os.fork()
        if child == 0:
            try:
                with pytest.raises(AssertionError, match="parent process"):
                    folder.publish(tiny_commit().manifest)
                folder.close()  # does nothing to the parent's lock
                os.write(writing, str(os.getpid()).encode())
                time.sleep(60)
            finally:
                os.write(writing, b"0")  # nobody waits for a child that failed
                os._exit(1)
        pid = os.read(reading, 20)  # the child has done all that it was to do
        assert pid != b"0", "the child had its parent's lock"
        assert in_child(refused) == 0
        os.write(writing, pid)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(parent) == -signal.SIGKILL
    child = int(os.read(reading, 20))
    try:
        os.kill(child, 0)  # it lives
        with CheckpointFolder.open(tmp_path) as folder:
            assert folder.taken_over_from is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_forked_child_can_take_the_lock_once_its_parent_gave_it_up(folder: CheckpointFolder) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        try:
            CheckpointFolder.open(folder.path).close()
        except BaseException:
            os._exit(1)
        os._exit(0)
    folder.close()
    os.write(writing, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"pid": "x"}', b"[" * 60000, b"\xff\0", b'{"pid":1,"host":"a\\n"}'])
def test_lock_file_with_any_content_can_be_taken(tmp_path: Path, content: bytes) -> None:
    CheckpointFolder.open(tmp_path, create=True).close()
    (tmp_path / "LOCK").write_bytes(content)
    with CheckpointFolder.open(tmp_path) as folder:
        assert "process unknown" in str(folder.taken_over_from)


def test_lock_file_that_is_a_link_or_a_pipe_is_refused(tmp_path: Path) -> None:
    CheckpointFolder.open(tmp_path, create=True).close()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for make in (lambda path: path.symlink_to(victim), os.mkfifo, os.mkdir):
        (tmp_path / "LOCK").unlink()
        make(tmp_path / "LOCK")
        with pytest.raises(CheckpointError, match="no regular file"):
            CheckpointFolder.open(tmp_path)
    assert victim.read_bytes() == b"precious"
