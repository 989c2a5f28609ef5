"""The folder of commits: what is published is found, what is kept by a reader stays, and nothing leads out of it."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.folder import CheckpointFolder, locate
from angelptm.checkpoint.format import MAX_BYTES
from angelptm.errors import CheckpointError
from tests.checkpoint.conftest import in_child, tiny_commit


def test_commits_are_listed_by_step_and_the_newest_is_the_default(folder: CheckpointFolder) -> None:
    for step in (5, 100, 20):
        path = folder.publish(tiny_commit(step, seed=step).manifest)
        assert path == folder.path / "commits" / f"step-{step:012d}.manifest"
    for name in ("step-1.manifest", "step-000000000001.manifest.part", "x", "step-00000000000a.manifest"):
        (folder.path / "commits" / name).touch()
    assert folder.commits() == [5, 20, 100]
    assert folder.load().header.step == 100
    assert folder.load(20).header.store_id == f"{20:032x}"
    assert CheckpointFolder.read(folder.path).commits() == [5, 20, 100]


def test_missing_commit_is_named(folder: CheckpointFolder) -> None:
    with pytest.raises(CheckpointError, match="no commit"):
        folder.load()
    with pytest.raises(CheckpointError, match=r"step-000000000003\.manifest: found no such file"):
        folder.load(3)


def test_broken_newest_commit_is_an_error_and_not_passed_over(folder: CheckpointFolder) -> None:
    folder.publish(tiny_commit(1).manifest)
    path = folder.publish(tiny_commit(2).manifest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-000000000002\.manifest"):
        folder.load()
    assert folder.load(1).header.step == 1


def test_manifest_under_the_name_of_another_step_is_refused(folder: CheckpointFolder) -> None:
    folder.publish(tiny_commit(1).manifest).rename(folder.manifest_path(2))
    with pytest.raises(CheckpointError, match="the manifest of step 1"):
        folder.load()


def test_manifest_of_another_kind_of_file_is_refused(folder: CheckpointFolder) -> None:
    outside = folder.path.parent / "outside"
    folder.publish(tiny_commit(1).manifest).rename(outside)
    path = folder.manifest_path(1)
    for make in (lambda path: path.symlink_to(outside), os.mkfifo, os.mkdir):
        make(path)
        for method in (folder.load, lambda: folder.hold().__enter__()):
            with pytest.raises(CheckpointError, match="regular file"):
                method()
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="1073741825 bytes"):
        folder.load()


def test_folder_of_manifests_that_is_a_link_is_refused(folder: CheckpointFolder) -> None:
    folder.publish(tiny_commit(1).manifest)
    outside = folder.path.parent / "outside"
    (folder.path / "commits").rename(outside)
    (folder.path / "commits").symlink_to(outside)
    with pytest.raises(CheckpointError, match="regular file"):
        folder.load(1)
    with pytest.raises(CheckpointError, match="no folder"):
        CheckpointFolder.read(folder.path)


def test_invalid_manifest_is_not_published(folder: CheckpointFolder) -> None:
    manifest = tiny_commit(1).manifest
    broken = type(manifest)(manifest.header, manifest.pages[1:])
    with pytest.raises(CheckpointError):
        folder.publish(broken)
    assert not list((folder.path / "commits").iterdir())


def test_commit_of_the_same_step_is_replaced(folder: CheckpointFolder) -> None:
    folder.publish(tiny_commit(1, seed=1).manifest)
    folder.publish(tiny_commit(1, seed=2).manifest)
    assert folder.load().header.store_id == f"{2:032x}"
    with folder.hold(), pytest.raises(CheckpointError, match="a commit that a reader holds"):
        folder.publish(tiny_commit(1, seed=3).manifest)
    assert folder.load().header.store_id == f"{2:032x}"


def test_commit_is_not_retired_while_readers_hold_it(folder: CheckpointFolder) -> None:
    folder.publish(tiny_commit(1).manifest)
    folder.publish(tiny_commit(2).manifest)
    reader = CheckpointFolder.read(folder.path)
    with reader.hold(1) as manifest:
        assert manifest.header.step == 1
        with reader.hold(1):
            assert not folder.retire(1)
        folder.load(1)  # opens and closes the file: POSIX locks would be lost here
        assert not folder.retire(1)
        assert folder.retire(2)
        assert folder.commits() == [1]
    assert folder.retire(1)
    assert folder.retire(1), "already gone"
    assert folder.commits() == []


def test_reader_in_another_process_is_respected_until_it_ends(folder: CheckpointFolder) -> None:
    folder.publish(tiny_commit(1).manifest)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with CheckpointFolder.read(folder.path).hold():
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            os._exit(0)  # without leaving the block
    os.read(ready[0], 1)
    assert not folder.retire(1)
    os.write(done[1], b"x")
    os.waitpid(child, 0)
    assert folder.retire(1)
    for end in (*ready, *done):
        os.close(end)


def test_reader_that_comes_while_a_commit_is_retired_does_not_get_it(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has opened the file when its name goes; it must not trust the slots of that commit."""
    path = folder.publish(tiny_commit(1).manifest)
    reader = CheckpointFolder.read(folder.path)
    outcome: list[str] = []

    def read() -> None:
        try:
            with reader.hold(1):
                outcome.append("held")
        except CheckpointError as error:
            outcome.append(str(error))

    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    thread = threading.Thread(target=read)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive(), "it waits for the retirer"
    path.unlink()
    os.close(descriptor)
    thread.join(20)
    assert "no such file" in outcome[0]
    monkeypatch.setattr("angelptm.checkpoint.folder._HOLD_SECONDS", 0.05)
    path = folder.publish(tiny_commit(1).manifest)
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    read()
    os.close(descriptor)
    assert "locked for 0.05 s" in outcome[1]


def test_reader_that_locks_a_file_whose_name_is_gone_does_not_get_it(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced between the open and the lock: the reader gets the new one. Removed: an error."""
    path = folder.publish(tiny_commit(1, seed=1).manifest)
    real = fcntl.flock
    changes = [lambda: folder.publish(tiny_commit(1, seed=2).manifest), path.unlink]

    def late(descriptor: int, operation: int) -> None:
        if changes and operation & fcntl.LOCK_SH:
            changes.pop(0)()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    unlink = changes.pop()
    with folder.hold(1) as manifest:
        assert manifest.header.store_id == f"{2:032x}"
    changes.append(unlink)
    with pytest.raises(CheckpointError, match="no such file"), folder.hold(1):
        pass


def test_reader_cannot_write(folder: CheckpointFolder) -> None:
    reader = CheckpointFolder.read(folder.path)
    for write in (
        lambda: reader.publish(tiny_commit().manifest),
        lambda: reader.retire(1),
        lambda: reader.add_store_id("0" * 32),
        reader.sweep,
    ):
        with pytest.raises(AssertionError, match="for reading"):
            write()


def test_sweep_removes_parts_and_nothing_else(folder: CheckpointFolder) -> None:
    folder.publish(tiny_commit(1).manifest)
    leftovers = [folder.path / "commits" / "step-000000000009.manifest.part", folder.path / "stores.json.part"]
    others = [folder.path / "commits" / "notes.part", folder.path / "model.part", folder.path / "commits" / "x"]
    victim = folder.path.parent / "victim"
    for path in (*others, victim, leftovers[1]):
        path.touch()
    leftovers[0].symlink_to(victim)
    assert folder.sweep() == sorted(leftovers)
    assert not any(os.path.lexists(path) for path in leftovers)
    assert all(path.exists() for path in (*others, victim))
    assert folder.commits() == [1]
    assert folder.sweep() == []


def test_store_ids_are_kept_and_checked(folder: CheckpointFolder) -> None:
    a, b = "ab" * 16, "cd" * 16
    for store_id in (a, b, a):
        folder.add_store_id(store_id)
    assert CheckpointFolder.read(folder.path).store_ids() == [a, b]
    folder.forget_store_id(a)
    folder.forget_store_id(a)
    assert folder.store_ids() == [b]
    path = folder.path / "stores.json"
    for text, expected in (
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "content"),
        ("{}", "format_version"),
        ('{"format_version": 2, "store_ids": []}', "format_version"),
        ('{"format_version": 1, "store_ids": ["../x"]}', "store_ids.0"),
        ('{"format_version": 1, "store_ids": [], "x": 1}', "x 1"),
        (" " * (2**20 + 1), "1048577 bytes"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=expected):
            folder.store_ids()
    path.unlink()
    assert folder.store_ids() == []
    path.symlink_to(folder.path.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="regular file"):
        folder.store_ids()


def test_run_folder_is_accepted_in_place_of_its_checkpoint_folder(tmp_path: Path) -> None:
    CheckpointFolder.open(tmp_path / "run" / "checkpoint", create=True).close()
    assert locate(tmp_path / "run") == locate(tmp_path / "run" / "checkpoint") == tmp_path / "run" / "checkpoint"
    assert CheckpointFolder.read(tmp_path / "run").path == tmp_path / "run" / "checkpoint"
    CheckpointFolder.open(tmp_path / "run").close()
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no checkpoint"):
            locate(path)
        with pytest.raises(CheckpointError, match="no checkpoint"):
            CheckpointFolder.open(path)
    assert not (tmp_path / "LOCK").exists()


def test_opening_again_changes_nothing(folder: CheckpointFolder) -> None:
    folder.add_store_id("ab" * 16)
    folder.publish(tiny_commit(1).manifest)
    folder.close()

    class Refuse:
        def before(self, operation: str, path: Path) -> None:
            raise AssertionError(f"{operation} {path}")

        after = before

    with CheckpointFolder.open(folder.path, create=True, disk=Disk(Refuse())) as again:
        assert again.store_ids() == ["ab" * 16]
        assert again.commits() == [1]


def test_path_stays_the_same_when_the_process_moves(tmp_path: Path) -> None:
    def work() -> None:
        os.chdir(tmp_path)
        with CheckpointFolder.open(Path("here"), create=True) as folder:
            os.chdir("/")
            folder.publish(tiny_commit(1).manifest)
            assert folder.commits() == [1]

    assert in_child(work) == 0


def test_retirement_whose_sync_failed_is_made_durable_by_the_next_try(tmp_path: Path) -> None:
    class Failing:
        def __init__(self) -> None:
            self.armed, self.seen = False, []

        def before(self, operation: str, path: Path) -> None:
            self.seen.append(operation)
            assert path.is_relative_to(tmp_path)
            if self.armed and operation == "sync_folder":
                self.armed = False
                raise OSError(5, "Input/output error")

        def after(self, operation: str, path: Path) -> None: ...

    hook = Failing()
    with CheckpointFolder.open(tmp_path / "run", create=True, disk=Disk(hook)) as folder:
        folder.publish(tiny_commit(1).manifest)
        hook.armed = True
        with pytest.raises(OSError, match="Input/output"):
            folder.retire(1)
        hook.seen.clear()
        assert folder.retire(1)
        assert hook.seen == ["sync_folder"]
