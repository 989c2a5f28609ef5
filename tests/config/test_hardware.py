"""Hardware files and sizes that are left to the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from angelptm import memory
from angelptm.config import Config, load_config
from angelptm.config.schema import load_hardware
from angelptm.errors import ConfigError

GIB, MIB = 2**30, 2**20
FILES = sorted((Path(__file__).parents[2] / "configs/hardware").glob("*.yaml"))
GPU = {
    "device": {
        "kind": "cuda",
        "memory": "24GiB",
        "flops_per_s": {"fp32": 1e13, "bf16": 1e14},
        "memory_bytes_per_s": 1e12,
        "cached_bytes_per_s": 2e12,
    },
    "host": {
        "memory": "256GiB",
        "cores": 16,
        "copy_bytes_per_s": 8e9,
        "checksum_bytes_per_s": 1e10,
        "accumulate_bytes_per_s": 8e9,
        "update_elements_per_s": {"fp32": 4e8},
    },
    "links": {"host_to_device_bytes_per_s": 2.5e10, "device_to_host_bytes_per_s": 2.5e10},
    "ssd": [
        {
            "path": "/nvme/one",
            "capacity": "7TB",
            "read_bytes_per_s": 7e9,
            "write_bytes_per_s": 3e9,
            "mixed_bytes_per_s": 5e9,
        }
    ],
}


@pytest.fixture
def described(tmp_path: Path) -> str:
    path = tmp_path / "hardware.yaml"
    path.write_text(yaml.safe_dump(GPU))
    return str(path)


def tiers_of(**keys: Any) -> Config:
    return load_config({"tiers": {"device": "auto", "host": "auto"}, **keys})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hardware_file_of_the_repository_says_enough_to_predict_and_where_it_is_from(path: Path) -> None:
    hardware = load_hardware(path)
    assert hardware.predicts
    assert "Nobody measured" in hardware.source
    assert hardware.links is not None
    assert all(one.capacity for one in hardware.ssd)


def test_sizes_come_from_the_hardware_file(described: str) -> None:
    config = load_config(
        {"device": "cuda", "hardware": described, "tiers": {"device": "auto", "host": "auto", "ssd": "auto"}}
    )
    assert 12 * GIB < config.tiers.device < 20 * GIB
    assert 200 * GIB < config.tiers.host < 250 * GIB
    assert [str(one.path) for one in config.tiers.ssd] == ["/nvme/one"]
    assert config.tiers.device % MIB == config.tiers.host % MIB == 0
    # What was chosen is what a run's folder keeps.
    assert load_config(yaml.safe_load(config.resolved_yaml())) == config


def test_sizes_come_from_this_machine_within_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = memory.HostMemory(64 * GIB, 60 * GIB, 0, 32 * GIB, None)
    monkeypatch.setattr("angelptm.config.sizing.host_memory", lambda: found)
    tiers = tiers_of().tiers
    assert tiers.device == 2 * GIB
    assert tiers.device + tiers.host + 3 * GIB <= 32 * GIB
    assert tiers.host > 24 * GIB
    fixed = load_config({"tiers": {"device": "4GiB", "host": "auto"}}).tiers
    assert fixed.device == 4 * GIB
    assert fixed.host == tiers.host - 2 * GIB


def test_pool_for_a_gpu_is_within_the_memory_that_may_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("angelptm.config.sizing.gpu_memory_bytes", lambda _: 80 * GIB)
    monkeypatch.setattr(
        "angelptm.config.sizing.host_memory", lambda: memory.HostMemory(512 * GIB, 512 * GIB, 0, None, 8 * GIB)
    )
    tiers = tiers_of(device="cuda:1").tiers
    assert tiers.host <= 8 * GIB
    assert tiers.device == 48 * GIB


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(content)
    return str(raised.value)


def test_what_cannot_be_sized_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = {"device": "auto", "host": "auto"}
    monkeypatch.setattr("angelptm.config.sizing.gpu_memory_bytes", lambda _: None)
    said = refusal({"device": "cuda", "tiers": auto})
    assert "tiers.device: found 'auto'" in said
    assert "no such GPU" in said
    said = refusal({"tiers": {**auto, "ssd": "auto"}})
    assert "tiers.ssd" in said
    assert "angelptm measure" in said
    said = refusal({"tiers": auto, "hardware": str(tmp_path / "none.yaml")})
    assert "No such file" in said
    small = memory.HostMemory(3 * GIB, GIB, 0, None, None)
    monkeypatch.setattr("angelptm.config.sizing.host_memory", lambda: small)
    assert "tiers.host" in refusal({"tiers": auto})
    assert "tiers.host: found 'plenty'" in refusal({"tiers": {"device": "auto", "host": "plenty"}})


def test_hardware_auto_needs_no_file() -> None:
    config = load_config({"tiers": {"device": "64MiB", "host": "64MiB"}, "hardware": "auto"})
    assert config.hardware == "auto"
    assert config.described_hardware() is None
    assert load_config(yaml.safe_load(config.resolved_yaml())) == config
