"""Commits are made while training goes on: each one is the state after its step, whatever happens meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import angelptm_native as native
import pytest
import torch
from torch import nn

from angelptm.config import Config
from angelptm.engine import Engine
from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of
from angelptm.errors import AngelPTMError

from .commits import (
    DEVICE_HOST,
    HALF,
    HOST,
    SSD,
    Recorded,
    assert_committed,
    assert_slots_are_owned,
    config_of,
    record,
    step_of,
    steps_in,
)
from .models import GPT2
from .training import batches_of, tight_config, train, train_step

STEPS = 5
SLOW = native.FaultPlan(seed=4, delay=1.0, delay_seconds=0.002)
MOSTLY_HOST = {"param": "ssd", "grad": "ssd", "states": 0.8}
NO_SSD = {"param": "auto"}


def model() -> nn.Module:
    """Frozen parameters too, and a buffer that changes with every forward pass and fills more than a page."""
    built = GPT2.model()
    for name, param in built.named_parameters():
        if "h.0.ln_1" in name or "wpe" in name or "h.1.mlp.c_fc" in name:
            param.requires_grad_(False)
    built.register_buffer("seen", torch.zeros(20000))
    built.register_forward_hook(count)
    return built


def count(module: nn.Module, *_: Any) -> None:
    module.seen.add_(1)  # type: ignore[operator, union-attr]


_recorded: list[Recorded] = []


def recorded(folder: Path) -> Recorded:
    if not _recorded:
        engine = Engine(model(), tight_config(model(), folder))
        _recorded.append(record(engine, step_of(GPT2), STEPS))
        engine.close()
    return _recorded[0]


def exact_config(
    folder: Path, keep: int, placement: dict[str, Any], like: nn.Module | None = None, **keys: Any
) -> Config:
    """The SSD tier has as many slots as the plan says, and not one more."""
    like = like or model()
    if placement is NO_SSD:
        return config_of(like, folder, keep=keep, ssd=False)
    config = config_of(like, folder, keep=keep, placement=placement, **keys)
    slots = plan_of(*lay_out(like, config), config, buffer_bytes_of(like)).ssd_slots
    ssd = [config.tiers.ssd[0].model_copy(update={"size": slots * config.page_size})]
    return config.model_copy(update={"tiers": config.tiers.model_copy(update={"ssd": ssd})})


PLACEMENTS = {
    "ssd": SSD,
    "half": HALF,
    "mostly-host": MOSTLY_HOST,
    "host": HOST,
    "device-host": DEVICE_HOST,
    "no-ssd": NO_SSD,
}


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_commit_at_every_step_of_a_slow_disk_is_exact_and_fits_the_plan(
    placement: dict[str, Any], keep: int, tmp_path: Path
) -> None:
    run = recorded(tmp_path)
    config = exact_config(tmp_path, keep, placement)
    engine = Engine(model(), config, faults=SLOW)
    assert engine._store.slot_count == engine.plan.ssd_slots
    for index in range(STEPS):
        assert torch.equal(torch.stack(train_step(engine, batches_of(GPT2, config, index))), run.losses[index])
        engine.save_checkpoint()
        if index == 0 or index == STEPS - 1:
            engine.save_checkpoint()  # of the same step once more: the second replaces the first
    engine.drain()
    assert engine._commits is not None
    assert engine._commits.wait() == config.checkpoint.folder / "commits" / f"step-{STEPS:012}.manifest"  # type: ignore[operator]
    assert_slots_are_owned(engine)
    assert steps_in(tmp_path / "run") == list(range(STEPS - keep + 1, STEPS + 1))
    for step in steps_in(tmp_path / "run"):
        assert_committed(tmp_path / "run", step, run.masters[step], [tmp_path / "pages"])
    engine.close()
    for step in range(STEPS - keep + 1, STEPS + 1):
        loaded = Engine(model(), config, resume=tmp_path / "run", resume_step=step)
        assert float(loaded.module.seen[0]) == step  # type: ignore[index, arg-type]
        for name, value in loaded.state_dict(master=True).items():
            if name != "seen":
                assert torch.equal(value, run.masters[step][name]), name
        loaded.close()


class Late:
    """A saver that takes its time before it reads a page."""

    def __init__(self, saver: Any) -> None:
        self._saver = saver

    def save(self, pages: list[int]) -> None:
        time.sleep(0.05)
        self._saver.save(pages)

    def flush(self) -> None:
        time.sleep(0.5)
        self._saver.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._saver, name)


@pytest.mark.parametrize("placement", [HOST, HALF], ids=["host", "half"])
def test_pages_that_are_changed_in_place_are_captured_before(placement: dict[str, Any], tmp_path: Path) -> None:
    """The commit's writes are slow and the next steps are not: what they change has to be in the commit before."""
    run = recorded(tmp_path)
    engine = Engine(model(), config_of(model(), tmp_path, placement=placement, keep=5))
    assert engine._commits is not None
    engine._commits._saver = Late(engine._commits._saver)
    under_way = 0
    for index in range(STEPS):
        train(engine, GPT2, 1, first=index)
        if index in (0, 2):
            engine.save_checkpoint()
        cut = engine._commits._cut
        under_way += cut is not None and not cut.done and cut.header.step <= index
    engine.drain()
    engine._commits.wait()
    for step in (1, 3):
        assert_committed(tmp_path / "run", step, run.masters[step], [tmp_path / "pages"])
    assert_slots_are_owned(engine)
    engine.close()
    assert under_way > 0, "a step was taken while a commit was being made"


def test_updates_leave_room_for_the_copies_of_a_commit_in_the_making(tmp_path: Path) -> None:
    """More states on the host than on the SSD: the slots for their copies would be enough for the updates as well."""
    built, states = GPT2.model(n_layer=6), {"param": "device", "grad": "host", "states": 0.75}
    narrow = {"update": {"threads": 1, "ring_depth": 1}, "io": {"queue_depth": 1}}
    engine = Engine(built, exact_config(tmp_path, 1, states, built, **narrow))
    assert engine._commits is not None
    engine._commits._saver = Late(engine._commits._saver)
    for index in range(3):
        train(engine, GPT2, 1, first=index)
        engine.save_checkpoint()
    engine.drain()
    masters = {name: value.clone() for name, value in engine.state_dict(master=True).items()}
    engine._commits.wait()
    assert_committed(tmp_path / "run", 3, masters, [tmp_path / "pages"])
    engine.close()


def test_frozen_parameters_on_the_device_are_written_once_for_all_runs_of_a_folder(tmp_path: Path) -> None:
    frozen = GPT2.model()
    frozen.transformer.wte.weight.requires_grad_(False)  # type: ignore[union-attr]
    config = config_of(frozen, tmp_path, placement={"param": "device", "grad": "ssd", "states": "ssd"})
    engine = Engine(frozen, config)
    assert engine._commits is not None
    engine.save_checkpoint(wait=True)
    assert engine._commits.written_bytes > 0
    engine.close()
    again = GPT2.model()
    again.transformer.wte.weight.requires_grad_(False)  # type: ignore[union-attr]
    engine = Engine(again, config, resume=tmp_path / "run")
    train(engine, GPT2, 1)
    engine.save_checkpoint(wait=True)
    assert engine._commits is not None
    assert engine._commits.written_bytes == 0
    assert_slots_are_owned(engine)
    engine.close()


def test_parameter_written_by_hand_is_in_the_next_commit_and_not_in_the_one_being_made(tmp_path: Path) -> None:
    engine = Engine(model(), config_of(model(), tmp_path, placement=HOST, keep=2), faults=SLOW)
    train(engine, GPT2, 1)
    before = {name: value.clone() for name, value in engine.state_dict(master=True).items() if name != "seen"}
    engine.save_checkpoint()
    names = ["transformer.h.1.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight"]  # trainable, frozen
    with engine.gathered(names, modify=True) as values, torch.no_grad():
        for name in names:
            values[name].fill_(3.0)
    train(engine, GPT2, 1, first=1)
    engine.save_checkpoint(wait=True)
    engine.close()
    assert_committed(tmp_path / "run", 1, before, [tmp_path / "pages"])
    for step, value in ((1, before[names[1]]), (2, torch.full_like(before[names[1]], 3.0))):
        config = config_of(model(), tmp_path, placement=HOST, keep=2)
        loaded = Engine(model(), config, resume=tmp_path / "run", resume_step=step)
        assert torch.equal(loaded.state_dict()[names[1]], value), f"frozen parameter in the commit of step {step}"
        loaded.close()


def test_call_returns_before_the_commit_is_durable(tmp_path: Path) -> None:
    faults = native.FaultPlan(seed=4, delay=1.0, delay_seconds=0.05)
    engine = Engine(model(), config_of(model(), tmp_path, placement=HOST), faults=faults)
    train(engine, GPT2, 1)
    start = time.monotonic()
    engine.save_checkpoint()
    called = time.monotonic() - start
    assert steps_in(tmp_path / "run") == []
    engine._commits.wait()  # type: ignore[union-attr]
    assert steps_in(tmp_path / "run") == [1]
    assert engine.checkpoint_seconds > called
    engine.close()


def test_nothing_is_copied_of_states_on_the_ssd(tmp_path: Path) -> None:
    engine = Engine(GPT2.model(), config_of(GPT2.model(), tmp_path, placement=SSD))
    for index in range(3):
        train(engine, GPT2, 1, first=index)
        engine.save_checkpoint(wait=True)
    assert engine._commits is not None
    assert engine._commits.written_bytes == 0
    engine.close()


def test_host_pages_that_did_not_change_are_written_once(tmp_path: Path) -> None:
    engine = Engine(model(), config_of(model(), tmp_path, placement=HOST, keep=2))
    train(engine, GPT2, 1)
    engine.save_checkpoint(wait=True)
    assert engine._commits is not None
    first = engine._commits.written_bytes
    engine.save_checkpoint(wait=True)
    buffers = 20000 * 4
    assert engine._commits.written_bytes - first <= buffers + 4096
    engine.close()


def test_before_publish_runs_before_the_manifest_appears(tmp_path: Path) -> None:
    engine = Engine(model(), config_of(model(), tmp_path))
    seen: list[list[int]] = []
    engine.save_checkpoint(before_publish=lambda: seen.append(steps_in(tmp_path / "run")), wait=True)
    assert seen == [[]]
    assert steps_in(tmp_path / "run") == [0]
    engine.close()
    engine.close()


def test_save_without_a_folder_or_to_another_one_is_refused(tmp_path: Path) -> None:
    engine = Engine(model(), tight_config(model(), tmp_path))
    with pytest.raises(AngelPTMError, match=r"Set checkpoint\.folder"):
        engine.save_checkpoint()
    engine.close()
    engine = Engine(model(), config_of(model(), tmp_path))
    with pytest.raises(AngelPTMError, match=r"is not checkpoint\.folder.*checkpoint copy"):
        engine.save_checkpoint(tmp_path / "elsewhere")
    engine.save_checkpoint(tmp_path / "pages" / ".." / "run", wait=True)
    assert steps_in(tmp_path / "run") == [0]
    engine.close()
