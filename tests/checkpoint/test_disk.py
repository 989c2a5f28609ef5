"""Durable metadata: the old content or the new one at every instant, in an order that survives power cuts."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.folder import CheckpointFolder
from io_engine import IoError
from tests.checkpoint.conftest import in_child, tiny_commit

OLD, NEW = b"old" * 100, b"new!" * 100


class Record:
    """Notes the order of operations."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def before(self, operation: str, path: Path) -> None:
        self.calls.append((operation, path.name))

    def after(self, operation: str, path: Path) -> None:
        assert self.calls[-1] == (operation, path.name)


class Kill:
    """Ends the process without notice at the n-th call of the hook."""

    def __init__(self, at: int) -> None:
        self.left = at

    def before(self, operation: str, path: Path) -> None:
        del operation, path
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    after = before


def test_publication_is_synced_before_and_after_the_rename(tmp_path: Path) -> None:
    record = Record()
    Disk(record).publish(tmp_path / "x", NEW)
    assert record.calls == [
        ("write", "x.part"),
        ("sync_file", "x.part"),
        ("rename", "x"),
        ("sync_folder", tmp_path.name),
    ]
    assert (tmp_path / "x").read_bytes() == NEW
    assert not (tmp_path / "x.part").exists()


def test_removal_is_synced(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    record = Record()
    Disk(record).remove(tmp_path / "x")
    assert record.calls == [("remove", "x"), ("sync_folder", tmp_path.name)]
    with pytest.raises(IoError, match=r"remove .*No such file") as caught:
        Disk().remove(tmp_path / "x")
    assert (caught.value.op, caught.value.errno) == ("remove", errno.ENOENT)


def test_each_new_folder_is_synced_into_its_parent(tmp_path: Path) -> None:
    record = Record()
    Disk(record).make_folder(tmp_path / "a" / "b")
    assert record.calls == [
        ("make_folder", "a"),
        ("sync_folder", tmp_path.name),
        ("make_folder", "b"),
        ("sync_folder", "a"),
    ]
    Disk(record).make_folder(tmp_path / "a" / "b")
    assert len(record.calls) == 4
    (tmp_path / "file").touch()
    with pytest.raises(IoError, match="make_folder"):
        Disk().make_folder(tmp_path / "file" / "c")


def test_short_writes_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:7]))
    Disk().publish(tmp_path / "x", NEW)
    assert (tmp_path / "x").read_bytes() == NEW


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_failed_publication_leaves_the_old_content_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    Disk().publish(tmp_path / "x", OLD)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(IoError) as caught:
        Disk().publish(tmp_path / "x", NEW)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == OLD


def test_stale_part_is_replaced_and_a_link_in_its_place_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "x.part").symlink_to(victim)
    Disk().publish(tmp_path / "x", NEW)
    assert victim.read_bytes() == b"precious"
    (tmp_path / "x.part").write_bytes(NEW * 2)
    Disk().publish(tmp_path / "x", OLD)
    assert (tmp_path / "x").read_bytes() == OLD


@pytest.mark.parametrize("stale", [False, True], ids=["clean", "after-a-crash"])
def test_process_killed_anywhere_leaves_the_old_or_the_new_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: bool
) -> None:
    monkeypatch.setattr(Disk, "WRITE_BYTES", 64)  # 400 bytes in 7 writes
    path = tmp_path / "x"
    seen = []
    for at in range(100):
        Disk().publish(path, OLD)
        if stale:
            (tmp_path / "x.part").write_bytes(b"half")
        status = in_child(lambda at=at: Disk(Kill(at)).publish(path, NEW))  # type: ignore[misc]
        content = path.read_bytes()
        assert content in (OLD, NEW)
        seen.append(content)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0, "the hook was called more often than expected"
    renamed = seen.index(NEW)
    assert seen == [OLD] * renamed + [NEW] * (len(seen) - renamed)
    # Two calls for the stale part, each write, the sync and the rename, of which the last comes after the fact.
    assert renamed == 2 * (stale + 7 + 1 + 1) - 1
    assert len(seen) == renamed + 4, "after the rename, twice for the folder, and to the end"


def test_folder_killed_anywhere_keeps_its_commits(tmp_path: Path) -> None:
    """Publish a second commit, retire the first: at every instant at least one of them is there and whole."""
    path = tmp_path / "checkpoint"

    def work(at: int) -> None:
        with CheckpointFolder.open(path, create=True, disk=Disk(Kill(at))) as folder:
            folder.add_store_id("ab" * 16)
            folder.publish(tiny_commit(2).manifest)
            folder.retire(1)

    with CheckpointFolder.open(path, create=True) as folder:
        folder.publish(tiny_commit(1).manifest)
    found = set()
    for at in range(100):
        status = in_child(lambda at=at: work(at))  # type: ignore[misc]
        with CheckpointFolder.open(path) as folder:
            assert (folder.taken_over_from is not None) == (status != 0)
            folder.sweep()
            commits = folder.commits()
            for step in commits:
                assert folder.load(step).header.step == step
            assert not list(path.rglob("*.part"))
            found.add(tuple(commits))
            for step in commits:
                folder.retire(step)
            folder.publish(tiny_commit(1).manifest)
            assert folder.store_ids() in ([], ["ab" * 16])
            folder.forget_store_id("ab" * 16)
        if status == 0:
            break
    assert status == 0
    assert found == {(1,), (1, 2), (2,)}
