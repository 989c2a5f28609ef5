"""Which commits stay, who may use a folder, and what an interrupted run has left in it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.engine import Engine
from angelptm.errors import CheckpointError, StoreLockedError

from .commits import (
    HOST,
    SSD,
    Recorded,
    assert_committed,
    assert_continues,
    assert_slots_are_owned,
    committed,
    config_of,
    record,
    step_of,
    steps_in,
)
from .models import GPT2
from .training import tight_config, train

STEPS = 6
_recorded: list[Recorded] = []


def recorded(folder: Path) -> Recorded:
    if not _recorded:
        engine = Engine(GPT2.model(), tight_config(GPT2.model(), folder))
        _recorded.append(record(engine, step_of(GPT2), STEPS))
        engine.close()
    return _recorded[0]


def make(folder: Path, **keys: Any) -> Engine:
    resume = {name: keys.pop(name) for name in ("resume", "resume_step") if name in keys}
    return Engine(GPT2.model(), config_of(GPT2.model(), folder, **keys), **resume)


def commit_each(engine: Engine, first: int, last: int) -> None:
    for step in range(first, last):
        train(engine, GPT2, 1, first=step)
        engine.save_checkpoint(wait=True)


@contextmanager
def held(folder: Path, step: int) -> Iterator[None]:
    """Another process holds the commit while the block runs."""
    program = (
        "import sys, pathlib; from angelptm.checkpoint.folder import CheckpointFolder\n"
        f"with CheckpointFolder.read(pathlib.Path({str(folder)!r})) as f, f.hold({step}):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.stdin.close()
            process.wait(30)


@pytest.mark.parametrize("keep", [1, 3])
def test_no_more_commits_stay_than_are_kept(keep: int, tmp_path: Path) -> None:
    engine = make(tmp_path, keep=keep)
    for step in range(1, 6):
        commit_each(engine, step - 1, step)
        assert steps_in(tmp_path / "run") == list(range(max(1, step - keep + 1), step + 1))
        assert_slots_are_owned(engine)
    engine.close()


def test_lowering_keep_retires_at_the_resume(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    engine = make(tmp_path, keep=3)
    commit_each(engine, 0, 3)
    engine.close()
    engine = make(tmp_path, keep=1, resume=tmp_path / "run")
    assert steps_in(tmp_path / "run") == [3]
    commit_each(engine, 3, 4)
    assert steps_in(tmp_path / "run") == [4]
    assert_slots_are_owned(engine)
    assert_continues(engine, step_of(GPT2), run, 4)
    engine.close()


@pytest.mark.parametrize("placement", [SSD, HOST], ids=["ssd", "host"])
def test_commit_that_is_held_stays_whole_and_training_goes_on_after(placement: dict[str, Any], tmp_path: Path) -> None:
    """The plan has no room for it: the next steps wait for the reader, and no slot of its commit is written to."""
    run = recorded(tmp_path)
    engine = make(tmp_path, placement=placement)
    commit_each(engine, 0, 1)
    before = committed(tmp_path / "run", 1, [tmp_path / "pages"])
    with held(tmp_path / "run", 1):
        commit_each(engine, 1, 2)
        assert steps_in(tmp_path / "run") == [1, 2]
        worker = threading.Thread(target=lambda: train(engine, GPT2, 1, first=2))
        worker.start()
        worker.join(0.3 if placement is SSD else 30)
        after = committed(tmp_path / "run", 1, [tmp_path / "pages"])
        assert all((after[key] == content).all() for key, content in before.items())
        assert worker.is_alive() == (placement is SSD)
    worker.join(30)
    assert not worker.is_alive()
    commit_each(engine, 3, 4)
    assert steps_in(tmp_path / "run") == [4]
    assert_slots_are_owned(engine)
    assert_continues(engine, step_of(GPT2), run, 4)
    engine.close()


def test_commit_that_is_held_too_long_is_an_error_before_anything_changes(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    engine = make(tmp_path, io={"deadline_seconds": 0.5})
    commit_each(engine, 0, 1)
    with held(tmp_path / "run", 1):
        commit_each(engine, 1, 2)
        with pytest.raises(CheckpointError, match=r"step-0+1\.manifest.*a reader has held.*End what reads it"):
            train(engine, GPT2, 1, first=2)
    engine.optimizer.zero_grad()
    assert_continues(engine, step_of(GPT2), run, 2)
    engine.close()


@pytest.mark.parametrize("fresh", [False, True], ids=["same-engine", "new-engine"])
def test_going_back_replaces_the_newer_history(fresh: bool, tmp_path: Path) -> None:
    run = recorded(tmp_path)
    engine = make(tmp_path, keep=4)
    commit_each(engine, 0, 4)
    if fresh:
        engine.close()
        engine = make(tmp_path, keep=4, resume=tmp_path / "run", resume_step=1)
    else:
        engine.load_checkpoint(step=1)
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4], "nothing goes before there is a commit in its place"
    for group in engine.optimizer.param_groups:
        group["lr"] = 2e-2
    train(engine, GPT2, 1, first=1)
    other = {name: value.clone() for name, value in engine.state_dict(master=True).items()}
    engine.save_checkpoint(wait=True)
    assert steps_in(tmp_path / "run") == [1, 2], "the newest commit is of this history"
    assert_committed(tmp_path / "run", 1, run.masters[1], [tmp_path / "pages"])
    assert_committed(tmp_path / "run", 2, other, [tmp_path / "pages"])
    assert_slots_are_owned(engine)
    engine.close()


@pytest.mark.parametrize("how", ["never-loaded", "from-elsewhere", "weights-only"])
def test_folder_of_another_history_takes_no_commit(how: str, tmp_path: Path) -> None:
    engine = make(tmp_path, keep=2)
    commit_each(engine, 0, 2)
    engine.close()
    if how == "from-elsewhere":
        other = make(tmp_path, name="other")
        commit_each(other, 0, 1)
        other.close()
    engine = make(tmp_path, keep=2, **({"resume": tmp_path / "other"} if how == "from-elsewhere" else {}))
    if how == "weights-only":
        engine.load_checkpoint()
        engine.load_checkpoint(weights_only=True)
    train(engine, GPT2, 1)
    with pytest.raises(CheckpointError, match=r"a commit of step 2.*does not come from.*another checkpoint\.folder"):
        engine.save_checkpoint()
    assert steps_in(tmp_path / "run") == [1, 2]
    assert_slots_are_owned(engine)
    engine.load_checkpoint(tmp_path / "run")
    commit_each(engine, 2, 3)
    assert steps_in(tmp_path / "run") == [2, 3]
    engine.close()


def test_second_engine_on_a_folder_is_refused_and_a_closed_one_unlocks_it(tmp_path: Path) -> None:
    first = make(tmp_path)
    with pytest.raises(StoreLockedError, match=r"in use by process \d+"):
        make(tmp_path)
    commit_each(first, 0, 1)
    first.close()
    second = make(tmp_path, resume=tmp_path / "run")
    second.close()
    CheckpointFolder.open(tmp_path / "run").close()


def test_engine_that_could_not_be_made_unlocks_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no commit"):
        make(tmp_path, resume=tmp_path / "run")
    make(tmp_path).close()


def test_what_an_interrupted_run_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    engine = make(tmp_path)
    train(engine, GPT2, 1)
    engine.close()  # without a commit
    (left,) = (tmp_path / "pages").glob("*.pages")
    others = [
        tmp_path / "pages" / f"angelptm-{'a' * 32}-0.pages",
        tmp_path / "pages" / left.name.replace("-0.pages", "-x.pages"),
        tmp_path / "run" / "notes.part",
    ]
    parts = [tmp_path / "run" / "commits" / "step-000000000007.manifest.part", tmp_path / "run" / "stores.json.part"]
    for path in [*others, *parts]:
        path.write_bytes(b"content")
    engine = make(tmp_path)
    assert not left.exists()
    assert not any(path.exists() for path in parts)
    assert [path.read_bytes() for path in others] == [b"content"] * 3
    commit_each(engine, 0, 1)
    engine.close()
    with CheckpointFolder.read(tmp_path / "run") as opened:
        (store_id,) = opened.store_ids()
    assert (tmp_path / "pages" / f"angelptm-{store_id}-0.pages").exists()
    make(tmp_path, resume=tmp_path / "run").close()
    assert (tmp_path / "pages" / f"angelptm-{store_id}-0.pages").exists()
