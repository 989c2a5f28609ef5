"""A commit of some ranks is gone on from by as many, by more, by fewer, and by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.config import Config
from tests.engine.models import GPT2
from tests.engine.training import tight_config

from .spawn import run_ranks
from .work import Trained, train_and_commit

FIRST, MORE = 5, 4


def assert_equal(found: Trained, expected: Trained) -> None:
    for name, value in expected.values.items():
        assert torch.equal(found.values[name], value), name


@pytest.mark.parametrize("placement", ["ssd", "host"])
def test_as_many_ranks_go_on_bit_by_bit(tmp_path: Path, placement: str) -> None:
    homes = dict.fromkeys(("param", "grad", "states"), placement)
    folder = tmp_path / "commits"
    config = tight_config(GPT2.model(), tmp_path, placement=homes, checkpoint={"folder": str(folder)})
    whole = run_ranks(2, tmp_path / "whole", train_and_commit, "gpt2", config, 0, FIRST + MORE)
    for path in sorted(folder.glob("commits/*")):
        path.unlink()
    run_ranks(2, tmp_path / "first", train_and_commit, "gpt2", config, 0, FIRST)
    assert CheckpointFolder.read(folder).commits()[-1] == FIRST
    second = run_ranks(2, tmp_path / "second", train_and_commit, "gpt2", config, FIRST, MORE, 4, str(folder))
    for found, expected in zip(second, whole):
        assert found.losses == expected.losses[FIRST:]
        assert_equal(found, expected)
        assert found.fetches["adopted"] > 0
        assert found.fetches["read"] == 0
    assert len(list(tmp_path.glob("**/*.pages"))) == 2, "a slot file of each rank, and none of those before"


def in_folder(config: Config, folder: Path) -> Config:
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"folder": folder})})


def test_any_number_of_ranks_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "commits"
    config = tight_config(GPT2.model(), tmp_path, optimizer={"lr": 1e-3}, checkpoint={"folder": str(folder)})
    copies = 6  # twelve samples, for 1, 2, 3 and 4 ranks
    three = run_ranks(3, tmp_path / "three", train_and_commit, "gpt2", config, 0, FIRST, copies)
    loaded = {}
    for count in (1, 2, 4):
        own = in_folder(config, tmp_path / f"commits-{count}")
        arguments = ("gpt2", own, FIRST, MORE, copies, str(folder))
        found = run_ranks(count, tmp_path / f"of-{count}", train_and_commit, *arguments)
        loaded[count] = found[0]
        for one in found:
            assert one.losses == found[0].losses
            assert_equal(one, found[0])
            assert one.fetches["adopted"] == 0
    for count in (2, 4):
        for one, other in zip(loaded[count].losses, loaded[1].losses):
            assert abs(one - other) <= 1e-6 * other
    # In the folder itself: the slot files of three ranks go when nothing in them is needed any more.
    two = run_ranks(2, tmp_path / "two", train_and_commit, "gpt2", config, FIRST, MORE, copies, str(folder))
    assert two[0].losses == loaded[2].losses
    assert_equal(two[0], loaded[2])
    names = {path.name.rsplit("-", 1)[0] for path in tmp_path.glob("pages/*.pages")}
    assert len(names) == 4, "one set of each folder"
    with CheckpointFolder.read(folder) as after:
        assert after.load().header.step == FIRST + MORE
        assert len(after.load().header.files) == 2
        assert len(after.store_ids()) == 1
    assert three[0].losses[0] > two[0].losses[-1]
