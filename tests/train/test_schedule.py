"""The learning rate over a run."""

from __future__ import annotations

import itertools

import pytest

from angelptm.config.schema import Schedule
from angelptm.train.schedule import lr_factor


def factors(schedule: Schedule, steps: int = 10) -> list[float]:
    return [lr_factor(schedule, step, steps) for step in range(steps + 1)]


def test_warmup_rises_to_one_and_constant_stays() -> None:
    assert factors(Schedule(type="constant", warmup_steps=4))[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_decay_falls_from_one_to_the_floor(shape: str) -> None:
    found = factors(Schedule(type=shape, warmup_steps=2, min_lr_ratio=0.1))
    assert found[2] == 1.0
    assert found[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(found[2:]))


def test_schedule_without_any_steps_left_stays_at_the_floor() -> None:
    assert lr_factor(Schedule(type="linear", warmup_steps=10), 10, 10) == 1.0
    assert lr_factor(Schedule(type="linear"), 11, 10) == 0.0
