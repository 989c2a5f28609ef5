"""A step on a machine that a file describes: its time, its memory, and the settings and models that are best there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from angelptm.config import Config, load_config
from angelptm.config.schema import Hardware
from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of
from angelptm.errors import AngelPTMError, CapacityError, ConfigError
from angelptm.foresight import outlook as subject
from angelptm.foresight.outlook import described_machine, look_ahead, outlook_of, require_memory
from angelptm.foresight.search import Search, largest_that_fits
from angelptm.foresight.step import foresee
from angelptm.model.materialize import build_model
from angelptm.plan import Plan

from ..config.test_hardware import GPU

MIB = 2**20


def described(folder: Path, gpu: str = "2GiB", host: str = "4GiB", **sections: Any) -> Path:
    content = {**GPU, "device": {**GPU["device"], "memory": gpu}, "host": {**GPU["host"], "memory": host}, **sections}
    path = folder / "hardware.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def config_of(folder: Path, hardware: Path | None = None, **keys: Any) -> Config:
    return load_config(
        {
            "device": "cuda",
            "hardware": str(hardware or described(folder)),
            "tiers": {"device": "128MiB", "host": "256MiB", "ssd": [{"path": str(folder / "ssd")}]},
            "page_size": "1MiB",
            "precision": "bf16",
            "model": {"preset": "gpt2-demo"},
            "data": {"sequence_length": 64, "micro_batch_size": 2},
            **keys,
        }
    )


def hardware_of(config: Config) -> Hardware:
    found = config.described_hardware()
    assert found is not None
    return found


def made(config: Config) -> tuple[Any, Plan]:
    model = build_model(config)
    return model, plan_of(*lay_out(model, config), config, buffer_bytes_of(model), hardware_of(config))


def seen(config: Config) -> subject.Outlook:
    model, plan = made(config)
    return look_ahead(model, config, plan, described_machine(hardware_of(config), config))


def test_faster_machine_has_faster_steps(tmp_path: Path) -> None:
    on_ssd: dict[str, Any] = {"placement": {"param": "ssd", "states": "ssd"}, "update": {"threads": 2}}
    usual = seen(config_of(tmp_path, **on_ssd))
    drive = {**GPU["ssd"][0], "read_bytes_per_s": 7e8, "write_bytes_per_s": 3e8, "mixed_bytes_per_s": 5e8}
    slow_drive = described(tmp_path, ssd=[drive])
    slow = seen(config_of(tmp_path, slow_drive, **on_ssd))
    assert slow.prediction.bottleneck == "ssd"
    assert 3 < slow.step_seconds / usual.step_seconds < 11
    assert usual.tokens_per_s == pytest.approx(128 / usual.step_seconds)
    assert usual.mfu == pytest.approx(usual.model_flops / usual.step_seconds / 1e14)
    assert slow.ssd_written_bytes_per_day == pytest.approx(slow.ssd_written_bytes * 86400 / slow.step_seconds)
    two = described(tmp_path, ssd=[drive, {**drive, "path": "/nvme/two"}])
    folders = [{"path": str(tmp_path / "ssd")}, {"path": str(tmp_path / "other")}]
    tiers = {"device": "128MiB", "host": "256MiB", "ssd": folders}
    both = seen(config_of(tmp_path, two, **on_ssd, tiers=tiers))
    assert slow.step_seconds / both.step_seconds == pytest.approx(2, rel=0.1)


def test_long_accumulation_takes_what_its_simulation_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, gradient_accumulation_steps=60, placement={"param": "ssd", "states": "ssd"})
    found = seen(config)
    assert found.micro_batches < 30
    monkeypatch.setattr(subject, "_FEW", 60)
    whole = seen(config)
    assert whole.micro_batches == 60
    assert found.step_seconds == pytest.approx(whole.step_seconds, rel=0.02)
    assert found.tokens_per_step == whole.tokens_per_step == 60 * 128
    assert found.model_flops == whole.model_flops


def test_updates_that_nobody_waits_for_leave_the_step_to_computing(tmp_path: Path) -> None:
    drive = {**GPU["ssd"][0], "read_bytes_per_s": 7e7, "write_bytes_per_s": 3e7, "mixed_bytes_per_s": 5e7}
    hardware = described(tmp_path, ssd=[drive])
    keys: dict[str, Any] = {"placement": {"states": "ssd"}}
    waiting = seen(config_of(tmp_path, hardware, **keys))
    late = seen(config_of(tmp_path, hardware, update={"mode": "lock_free"}, **keys))
    assert waiting.steps_behind is None
    assert late.steps_behind is not None
    assert late.step_seconds < waiting.step_seconds / 5
    assert late.steps_behind > 5


def test_memory_that_activations_need_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    hardware = described(tmp_path, gpu="1GiB")
    tiers = {"device": "300MiB", "host": "256MiB", "ssd": [{"path": str(tmp_path / "ssd")}]}
    config = config_of(tmp_path, hardware, model={"preset": "gpt2"}, tiers=tiers)
    model, plan = made(config)
    target = described_machine(hardware_of(config), config)
    found = look_ahead(model, config, plan, target)
    with pytest.raises(CapacityError, match="activations") as raised:
        require_memory(plan, 400 * MIB, found.workspace_bytes, config, target)
    assert raised.value.tier == "device"
    assert raised.value.needed_bytes > raised.value.available_bytes == 2**30
    assert "gradient_checkpointing: true" in raised.value.remedy
    with pytest.raises(CapacityError, match=r"Lower tiers\.device to") as raised:
        require_memory(plan, 10 * MIB, 0, config, target)
    size = raised.value.remedy.rpartition(" ")[2].rstrip(".")
    smaller = load_config(config, [f"tiers.device={size}"])
    require_memory(made(smaller)[1], 10 * MIB, 0, smaller, target)
    big = load_config(config, ["tiers.host=6GiB", "tiers.device=200MiB", "model.preset=gpt2-xl"])
    with pytest.raises(CapacityError, match=r"Lower tiers\.host") as raised:
        require_memory(made(big)[1], 0, 0, big, described_machine(hardware_of(big), big))
    assert raised.value.tier == "host"


def test_file_that_says_too_little_or_is_of_another_device_is_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"device": None}, "device"),
        ({"host": None}, "host"),
        ({"links": None}, "links"),
        ({"ssd": []}, "ssd"),
        ({"device": {**GPU["device"], "kind": "cpu"}}, "device.kind"),
    ):
        path = tmp_path / "hardware.yaml"
        path.write_text(yaml.safe_dump({**GPU, **changes}))
        config = config_of(tmp_path, path)
        with pytest.raises(ConfigError, match=said):
            described_machine(hardware_of(config), config)


def test_drive_that_is_here_has_the_room_that_it_has_now(tmp_path: Path) -> None:
    full = {**GPU["ssd"][0], "capacity": "1MiB"}
    with pytest.raises(CapacityError, match="tier ssd"):
        made(config_of(tmp_path, described(tmp_path, ssd=[full]), placement={"states": "ssd"}))
    here = described(tmp_path, ssd=[{**full, "path": str(tmp_path)}])
    assert made(config_of(tmp_path, here, placement={"states": "ssd"}))[1].ssd_slots > 1


def test_search_finds_settings_that_are_at_least_as_fast_and_that_fit(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        placement={"states": "ssd"},
        data={"sequence_length": 64, "micro_batch_size": 1},
        gradient_accumulation_steps=8,
    )
    hardware = hardware_of(config)
    target = described_machine(hardware, config)
    steps: list[str] = []
    found = Search(config, build_model(config), target, hardware).run(steps.append)
    before = seen(config)
    assert found[0].outlook.tokens_per_s >= before.tokens_per_s
    rates = [float(f"{one.outlook.tokens_per_s:.3g}") for one in found]
    assert rates == sorted(rates, reverse=True)
    assert {one.outlook.tokens_per_step for one in found} == {8 * 64}
    assert found[0].changes["data.micro_batch_size"] > 1
    assert {one.changes["gradient_checkpointing"] for one in found} == {True, False}
    assert any(one.changes.get("update.mode") == "lock_free" for one in found)
    assert len(steps) > 4
    for one in found:
        tried = load_config(config, [f"{key}={str(value).lower()}" for key, value in one.changes.items()])
        own = made(tried)[1]
        assert own.page_bytes == one.plan.page_bytes
        require_memory(own, one.outlook.activation_bytes, one.outlook.workspace_bytes, tried, target)


def test_search_where_nothing_fits_says_why(tmp_path: Path) -> None:
    config = config_of(tmp_path, described(tmp_path, gpu="770MiB"))
    hardware = hardware_of(config)
    with pytest.raises(CapacityError, match="device"):
        Search(config, build_model(config), described_machine(hardware, config), hardware).run(lambda _: None)


@pytest.mark.parametrize("preset", ["gpt2-demo", "llama-demo"])
def test_largest_model_fits_and_one_layer_more_does_not(preset: str, tmp_path: Path) -> None:
    drive = {**GPU["ssd"][0], "capacity": "400MiB"}
    config = config_of(tmp_path, described(tmp_path, ssd=[drive]), model={"preset": preset})
    hardware = hardware_of(config)
    target = described_machine(hardware, config)
    found = largest_that_fits(config, target, hardware, lambda _: None)
    key = "n_layer" if preset == "gpt2-demo" else "num_hidden_layers"
    plan = made(load_config(config, [f"model.config.{key}={found.layers}"]))[1]
    assert plan == found.plan
    assert found.parameters == sum(unit.layout.numel for unit in plan.units)
    assert found.layers > 6
    assert "tier ssd" in found.refusal
    with pytest.raises(CapacityError):
        made(load_config(config, [f"model.config.{key}={found.layers + 1}"]))


def test_encoder_and_decoder_grow_together(tmp_path: Path) -> None:
    shape = {"d_model": 128, "d_ff": 256, "num_heads": 2, "d_kv": 64, "vocab_size": 256, "decoder_start_token_id": 0}
    drive = {**GPU["ssd"][0], "capacity": "64MiB"}
    tiers = {"device": "64MiB", "host": "40MiB", "ssd": [{"path": str(tmp_path / "ssd")}]}
    config = config_of(
        tmp_path, described(tmp_path, ssd=[drive]), model={"model_type": "t5", "config": shape}, tiers=tiers
    )
    hardware = hardware_of(config)
    found = largest_that_fits(config, described_machine(hardware, config), hardware, lambda _: None)
    names = [unit.layout.name for unit in found.plan.units]
    assert sum("encoder.block" in name for name in names) == found.layers
    assert sum("decoder.block" in name for name in names) == found.layers


def test_model_without_a_known_number_of_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    hardware = hardware_of(config)
    monkeypatch.setattr("angelptm.foresight.search._LAYER_KEYS", (("depth",),))
    with pytest.raises(AngelPTMError, match="depth"):
        largest_that_fits(config, described_machine(hardware, config), hardware, lambda _: None)


def test_one_micro_batch_repeated_is_a_step_of_several(tmp_path: Path) -> None:
    config = config_of(tmp_path, gradient_accumulation_steps=3)
    model, plan = made(config)
    target = described_machine(hardware_of(config), config)
    one = foresee(model, config, plan, target.operators)
    three = one.repeated(3)
    assert len(three.trace.uses) == 3 * len(one.trace.uses)
    assert three.model_flops == 3 * one.model_flops
    last = max(done.use for done in three.trace.gradients)
    assert last == max(done.use for done in one.trace.gradients) + 2 * len(one.trace.uses)
    found = outlook_of(one, config, plan, target, 1.0)
    assert found.tokens_per_step == 3 * one.trace.tokens_per_step
