"""list, show and verify: what a commit is, and whether it is intact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.records import NONE

from .runs import Run


def in_json(angelptm: Callable, *arguments: str, code: int = 0) -> dict[str, Any]:
    outcome = angelptm("checkpoint", *arguments, "--json")
    assert outcome.code == code, outcome.err
    assert outcome.out.count("\n") == 1, "one object on one line"
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def manifest_path(run: Run, step: int) -> Path:
    return run.folder / "checkpoint" / "commits" / f"step-{step:012d}.manifest"


def spoil(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def first_page(run: Run, step: int, index: int = 0) -> tuple[Path, int, int]:
    """(file, offset, record) of a stored page."""
    manifest = CheckpointFolder.read(run.folder).load(step)
    record = [i for i, page in enumerate(manifest.pages) if page["file"] != NONE][index]
    page = manifest.pages[record]
    name = manifest.header.files[int(page["file"])].name
    return run.ssd / name, int(page["slot"]) * manifest.header.page_bytes, record


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_list_has_a_row_for_each_commit_and_names_a_damaged_one(angelptm: Callable, run_copy: Run) -> None:
    spoil(manifest_path(run_copy, 1), 200)
    found = in_json(angelptm, "list", str(run_copy.folder))
    assert found == in_json(angelptm, "list", str(run_copy.folder / "checkpoint"))
    damaged, intact = found["commits"]
    assert (damaged["step"], intact["step"]) == (1, 2)
    assert "CRC32C" in damaged["error"]
    assert intact["error"] is None
    assert intact["stored_bytes"] >= 3 * 4 * 110_336
    table = angelptm("checkpoint", "list", str(run_copy.folder)).out
    assert "intact" in table
    assert "damaged" in table
    assert "CRC32C" in table


def test_show_has_the_facts_of_the_header(angelptm: Callable, trained: Run) -> None:
    facts = in_json(angelptm, "show", str(trained.folder), "--params")
    assert facts["step"] == 2
    assert facts["precision"] == trained.precision
    assert facts["parameter_elements"] == facts["trainable_elements"] == 110_336
    assert facts["counters"] == {"min": 2, "max": 2}
    assert facts["data"] == {"position": 1}
    assert facts["client"] == {"note": "ok"}
    kinds = {"fp32": {"MASTER", "EXP_AVG", "EXP_AVG_SQ"}, "bf16": {"STATES", "PARAM"}}
    assert kinds[trained.precision] <= set(facts["kinds"])
    assert sum(kind["stored_bytes"] for kind in facts["kinds"].values()) == facts["stored_bytes"]
    assert sum(one["elements"] for one in facts["params"]) == 110_336
    tied = next(one for one in facts["params"] if one["name"] == "transformer.wte.weight")
    assert "lm_head.weight" in tied["names"]
    assert in_json(angelptm, "show", str(trained.folder), "--step", "1")["step"] == 1
    text = angelptm("checkpoint", "show", str(trained.folder), "--params").out
    state_kind = {"fp32": "EXP_AVG_SQ", "bf16": "STATES"}[trained.precision]
    for part in ("adamw", "110,336", state_kind, "transformer.ln_f.bias", facts["config_hash"]):
        assert part in text


def test_verify_reads_every_page_and_says_how_fast(angelptm: Callable, trained: Run) -> None:
    found = in_json(angelptm, "verify", str(trained.folder), "--all", "--ssd", str(trained.ssd))
    assert found["intact"] is True
    assert [one["step"] for one in found["commits"]] == [1, 2]
    for one in found["commits"]:
        assert one["bytes"] >= 3 * 4 * 110_336
        assert one["bytes_per_s"] > 0
    assert "GB/s" in angelptm("checkpoint", "verify", str(trained.folder), "--ssd", str(trained.ssd)).out


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_verify_names_each_bad_page(angelptm: Callable, run_copy: Run) -> None:
    path, offset, record = first_page(run_copy, 2)
    spoil(path, offset + 5)
    other, other_offset, other_record = first_page(run_copy, 2, 7)
    spoil(other, other_offset)
    arguments = ("verify", str(run_copy.folder), "--ssd", str(run_copy.ssd))
    found = in_json(angelptm, *arguments, code=1)
    assert found["intact"] is False
    bad = found["commits"][0]["bad_pages"]
    assert {(one["page"], one["offset"], one["path"]) for one in bad} == {
        (record, offset, str(path)),
        (other_record, other_offset, str(other)),
    }
    assert all(one["expected_crc"] != one["found_crc"] for one in bad)
    outcome = angelptm("checkpoint", *arguments)
    assert outcome.code == 1
    assert "2 bad of 33 pages" in outcome.out
    assert bad[0]["parameter"] in outcome.out
    assert bad[0]["found_crc"] in outcome.out
    found = in_json(angelptm, "verify", str(run_copy.folder), "--all", "--ssd", str(run_copy.ssd), code=1)
    assert [one["intact"] for one in found["commits"]] == [True, False]


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_verify_all_goes_on_after_a_damaged_manifest(angelptm: Callable, run_copy: Run) -> None:
    spoil(manifest_path(run_copy, 1), 3000)
    found = in_json(angelptm, "verify", str(run_copy.folder), "--all", "--ssd", str(run_copy.ssd), code=1)
    assert [one["intact"] for one in found["commits"]] == [False, True]
    assert "CRC32C" in found["commits"][0]["error"]


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_verify_works_while_a_run_has_the_folder(angelptm: Callable, run_copy: Run) -> None:
    with CheckpointFolder.open(run_copy.folder):
        assert in_json(angelptm, "verify", str(run_copy.folder), "--ssd", str(run_copy.ssd))["intact"]


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
@pytest.mark.parametrize("command", ["verify", "export", "copy", "gc"])
def test_missing_slot_file_is_an_error_that_names_the_folder_to_pass(
    command: str, angelptm: Callable, run_copy: Run, tmp_path: Path
) -> None:
    more = [str(tmp_path / "out")] if command in ("export", "copy") else []
    config = run_copy.folder / "config.yaml"
    text = config.read_text()
    path, _, _ = first_page(run_copy, 2)
    for hint in (True, False):
        outcome = angelptm("checkpoint", command, str(run_copy.folder), *more)
        assert outcome.code == 2
        assert outcome.err.count("error:") == 1
        assert path.name in outcome.err
        assert ("config.yaml names --ssd" in outcome.err) == hint
        config.write_text("tiers: {ssd: [{path: /no/such/folder}, 7]}")
    config.write_text(text)
    with path.open("r+b") as file:
        file.truncate(65536)
    outcome = angelptm("checkpoint", command, str(run_copy.folder), *more, "--ssd", str(run_copy.ssd))
    assert outcome.code == 2
    assert "cut short" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
@pytest.mark.parametrize("command", ["show", "verify", "export", "copy"])
def test_step_without_a_commit_is_an_error_that_lists_the_others(
    command: str, angelptm: Callable, trained: Run, tmp_path: Path
) -> None:
    more = [str(tmp_path / "out")] if command in ("export", "copy") else []
    outcome = angelptm("checkpoint", command, str(trained.folder), *more, "--step", "9")
    assert outcome.code == 2
    assert "commits of step 1, 2" in outcome.err
    assert "step 9" in outcome.err


@pytest.mark.parametrize("command", ["list", "show", "verify", "gc"])
def test_folder_without_a_checkpoint_is_an_error(command: str, angelptm: Callable, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        outcome = angelptm("checkpoint", command, str(path))
        assert outcome.code == 2
        assert "no checkpoint" in outcome.err
        assert not list(tmp_path.iterdir())
