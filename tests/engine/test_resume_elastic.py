"""A commit is resumed by runs that are laid out otherwise: pages, tiers, budgets, units, precision, folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from angelptm.config import Config
from angelptm.engine import Engine
from angelptm.engine.dtypes import rounded
from angelptm.errors import CheckpointError

from .commits import (
    DEVICE,
    DEVICE_HOST,
    HALF,
    HOST,
    SSD,
    Recorded,
    assert_committed,
    assert_continues,
    assert_slots_are_owned,
    committed,
    config_of,
    hashes,
    record,
    step_of,
    steps_in,
)
from .models import GPT2, PLAIN
from .training import PAGE, tight_config, train

STEPS, AT = 4, 2


def model() -> nn.Module:
    """With frozen parameters in units of their own and beside trainable ones, several pages a unit."""
    built = GPT2.model(n_embd=96)
    for name, param in built.named_parameters():
        if "h.0.ln_1" in name or "wpe" in name or "h.1.mlp.c_fc" in name:
            param.requires_grad_(False)
    return built


_recorded: dict[str, Recorded] = {}


def recorded(folder: Path, precision: str = "fp32", optimizer: dict[str, Any] | None = None) -> Recorded:
    """The uninterrupted run, trained once for all tests."""
    key = repr((precision, optimizer))
    if key not in _recorded:
        keys = {"optimizer": optimizer} if optimizer else {}
        engine = Engine(model(), tight_config(model(), folder, precision=precision, **keys))
        _recorded[key] = record(engine, step_of(GPT2), STEPS)
        engine.close()
    return _recorded[key]


def run_to_commit(config: Config, steps: int = AT) -> None:
    engine = Engine(model(), config)
    train(engine, GPT2, steps)
    engine.save_checkpoint(client_state={"from": "the first"})
    engine.close()


BF16 = {"precision": "bf16"}
INT8 = BF16 | {"optimizer": {"lr": 1e-2, "states": {"exp_avg": "int8", "exp_avg_sq": "int8", "int8_from_elements": 0}}}
SPLIT = BF16 | {"optimizer": {"lr": 1e-2, "states": {"master": "split"}}}
WHOLE = BF16 | {"optimizer": {"lr": 1e-2, "states": {"master": "fp32"}}}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "larger-pages": ({}, {"page_size": 4 * PAGE}),
    "smaller-pages": ({"page_size": 4 * PAGE}, {}),
    "smaller-pages-bf16": ({"page_size": 2 * PAGE, "precision": "bf16"}, {"precision": "bf16"}),
    "ssd-to-host": ({}, {"placement": HOST}),
    "host-to-ssd": ({"placement": HOST}, {}),
    "ssd-to-half": ({}, {"placement": HALF}),
    "device-to-ssd": ({"placement": DEVICE}, {}),
    "ssd-to-device": ({}, {"placement": DEVICE}),
    "host-to-device": ({"placement": HOST}, {"placement": DEVICE_HOST}),
    "no-ssd-to-ssd": ({"ssd": False}, {}),
    "units": ({}, {"units": {"classes": ["GPT2MLP", "GPT2Attention"]}}),
    "units-and-pages": ({"units": {"classes": ["GPT2MLP"]}}, {"page_size": 2 * PAGE, "placement": HALF}),
    "whole-to-split-masters": (WHOLE, SPLIT),
    "split-to-whole-masters": (SPLIT, WHOLE | {"page_size": 2 * PAGE}),
    "split-to-host": (SPLIT, SPLIT | {"placement": HOST}),
    "split-from-device": (SPLIT | {"placement": DEVICE}, SPLIT | {"page_size": 4 * PAGE}),
    "int8-larger-pages": (INT8, INT8 | {"page_size": 4 * PAGE}),
    "int8-half": (INT8 | {"page_size": 2 * PAGE}, INT8 | {"placement": HALF}),
    "split-units": (SPLIT, SPLIT | {"units": {"classes": ["GPT2MLP"]}, "placement": HALF}),
    "ring-and-threads": (
        {"update": {"threads": 1, "ring_depth": 1}},
        {"update": {"threads": 2, "ring_depth": 3}, "io": {"backend": "threads", "queue_depth": 3}},
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_run_laid_out_otherwise_goes_on_with_equal_bits(
    change: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    before, after = change
    run = recorded(tmp_path, before.get("precision", "fp32"), before.get("optimizer"))
    first, second = config_of(model(), tmp_path, **before), config_of(model(), tmp_path, **after)
    run_to_commit(first)
    engine = Engine(model(), second, resume=tmp_path / "run")
    assert engine.resumed is not None
    assert engine.resumed.client_state == {"from": "the first"}
    assert_slots_are_owned(engine)
    assert_continues(engine, step_of(GPT2), run, AT)
    engine.save_checkpoint(wait=True)
    assert_slots_are_owned(engine)
    engine.close()
    assert_committed(tmp_path / "run", STEPS, run.masters[STEPS], [tmp_path / "pages"])
    sets = {path.name.split("-")[1] for path in tmp_path.rglob("*.pages")}
    assert len(sets) == 1, "the files of the former layout went with its last commit"


def test_run_without_an_ssd_tier_finds_slots_that_lie_beside_the_manifests(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    first = config_of(model(), tmp_path)
    beside = [first.tiers.ssd[0].model_copy(update={"path": tmp_path / "run"})]
    run_to_commit(first.model_copy(update={"tiers": first.tiers.model_copy(update={"ssd": beside})}))
    engine = Engine(model(), config_of(model(), tmp_path, ssd=False), resume=tmp_path / "run")
    assert engine.resumed is not None
    assert engine.resumed.pages is not None
    assert engine.resumed.pages.adopted > 0
    assert_slots_are_owned(engine)
    assert_continues(engine, step_of(GPT2), run, AT)
    engine.close()


def test_slot_files_that_are_nowhere_are_named(tmp_path: Path) -> None:
    run_to_commit(config_of(model(), tmp_path))
    with pytest.raises(CheckpointError, match=r"angelptm-\w+-0\.pages.*no slot file.*Name the folder"):
        Engine(model(), config_of(model(), tmp_path, ssd=False), resume=tmp_path / "run")
    Engine(model(), config_of(model(), tmp_path), resume=tmp_path / "run").close()


def test_chain_of_changes_in_one_folder(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    chain: list[dict[str, Any]] = [
        {},
        {"page_size": 2 * PAGE},
        {"page_size": 2 * PAGE, "placement": HALF, "keep": 3},
        {"page_size": PAGE, "placement": HOST, "keep": 2, "units": {"classes": ["GPT2MLP"]}},
        {"placement": DEVICE, "keep": 2},
    ]
    for step, keys in enumerate(chain[:STEPS]):
        config = config_of(model(), tmp_path, **keys)
        engine = Engine(model(), config, resume=tmp_path / "run" if step else None)
        train(engine, GPT2, 1, first=step)
        engine.save_checkpoint(wait=True)
        assert_slots_are_owned(engine)
        engine.close()
    for step in steps_in(tmp_path / "run"):
        assert_committed(tmp_path / "run", step, run.masters[step], [tmp_path / "pages"])
    engine = Engine(model(), config_of(model(), tmp_path, **chain[-1]), resume=tmp_path / "run", resume_step=3)
    assert_continues(engine, step_of(GPT2), run, 3)
    engine.close()


def test_larger_device_budget_changes_no_bit(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    config = config_of(model(), tmp_path)
    run_to_commit(config)
    tiers = config.tiers.model_copy(update={"device": 4 * config.tiers.device, "host": 2 * config.tiers.host})
    engine = Engine(model(), config.model_copy(update={"tiers": tiers}), resume=tmp_path / "run")
    assert_continues(engine, step_of(GPT2), run, AT)
    engine.close()


@pytest.mark.parametrize("placement", [SSD, HALF], ids=["ssd", "half"])
def test_other_folder_leaves_the_run_it_comes_from_untouched(placement: dict[str, Any], tmp_path: Path) -> None:
    run = recorded(tmp_path)
    run_to_commit(config_of(model(), tmp_path, name="old", placement=placement))
    before = hashes(tmp_path / "old", tmp_path / "pages")
    engine = Engine(model(), config_of(model(), tmp_path, name="new", placement=placement), resume=tmp_path / "old")
    assert engine.resumed is not None
    assert engine.resumed.pages is not None
    assert engine.resumed.pages.adopted == 0
    assert_continues(engine, step_of(GPT2), run, AT)
    engine.save_checkpoint(wait=True)
    engine.close()
    after = hashes(tmp_path / "old", tmp_path / "pages")
    assert {path: after[path] for path in before} == before
    assert_committed(tmp_path / "new", STEPS, run.masters[STEPS], [tmp_path / "pages"])


def test_same_layout_is_adopted_and_nothing_but_parameters_is_written(tmp_path: Path) -> None:
    config = config_of(PLAIN.model(), tmp_path, placement=SSD)
    engine = Engine(PLAIN.model(), config)
    train(engine, PLAIN, 2)
    engine.save_checkpoint()
    engine.close()
    engine = Engine(PLAIN.model(), config, resume=tmp_path / "run")
    kinds = {kind: sum(tiers.values()) // config.page_size for kind, tiers in engine.plan.kind_bytes.items()}
    states = kinds["MASTER"] + kinds["EXP_AVG"] + kinds["EXP_AVG_SQ"]
    assert engine.resumed is not None
    assert engine.resumed.pages is not None
    pages = engine.resumed.pages
    assert (pages.adopted, pages.read, pages.cleared) == (states, 0, 0)
    traffic = engine.traffic()["ssd"]

    def whole(elements: int) -> int:
        """Bytes of a unit's pages as they travel: each is padded to 4096."""
        full, rest = divmod(elements * 4, config.page_size)
        return full * config.page_size + -(-rest // 4096) * 4096

    parameters = sum(whole(unit.layout.trainable_elements) for unit in engine.plan.units)
    assert traffic == {"read": parameters, "written": parameters}, "MASTER read, PARAM written, each once"
    engine.close()


@pytest.mark.parametrize("placement", [SSD, HALF], ids=["ssd", "half"])
def test_fp32_commit_resumes_in_bf16_and_back_with_the_same_states(placement: dict[str, Any], tmp_path: Path) -> None:
    """Masters and moments are fp32 in either precision, so nothing is lost on the way."""
    run_to_commit(config_of(model(), tmp_path, placement=placement, keep=2))
    folders = [tmp_path / "pages"]
    states = committed(tmp_path / "run", AT, folders)
    for precision in ("bf16", "fp32"):
        config = config_of(model(), tmp_path, placement=placement, precision=precision, keep=2)
        engine = Engine(model(), config, resume=tmp_path / "run")
        masters = engine.state_dict(master=True)
        values = engine.state_dict()
        for name, param in model().named_parameters():
            assert torch.equal(values[name], rounded(masters[name], values[name].dtype)), name
            if not param.requires_grad:
                expected = rounded(param.detach(), torch.bfloat16).to(values[name].dtype)
                assert torch.equal(values[name], expected), name
        engine.save_checkpoint(wait=True)
        engine.close()
        found = committed(tmp_path / "run", AT, folders)
        assert found.keys() == states.keys()
        for key, content in states.items():
            assert np.array_equal(found[key], content), key
    engine = Engine(model(), config, resume=tmp_path / "run")
    assert torch.isfinite(torch.stack(train(engine, GPT2, 2))).all()
    engine.close()
