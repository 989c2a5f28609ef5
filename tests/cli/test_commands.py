"""What the commands print and write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml


def test_train_json_is_the_last_line_and_has_the_promised_keys(
    angelptm: Callable, config_file: Path, tmp_path: Path
) -> None:
    outcome = angelptm("train", str(config_file), "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out.strip().splitlines()[-1])
    assert len(result["losses"]) == len(result["step_seconds"]) == 3
    assert result["tokens_per_s"] > 0
    assert set(result["bytes"]) == set(result["peak_bytes"]) == {"device", "host", "ssd"}
    assert all(set(moved) == {"read", "written"} and moved["read"] > 0 for moved in result["bytes"].values())
    assert result["peak_bytes"]["device"] <= 512 * 2**10
    assert result["peak_bytes"]["host"] <= 2**20
    assert result["phase_seconds"]["forward"] > 0
    assert result["peak_rss_bytes"] > 0
    assert result["run_dir"] == str(tmp_path / "run")
    assert len(result["sample"]) > 0


def test_train_writes_a_run_folder_that_says_what_ran(angelptm: Callable, config_file: Path, tmp_path: Path) -> None:
    outcome = angelptm("train", str(config_file), "--set", "training.eval_every=2")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["page_size"] == "64KiB"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert any("validation_loss" in line for line in lines)
    assert json.loads((run / "result.json").read_text())["validation_loss_after"] is not None
    assert json.loads((run / "plan.json").read_text())["fits"] is True
    assert "validation loss" in outcome.out
    assert str(run) in outcome.out


def test_same_config_gives_the_same_losses_under_other_budgets(angelptm: Callable, config_file: Path) -> None:
    def losses(*arguments: str) -> list[float]:
        outcome = angelptm("train", str(config_file), "--json", *arguments)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out.strip().splitlines()[-1])["losses"]

    large = ["tiers.device=64MiB", "tiers.host=64MiB", "placement={}", "page_size=128KiB", "tiers.ssd=[]"]
    assert losses() == losses(*(part for key in large for part in ("--set", key)))


def test_plan_allocates_nothing_and_counts_all_kinds(angelptm: Callable, config_file: Path, tmp_path: Path) -> None:
    outcome = angelptm("plan", str(config_file), "--json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert plan["fits"] is True
    assert set(plan["kinds"]) == {"PARAM", "GRAD", "MASTER", "EXP_AVG", "EXP_AVG_SQ"}
    assert plan["kinds"]["MASTER"]["ssd"] >= 4 * plan["parameters"]
    assert not (tmp_path / "ssd").exists()
    assert not (tmp_path / "run").exists()
    table = angelptm("plan", str(config_file)).out
    assert "MASTER" in table
    assert "fits" in table


@pytest.mark.parametrize("name", ["demo.yaml", "gpt2.yaml", "gpt2-medium.yaml", "ds_z3_nvme.json"])
def test_recipe_for_a_small_machine_has_a_plan_that_fits(name: str, angelptm: Callable, tmp_path: Path) -> None:
    """Those for large ones are in tests/config/test_recipes.py."""
    recipe = Path(__file__).parents[2] / "configs" / name
    outcome = angelptm("plan", str(recipe), "--set", f"tiers.ssd.0.path={tmp_path}", "--json")
    assert outcome.code == 0, outcome.err


def test_report_is_json_for_programs(angelptm: Callable) -> None:
    report = json.loads(angelptm("report", "--json").out)
    assert report["versions"]["torch"]
