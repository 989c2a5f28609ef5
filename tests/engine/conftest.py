"""Fixtures of the engine tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from angelptm.engine import Engine
from angelptm.plan import NOMINAL_RATES

from .reference import Reference
from .training import tight_config


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One torch thread: the models are so small that waking a second one costs more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _known_rates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans from given rates, since measuring takes longer than the steps of a small model; but for tests of it."""
    if request.node.get_closest_marker("measures") is None:
        monkeypatch.setattr("angelptm.engine.planning.measure_rates", lambda *_, **__: NOMINAL_RATES)
        monkeypatch.setattr("angelptm.engine.planning.compute_speed", lambda *_: 1.0)


MakeEngine = Callable[..., Engine]
MakeBoth = Callable[..., tuple[Engine, Reference]]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    """An engine over a model under the tightest budgets; keys as for ``tight_config``. Closed after the test."""
    engines: list[Engine] = []

    def make(
        model: nn.Module, *, groups: Any = None, faults: Any = None, planned_for: nn.Module | None = None, **keys: Any
    ) -> Engine:
        config = tight_config(planned_for or model, tmp_path, **keys)
        engines.append(Engine(model, config, groups=groups, faults=faults))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def make_both(make_engine: MakeEngine, tmp_path: Path) -> MakeBoth:
    """An engine and the reference that it must equal, made from one model."""

    def make(model: nn.Module, *, settings: Any = (), **keys: Any) -> tuple[Engine, Reference]:
        engine_keys = {key: keys.pop(key) for key in ("groups", "faults") if key in keys}
        reference = Reference(model, tight_config(model, tmp_path, **keys), settings)
        return make_engine(model, **engine_keys, **keys), reference

    return make
