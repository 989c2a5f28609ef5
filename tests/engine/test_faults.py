"""Faults of the device: survivable ones change no bit, others end in a typed error within the deadline."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import angelptm_native as native
import pytest
import torch

from angelptm.engine import Engine
from io_engine.errors import IoError

from .conftest import MakeBoth
from .models import GPT2, loss_of
from .training import assert_same_parameters, assert_same_values, snapshot, tight_config, train, train_both

FAULTS = {
    "short": native.FaultPlan(seed=1, short_transfer=0.3),
    "eintr": native.FaultPlan(seed=2, eintr=0.2),
    "eagain": native.FaultPlan(seed=3, eagain=0.2),
    "delay": native.FaultPlan(seed=4, delay=0.2, delay_seconds=0.002),
    "reorder": native.FaultPlan(seed=5, reorder=True),
    "all": native.FaultPlan(
        seed=6, short_transfer=0.1, eintr=0.1, eagain=0.1, delay=0.1, delay_seconds=0.002, reorder=True
    ),
}
BACKENDS = ["threads", "uring"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_survivable_faults_change_no_bit(faults: native.FaultPlan, backend: str, make_both: MakeBoth) -> None:
    engine, reference = make_both(
        GPT2.model(), faults=faults, io={"backend": backend}, gradient_accumulation_steps=2, gradient_clipping=0.05
    )
    train_both(engine, reference, GPT2, 5)
    assert_same_parameters(engine, reference)


DEADLINE_SECONDS = 5.0


def _until_it_fails(folder: Path, **faults: Any) -> tuple[Exception, float, Engine | None]:
    """Trains until the error comes; (error, seconds of the call that raised it, the engine if there is one)."""
    model = GPT2.model()
    config = tight_config(model, folder, io={"backend": "threads", "deadline_seconds": DEADLINE_SECONDS})
    engine = None
    start = time.monotonic()
    try:
        engine = Engine(model, config, faults=native.FaultPlan(**faults))
        for step in range(200):
            start = time.monotonic()
            train(engine, GPT2, 1, first=step)
        engine.drain()
    except Exception as error:
        return error, time.monotonic() - start, engine
    raise AssertionError("200 steps without the fault")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["eio", "enospc"])
def test_io_error_is_typed_and_comes_within_the_deadline(kind: str, seed: int, tmp_path: Path) -> None:
    error, seconds, engine = _until_it_fails(tmp_path, seed=seed, **{kind: 0.002})
    assert isinstance(error, IoError), repr(error)
    assert error.errno == {"eio": 5, "enospc": 28}[kind]
    assert error.path.startswith(str(tmp_path))
    assert error.op in ("read", "write")
    assert error.bytes > 0
    assert seconds < 2 * DEADLINE_SECONDS
    if engine is not None:
        # It stays an error: no later step trains on what is lost, and closing ends at once.
        with pytest.raises(IoError):
            train(engine, GPT2, 3)
        with pytest.raises(IoError):
            train(engine, GPT2, 1)
        start = time.monotonic()
        with contextlib.suppress(IoError):
            engine.close()
        assert time.monotonic() - start < DEADLINE_SECONDS
        assert not any(thread_hook for thread_hook in engine.module._forward_pre_hooks), "hooks are gone"


def test_device_that_hangs_ends_in_an_error_that_says_where(tmp_path: Path) -> None:
    model = GPT2.model()
    config = tight_config(model, tmp_path, io={"backend": "threads", "deadline_seconds": 0.3})
    faults = native.FaultPlan(seed=1, delay=1.0, delay_seconds=1.0)
    start = time.monotonic()
    with pytest.raises((IoError, native.DeadlineError), match=r"deadline passed|waited 0\.3"):
        train(Engine(model, config, faults=faults), GPT2, 1)
    assert time.monotonic() - start < 10


def test_evaluation_after_survived_faults_reads_the_same(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model(), faults=FAULTS["all"])
    train_both(engine, reference, GPT2, 2)
    with torch.no_grad():
        assert torch.equal(loss_of(engine(**GPT2.batch(5))), loss_of(reference.forward(**GPT2.batch(5))))
    first = snapshot(engine.state_dict(master=True))
    assert_same_values(engine.state_dict(master=True), first)
