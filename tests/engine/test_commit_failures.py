"""A commit that fails says so at the next call, leaves no manifest and no slot behind, and the one before it whole."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import angelptm_native as native
import pytest
import torch

from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.engine import Engine
from angelptm.errors import CheckpointError
from io_engine.errors import IoError

from .commits import (
    HALF,
    HOST,
    SSD,
    Recorded,
    assert_committed,
    assert_continues,
    assert_masters,
    assert_slots_are_owned,
    config_of,
    record,
    step_of,
    steps_in,
)
from .models import GPT2, PLAIN, loss_of
from .test_weird_use import Buffers
from .training import tight_config, train

STEPS = 5
_recorded: list[Recorded] = []


def recorded(folder: Path) -> Recorded:
    if not _recorded:
        engine = Engine(GPT2.model(), tight_config(GPT2.model(), folder))
        _recorded.append(record(engine, step_of(GPT2), STEPS))
        engine.close()
    return _recorded[0]


class Failing:
    """A saver whose calls of one name fail once, after ``after`` of them."""

    def __init__(self, engine: Engine, name: str, error: Exception, after: int = 0) -> None:
        assert engine._commits is not None
        self._saver, self._name, self._error, self._left = engine._commits._saver, name, error, after
        engine._commits._saver = self

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            self._left -= 1
            if self._left == -1:
                raise self._error
        return getattr(self._saver, name)


class Refusing:
    """Hook of a Disk: the named operation on a manifest fails while ``armed``."""

    def __init__(self, operation: str) -> None:
        self.operation, self.armed = operation, False

    def before(self, operation: str, path: Path) -> None:
        if self.armed and operation == self.operation and "commits" in str(path):
            raise IoError(operation, str(path), 0, 0, 5)

    def after(self, operation: str, path: Path) -> None: ...


def wait(engine: Engine) -> None:
    assert engine._commits is not None
    engine._commits.wait()


NEXT_CALLS: dict[str, Callable[[Engine], Any]] = {
    "wait": lambda engine: engine.save_checkpoint(wait=True),
    "save": lambda engine: engine.save_checkpoint(),
    "load": lambda engine: engine.load_checkpoint(),
    "close": lambda engine: engine.close(),
}


def after_failure(engine: Engine, folder: Path, run: Recorded, at: int) -> None:
    """Slots are given back, the former commit is intact, and both training and committing go on."""
    assert steps_in(folder / "run") == [1]
    assert_slots_are_owned(engine, stale=at > 2)
    assert_committed(folder / "run", 1, run.masters[1], [folder / "pages"])
    for step in range(at, STEPS):
        train(engine, GPT2, 1, first=step)
        engine.save_checkpoint(wait=True)
    assert_masters(engine, run.masters[STEPS])
    assert_slots_are_owned(engine)
    assert_committed(folder / "run", STEPS, run.masters[STEPS], [folder / "pages"])
    engine.close()


ERRORS = {"EIO": IoError("write", "slots", 0, 0, 5), "ENOSPC": IoError("write", "slots", 0, 0, 28)}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.parametrize(
    ("keys", "call", "after"),
    [
        ({"placement": HOST}, "save", 0),
        ({"placement": HALF}, "save", 1),
        ({"ssd": False}, "save", 2),
        ({"placement": SSD}, "flush", 0),
        ({"ssd": False}, "flush", 0),
    ],
    ids=["host-page", "later-page", "no-ssd", "sync", "sync-no-ssd"],
)
def test_failed_write_or_sync(keys: dict[str, Any], call: str, after: int, error: IoError, tmp_path: Path) -> None:
    run = recorded(tmp_path)
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path, **keys))
    train(engine, GPT2, 1)
    engine.save_checkpoint(wait=True)
    train(engine, GPT2, 1, first=1)
    Failing(engine, call, error, after)
    engine.save_checkpoint()
    with pytest.raises(IoError) as raised:
        wait(engine)
    assert raised.value is error
    wait(engine)  # said once
    after_failure(engine, tmp_path, run, 2)


def test_failed_write_of_buffers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    engine = Engine(Buffers(), config_of(Buffers(), tmp_path))
    train(engine, PLAIN, 1)
    Failing(engine, "save_bytes", ERRORS["ENOSPC"])
    with pytest.raises(IoError):
        engine.save_checkpoint(wait=True)
    assert_slots_are_owned(engine)
    engine.save_checkpoint(wait=True)
    engine.close()


@pytest.mark.parametrize("kind", ["eio", "enospc"])
def test_device_that_fails_is_a_typed_error(kind: str, tmp_path: Path) -> None:
    """Without an SSD tier nothing but commits touches the device."""
    faults = native.FaultPlan(seed=1, **{kind: 1.0})
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path, ssd=False), faults=faults)
    train(engine, GPT2, 1)
    with pytest.raises(IoError) as raised:
        engine.save_checkpoint(wait=True)
    assert raised.value.errno == {"eio": 5, "enospc": 28}[kind]
    assert raised.value.path.startswith(str(tmp_path / "run"))
    assert steps_in(tmp_path / "run") == []
    assert engine._store.slot_used_count == 0
    train(engine, GPT2, 1, first=1)
    engine.close()


@pytest.mark.parametrize("placement", [SSD, HALF], ids=["ssd", "half"])
@pytest.mark.parametrize("operation", ["write", "sync_file", "rename", "sync_folder"])
def test_failed_publication_of_the_manifest(operation: str, placement: dict[str, Any], tmp_path: Path) -> None:
    """After the rename the manifest is there: it goes again, or else its slots would be written over under it."""
    run = recorded(tmp_path)
    hook = Refusing(operation)
    config = config_of(GPT2.model(), tmp_path, placement=placement)
    engine = Engine(GPT2.model(), config, disk=Disk(hook))
    train(engine, GPT2, 1)
    engine.save_checkpoint(wait=True)
    train(engine, GPT2, 1, first=1)
    hook.armed = True
    engine.save_checkpoint()
    with pytest.raises(IoError, match=operation):
        wait(engine)
    hook.armed = False
    for step in steps_in(tmp_path / "run"):
        assert_committed(tmp_path / "run", step, run.masters[step], [tmp_path / "pages"])
    train(engine, GPT2, 1, first=2)
    for step in steps_in(tmp_path / "run"):  # its slots were not given out
        assert_committed(tmp_path / "run", step, run.masters[step], [tmp_path / "pages"])
    assert_slots_are_owned(engine, stale=True)
    if operation == "sync_folder":  # neither could the removal be made durable
        engine.save_checkpoint(wait=True)
        assert steps_in(tmp_path / "run") == [3]
        assert_slots_are_owned(engine)
        engine.close()
    else:
        after_failure(engine, tmp_path, run, 3)


def test_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path))
    train(engine, GPT2, 1)
    engine.save_checkpoint(wait=True)
    commits = tmp_path / "run" / "commits"
    # A file in its place: permissions do not stop root.
    os.rename(commits, tmp_path / "aside")
    commits.write_bytes(b"")
    train(engine, GPT2, 1, first=1)
    engine.save_checkpoint()
    with pytest.raises((IoError, CheckpointError)):
        wait(engine)
    commits.unlink()
    os.rename(tmp_path / "aside", commits)
    after_failure(engine, tmp_path, run, 2)


@pytest.mark.parametrize("call", NEXT_CALLS.values(), ids=NEXT_CALLS.keys())
def test_next_call_raises_the_error_once(call: Callable[[Engine], Any], tmp_path: Path) -> None:
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path))
    engine.save_checkpoint(wait=True)
    train(engine, GPT2, 1)
    Failing(engine, "flush", ERRORS["EIO"])
    engine.save_checkpoint()
    with pytest.raises(IoError):
        call(engine)
    engine.close()
    CheckpointFolder.open(tmp_path / "run").close()


def test_step_raises_the_error_with_nothing_changed_and_is_taken_at_the_second_call(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path, placement=HOST))
    engine.save_checkpoint(wait=True)
    train(engine, GPT2, 1)
    Failing(engine, "save", ERRORS["EIO"], 1)
    engine.save_checkpoint()
    engine._commits._thread.join()  # type: ignore[union-attr]
    engine.backward(loss_of(engine(**GPT2.batch(1))))
    with pytest.raises(IoError):
        engine.optimizer.step()
    assert engine.global_step == 1
    engine.optimizer.step()
    assert_continues(engine, step_of(GPT2), run, 2)
    engine.close()


def test_commit_that_fails_while_a_step_is_under_way_leaves_the_step_whole(tmp_path: Path) -> None:
    """The step has updated some units by then: it goes on, and the next one raises the error before it begins."""
    run = recorded(tmp_path)
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path, placement=HOST))
    train(engine, GPT2, 1)
    assert engine._commits is not None
    saver, calls = engine._commits._saver, []

    class LateFailure:
        def save(self, pages: list[int]) -> None:
            calls.append(pages)
            if len(calls) == 2:
                time.sleep(1.0)  # the step waits for this unit by now
                raise ERRORS["EIO"]
            saver.save(pages)

        def __getattr__(self, name: str) -> Any:
            return getattr(saver, name)

    engine._commits._saver = LateFailure()
    engine.save_checkpoint()
    train(engine, GPT2, 1, first=1)
    assert len(calls) == 2
    assert engine.global_step == 2
    engine._commits._thread.join()  # type: ignore[union-attr]
    engine.backward(loss_of(engine(**GPT2.batch(2))))
    with pytest.raises(IoError):
        engine.optimizer.step()
    engine.optimizer.zero_grad()
    engine._commits._saver = saver
    assert_continues(engine, step_of(GPT2), run, 2)
    assert_slots_are_owned(engine, stale=True)
    engine.close()


def test_update_that_fails_fails_the_commit_that_waits_for_it(tmp_path: Path) -> None:
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path, io={"backend": "threads"}))
    train(engine, GPT2, 1)
    engine.save_checkpoint(wait=True)
    assert engine._commits is not None
    pending = engine._commits._updates.pending

    class Failed:
        def wait(self, _: float) -> None:
            raise ERRORS["EIO"]

    train(engine, GPT2, 1, first=1)
    engine._commits._updates.pending = lambda: {**pending(), 1: Failed()}  # type: ignore[method-assign, dict-item]
    engine.save_checkpoint()
    with pytest.raises(IoError):
        wait(engine)
    assert steps_in(tmp_path / "run") == [1]
    assert_slots_are_owned(engine)
    engine.close()
