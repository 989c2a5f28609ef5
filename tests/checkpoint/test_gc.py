"""gc frees what no commit names, and touches nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from angelptm.checkpoint.collect import Collected, collect
from angelptm.checkpoint.copying import MARKER_NAME
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.opened import open_commit
from angelptm.checkpoint.records import NONE
from angelptm.checkpoint.slot_files import slot_file_name
from angelptm.errors import CheckpointError, StoreLockedError
from tests.checkpoint.builder import Commit, make_commit

STORE = "cd" * 16
NAMES = (slot_file_name(STORE, 0), slot_file_name(STORE, 1))


def two_commits(folder: Path, ssd: Path) -> tuple[Commit, Commit]:
    """Commits of steps 1 and 2 that share files, each with slots of its own; the other slots hold noise."""
    first, second = (make_commit(step=step, seed=step, store_id=STORE, file_names=NAMES) for step in (1, 2))
    shift = max(file.slot_count for file in first.manifest.header.files)
    pages = second.manifest.pages.copy()
    pages["slot"][pages["file"] != NONE] += shift
    files = tuple(file.model_copy(update={"slot_count": 3 * shift}) for file in second.manifest.header.files)
    header = second.manifest.header.model_copy(update={"files": files})
    second = Commit(type(second.manifest)(header, pages), second.contents)
    ssd.mkdir()
    with CheckpointFolder.open(folder, create=True) as made:
        made.add_store_id(STORE)
        second.write_files(ssd)
        for record, content in first.contents.items():
            page = first.manifest.pages[record]
            with (ssd / NAMES[int(page["file"])]).open("r+b") as file:
                file.seek(int(page["slot"]) * 65536)
                file.write(content)
        made.publish(first.manifest)
        made.publish(second.manifest)
    return first, second


@pytest.fixture
def commits(tmp_path: Path) -> tuple[Commit, Commit]:
    return two_commits(tmp_path / "checkpoint", tmp_path / "ssd")


def gc(tmp_path: Path, keep: int | None = None, dry_run: bool = False) -> Collected:
    return collect(tmp_path / "checkpoint", [tmp_path / "ssd"], keep=keep, dry_run=dry_run)


def taken(tmp_path: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.pages"))


def state(tmp_path: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_blocks, path.read_bytes())
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != "LOCK"
    }


def assert_intact(tmp_path: Path, step: int) -> None:
    with open_commit(tmp_path / "checkpoint", step, [tmp_path / "ssd"]) as opened:
        assert opened.reader.verify() == []


@pytest.mark.parametrize("keep", [None, 1, 2, 5])
def test_slots_of_kept_commits_stay_and_all_others_are_given_back(
    keep: int | None, commits: tuple[Commit, Commit], tmp_path: Path
) -> None:
    before, sizes = taken(tmp_path), [path.stat().st_size for path in sorted((tmp_path / "ssd").iterdir())]
    expected = gc(tmp_path, keep, dry_run=True)
    assert taken(tmp_path) == before
    result = gc(tmp_path, keep)
    kept = [2] if keep == 1 else [1, 2]
    assert result == expected  # the files are on few extents, so no block of metadata comes in between
    assert result.kept_steps == kept == CheckpointFolder.read(tmp_path / "checkpoint").commits()
    assert result.freed_bytes == before - taken(tmp_path) > 0
    used = sum(len(commits[step - 1].contents) for step in kept)
    assert taken(tmp_path) == used * 65536
    assert [path.stat().st_size for path in sorted((tmp_path / "ssd").iterdir())] == sizes
    for step in kept:
        assert_intact(tmp_path, step)
    assert gc(tmp_path, keep).freed_bytes == 0, "the second time there is nothing to free"


@pytest.mark.usefixtures("commits")
def test_remains_of_interrupted_runs_go_and_everything_else_stays(tmp_path: Path) -> None:
    folder, ssd, orphan, foreign = tmp_path / "checkpoint", tmp_path / "ssd", "12" * 16, "34" * 16
    with CheckpointFolder.open(folder) as opened:
        opened.add_store_id(orphan)
    removed = [
        folder / "commits" / "step-000000000009.manifest.part",
        folder / "stores.json.part",
        ssd / slot_file_name(orphan, 0),
        ssd / slot_file_name(orphan, 3),
        folder / slot_file_name(orphan, 1),
    ]
    link = ssd / slot_file_name(orphan, 5)
    others = [
        folder / "notes.txt",
        folder / "commits" / "notes.part",
        ssd / slot_file_name(foreign, 0),
        ssd / "angelptm-x.pages",
        ssd / (slot_file_name(orphan, 0) + ".bak"),
    ]
    for path in [*removed, *others]:
        path.write_bytes(b"x" * 5000)
    link.symlink_to(others[0])
    kept = {path: path.read_bytes() for path in others}
    assert {path for path, _ in gc(tmp_path, dry_run=True).removed_files} == set(removed)
    assert all(path.exists() for path in removed)
    assert {path for path, _ in gc(tmp_path).removed_files} == set(removed)
    assert not any(path.exists() for path in removed)
    assert {path: path.read_bytes() for path in others} == kept
    assert link.is_symlink()
    assert_intact(tmp_path, 1)


@pytest.mark.usefixtures("commits")
def test_commit_that_is_read_stays(tmp_path: Path) -> None:
    with open_commit(tmp_path / "checkpoint", 1, [tmp_path / "ssd"]) as opened:
        result = gc(tmp_path, 1)
        assert (result.held_steps, result.removed_steps) == ([1], [])
        assert opened.reader.verify() == []
    assert_intact(tmp_path, 1)
    assert gc(tmp_path, 1).removed_steps == [1]


@pytest.mark.usefixtures("commits")
def test_set_whose_last_commit_goes_loses_its_files(tmp_path: Path) -> None:
    other = "ef" * 16
    third = make_commit(step=3, store_id=other, file_names=(slot_file_name(other, 0),))
    with CheckpointFolder.open(tmp_path / "checkpoint") as folder:
        folder.add_store_id(other)
        third.write_files(tmp_path / "checkpoint")
        folder.publish(third.manifest)
    result = gc(tmp_path, 1)
    assert result.removed_steps == [1, 2]
    assert {path.name for path, _ in result.removed_files} == set(NAMES)
    assert not list((tmp_path / "ssd").iterdir())
    assert_intact(tmp_path, 3)


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize("what", ["locked", "manifest", "missing", "short", "foreign", "copying", "link"])
def test_refused_with_nothing_changed(what: str, tmp_path: Path) -> None:
    folder, ssd = tmp_path / "checkpoint", tmp_path / "ssd"
    (folder / "commits" / "step-000000000009.manifest.part").write_text("x")
    holder = CheckpointFolder.open(folder) if what == "locked" else None
    if what == "manifest":
        (folder / "commits" / "step-000000000001.manifest").write_bytes(b"APTMCKPT")
    elif what == "missing":
        (ssd / NAMES[1]).unlink()
    elif what == "short":
        with (ssd / NAMES[1]).open("r+b") as file:
            file.truncate(65536)
    elif what == "foreign":
        with CheckpointFolder.open(folder) as opened:
            opened.forget_store_id(STORE)
    elif what == "copying":
        (folder / MARKER_NAME).write_text("{}")
    elif what == "link":
        (ssd / NAMES[0]).rename(tmp_path / "elsewhere")
        (ssd / NAMES[0]).symlink_to(tmp_path / "elsewhere")
    before = state(tmp_path)
    with pytest.raises(StoreLockedError if what == "locked" else CheckpointError):
        gc(tmp_path, 1)
    assert state(tmp_path) == before
    if holder is not None:
        holder.close()


def test_slots_are_found_by_file_even_where_commits_order_them_differently(
    commits: tuple[Commit, Commit], tmp_path: Path
) -> None:
    first = commits[0].manifest
    files = tuple(reversed(first.header.files))
    pages = first.pages.copy()
    stored = pages["file"] != NONE
    pages["file"][stored] = 1 - pages["file"][stored]
    assert np.any(stored)
    with CheckpointFolder.open(tmp_path / "checkpoint") as folder:
        folder.publish(type(first)(first.header.model_copy(update={"files": files}), pages))
    with pytest.raises(CheckpointError, match="one of this folder's own sets"):
        gc(tmp_path)
