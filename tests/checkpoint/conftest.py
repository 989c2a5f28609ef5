"""What the checkpoint tests share."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from angelptm.checkpoint.folder import CheckpointFolder
from tests.checkpoint.builder import Commit, make_commit


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder.open(tmp_path / "checkpoint", create=True)


def tiny_commit(step: int = 7, seed: int = 0) -> Commit:
    """A commit with a manifest of about 1 KB."""
    return make_commit({"a": {"a.w": ((9, 9), True)}}, step=step, seed=seed, rng=None)


def in_child(work: Callable[[], None]) -> int:
    """Runs ``work`` in a forked child and returns its exit status: 0, 1 after an exception, or minus a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
