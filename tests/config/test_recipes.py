"""Every recipe is a config that this version takes, and a plan that fits the machine that it names."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from angelptm.config import load_config
from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of
from angelptm.model.materialize import build_model
from angelptm.model.presets import PRESETS

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.*") if path.is_file() and path.parent.name != "hardware")
# Parameters in billions, from the papers' tables and the published weights.
SIZES = {
    "gpt3-125m": 0.125, "gpt3-350m": 0.355, "gpt3-760m": 0.76, "gpt3-1.3b": 1.32, "gpt3-2.7b": 2.65, "gpt3-6.7b": 6.66,
    "gpt3-13b": 12.85, "gpt3-30b": 29.97, "gpt3-175b": 174.6, "llama3-8b": 8.03, "llama3-70b": 70.55,
    "qwen2.5-7b": 7.62, "qwen2.5-32b": 32.76, "t5-3b": 2.78, "t5-11b": 11.0,
}  # fmt: skip


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_taken_and_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(path)
    assert config.training.steps > 0
    assert config.model.given
    if config.model.preset == "switch-1.2t":
        pytest.skip("takes minutes, and gigabytes of modules")
    drive = 8 * 2**40
    monkeypatch.setattr("angelptm.engine.setup.shutil.disk_usage", lambda _: Usage(drive, 0, drive))
    model = build_model(config)
    plan = plan_of(*lay_out(model, config), config, buffer_bytes_of(model))
    host = plan.ring_frames + plan.home_frames + plan.moving_frames + plan.spare_frames
    assert host * plan.page_bytes <= config.tiers.host
    assert plan.arena.peak_frames * plan.page_bytes <= config.tiers.device
    if config.device == "cuda":
        assert plan.kind_bytes["PARAM"]["device"] == 0
        assert plan.readout_frames > 0


@pytest.mark.parametrize("preset", SIZES)
def test_preset_has_the_size_in_its_name(preset: str) -> None:
    config = load_config({"tiers": {"device": "1GiB", "host": "1GiB"}, "model": {"preset": preset}})
    parameters = sum(param.numel() for param in build_model(config).parameters())
    assert parameters / 1e9 == pytest.approx(SIZES[preset], rel=0.01)
    assert PRESETS[preset]["config"]
