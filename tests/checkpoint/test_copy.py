"""A copy is the same commit, and is finished however often it was cut off."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import io_engine
from angelptm.checkpoint import copying
from angelptm.checkpoint.copying import MARKER_NAME, copy_commit
from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.opened import open_commit
from angelptm.checkpoint.records import NONE
from angelptm.errors import CheckpointError, CorruptPageError, StoreLockedError
from tests.checkpoint.builder import Commit, make_commit

BUFFERS = {"mask": ("bool", (33,)), "freqs": ("float32", (70, 70))}


@pytest.fixture
def source(tmp_path: Path) -> Commit:
    """A commit of pages over two files, in the folder ``source``, with what is between them full of noise."""
    commit = make_commit(buffers=BUFFERS, store_id="ab" * 16)
    publish(commit, tmp_path / "source")
    return commit


def publish(commit: Commit, folder: Path) -> None:
    with CheckpointFolder.open(folder, create=True) as made:
        made.add_store_id(commit.manifest.header.store_id)
        commit.write_files(folder)
        made.publish(commit.manifest)


def copy(tmp_path: Path, name: str = "copy", **keys: object) -> copying.Copied:
    with open_commit(tmp_path / "source", None, []) as opened:
        return copy_commit(opened.reader, tmp_path / name, **keys)  # type: ignore[arg-type]


def assert_is_copy(source: Commit, folder: Path) -> None:
    """A folder of its own that holds the commit's content, page by page, and nothing else."""
    wanted = source.manifest
    with open_commit(folder, None, []) as opened:
        manifest = opened.manifest
        assert opened.reader.verify() == []
        assert opened.folder.commits() == [wanted.header.step]
        assert opened.folder.store_ids() == [manifest.header.store_id]
        for index, content in opened.reader.pages(range(len(manifest.pages))):
            expected = source.contents.get(index)
            found = content.tobytes()
            assert found == expected[: len(found)] if expected is not None else not any(found)
    assert manifest.header.store_id != wanted.header.store_id
    same = {"store_id", "files"}
    assert manifest.header.model_dump(exclude=same) == wanted.header.model_dump(exclude=same)
    for name in ("unit", "kind", "dtype", "start", "count", "crc", "version"):
        assert np.array_equal(manifest.pages[name], wanted.pages[name])
    stored = manifest.pages["file"] != NONE
    assert manifest.pages["slot"][stored].tolist() == list(range(len(source.contents)))
    (file,) = manifest.header.files
    assert sorted(path.name for path in folder.iterdir()) == sorted(["LOCK", "commits", "stores.json", file.name])
    assert (folder / file.name).stat().st_size == len(source.contents) * manifest.header.page_bytes


def test_copy_has_the_pages_of_the_commit_and_no_others(source: Commit, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    copied = copy(tmp_path, progress=lambda *one: seen.append(one))
    assert_is_copy(source, tmp_path / "copy")
    count = len(source.contents)
    assert (copied.copied_pages, copied.kept_pages) == (count, 0)
    assert copied.bytes == sum(map(len, source.contents.values()))
    assert seen == [("copying", done, count) for done in range(1, count + 1)]


def test_commit_without_stored_pages_can_be_copied(tmp_path: Path) -> None:
    publish(make_commit({"none": {"a": ((0, 3), True)}}), tmp_path / "source")
    assert copy(tmp_path).copied_pages == 0
    assert CheckpointFolder.read(tmp_path / "copy").load().header.step == 7


def test_copy_of_a_copy_is_the_same_commit(source: Commit, tmp_path: Path) -> None:
    copy(tmp_path)
    with open_commit(tmp_path / "copy", None, []) as opened:
        copy_commit(opened.reader, tmp_path / "again")
    assert_is_copy(source, tmp_path / "again")


def test_memory_is_two_rings_of_pages_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(make_commit({"big": {"w": ((400_000,), True)}}), tmp_path / "source")
    made = []
    for module in ("copying", "reader"):
        real = __import__(f"angelptm.checkpoint.{module}", fromlist=["AlignedBuffer"]).AlignedBuffer
        monkeypatch.setattr(
            f"angelptm.checkpoint.{module}.AlignedBuffer", lambda size, real=real: made.append(size) or real(size)
        )
    assert copy(tmp_path).copied_pages > 60
    assert len(made) <= 2 * copying.DEPTH


@pytest.mark.usefixtures("source")
def test_pages_and_the_name_of_their_file_are_durable_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Watch:
        def before(self, operation: str, path: Path) -> None: ...

        def after(self, operation: str, path: Path) -> None:
            events.append(f"{operation} {path.name}")

    fsync, sync = os.fsync, io_engine.Engine.sync

    def seen_fsync(descriptor: int) -> None:
        files = any((tmp_path / "copy").glob("*.pages"))
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name} {'with' if files else 'no'} file")
        fsync(descriptor)

    def seen_sync(engine: io_engine.Engine, deadline_seconds: float) -> None:
        assert engine.counters.written_bytes > 0
        events.append("pages")
        sync(engine, deadline_seconds)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(io_engine.Engine, "sync", seen_sync)
    copy(tmp_path, disk=Disk(Watch()))
    manifest = events.index("rename step-000000000007.manifest")
    assert events.index("rename COPYING") < events.index("fsync copy with file") < manifest
    assert events.index("pages") < manifest < events.index("remove COPYING")
    assert events.index("rename COPYING") < events.index("pages")


class Killer(Disk):
    """Ends the process at the n-th durable operation."""

    def __init__(self, operation: int) -> None:
        super().__init__(self)  # type: ignore[arg-type]
        self.left = operation

    def before(self, _operation: str, _path: Path) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, _operation: str, _path: Path) -> None: ...


def in_child(work: Callable[[], object]) -> int:
    """Runs ``work`` in a forked child; 0, 1 after an exception, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_copy_killed_at_every_durable_operation_is_finished_by_the_next(source: Commit, tmp_path: Path) -> None:
    killed = 0
    while True:
        name = f"copy{killed}"
        status = in_child(lambda name=name, at=killed: copy(tmp_path, name, disk=Killer(at)))  # type: ignore[misc]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        commits = list((tmp_path / name).glob("commits/*.manifest"))
        if not commits or (tmp_path / name / MARKER_NAME).exists():  # else only the last sync was missing
            copy(tmp_path, name)
        assert_is_copy(source, tmp_path / name)
        shutil.rmtree(tmp_path / name)
        killed += 1
    assert killed > 15, "the operations of a copy"


def test_copy_killed_between_pages_many_times_keeps_what_is_right(tmp_path: Path) -> None:
    """Each attempt is killed after a few more pages: the last one has little left to copy."""
    source = make_commit({"big": {"w": ((300_000,), True)}})
    publish(source, tmp_path / "source")
    count = len(source.contents)

    def attempt(pages: int) -> int:
        def progress(what: str, done: int, _total: int) -> None:
            if what == "copying" and done == pages:
                os.kill(os.getpid(), signal.SIGKILL)

        return in_child(lambda: copy(tmp_path, progress=progress))

    for _ in range(3):
        assert attempt(12) == -signal.SIGKILL
        assert not CheckpointFolder.read(tmp_path / "copy").commits()
    copied = copy(tmp_path)
    assert copied.kept_pages >= 3 * (12 - copying.DEPTH)
    assert copied.kept_pages + copied.copied_pages == count
    assert_is_copy(source, tmp_path / "copy")


def test_copy_killed_at_random_times_is_finished_in_the_end(source: Commit, tmp_path: Path) -> None:
    rng = random.Random(5)
    killed = 0
    for _ in range(14):
        child = os.fork()
        if child == 0:
            copy(tmp_path, progress=lambda *_: time.sleep(0.0005))
            os._exit(0)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        commits = list((tmp_path / "copy").glob("commits/*.manifest"))
        if commits and not (tmp_path / "copy" / MARKER_NAME).exists():
            assert_is_copy(source, tmp_path / "copy")
            shutil.rmtree(tmp_path / "copy")
    assert killed > 3
    copy(tmp_path)
    assert_is_copy(source, tmp_path / "copy")


def test_wrong_bytes_of_an_unfinished_copy_are_copied_again(source: Commit, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "copying" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(tmp_path, progress=stop)
    data = next((tmp_path / "copy").glob("*.pages"))
    with data.open("r+b") as file:
        for slot in (0, 5):
            file.seek(slot * 65536 + 100)
            file.write(b"spoiled")
    copied = copy(tmp_path)
    assert copied.copied_pages >= 2
    assert copied.kept_pages >= len(source.contents) - 2 - copying.DEPTH
    assert_is_copy(source, tmp_path / "copy")


def test_damaged_source_page_stops_the_copy_without_a_manifest(source: Commit, tmp_path: Path) -> None:
    page = next(page for page in source.manifest.pages if page["file"] == 1)
    path = tmp_path / "source" / source.manifest.header.files[1].name
    good = path.read_bytes()
    spoiled = bytearray(good)
    spoiled[int(page["slot"]) * 65536 + 1] ^= 1
    path.write_bytes(spoiled)
    with pytest.raises(CorruptPageError) as caught:
        copy(tmp_path)
    assert caught.value.path == str(path)
    assert not CheckpointFolder.read(tmp_path / "copy").commits()
    path.write_bytes(good)
    copy(tmp_path)
    assert_is_copy(source, tmp_path / "copy")


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("what", ["file", "notes", "checkpoint", "finished copy", "commits file", "marker"])
def test_destination_with_something_else_is_refused_unchanged(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    if what == "file":
        folder.write_text("mine")
    elif what == "notes":
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    elif what == "checkpoint":
        publish(make_commit(step=3), folder)
    elif what == "finished copy":
        copy(tmp_path)
    else:
        folder.mkdir()
        (folder / ("commits" if what == "commits file" else MARKER_NAME)).write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError):
        copy(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("source")
def test_unfinished_copy_of_another_commit_is_refused(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(tmp_path, progress=stop)
    publish(make_commit(step=8, seed=3), tmp_path / "source")
    with pytest.raises(CheckpointError, match="unfinished copy of another commit, of step 7"):
        copy(tmp_path)


@pytest.mark.usefixtures("source")
def test_destination_in_use_is_an_error(tmp_path: Path) -> None:
    with CheckpointFolder.open(tmp_path / "copy", create=True), pytest.raises(StoreLockedError, match="in use"):
        copy(tmp_path)


def test_too_little_space_is_an_error_with_numbers(
    source: Commit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def small(path: object) -> os.statvfs_result:
        values = list(real(path))  # type: ignore[call-overload]
        values[4] = 3
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", small)
    needed = len(source.contents) * 65536
    with pytest.raises(CheckpointError, match=rf"\(12288 bytes\) free.*{needed} bytes"):
        copy(tmp_path)
    assert not (tmp_path / "copy").exists()
