"""Any rank is killed at any moment: what is left is one commit of all ranks, and the run ends as if nothing had been.

ANGELPTM_RANK_KILLS says how often, ANGELPTM_RANK_SEED when.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch

from tests.engine.models import GPT2
from tests.engine.training import tight_config

from .spawn import run_ranks, start_ranks, wait_for_ranks
from .work import train_on

KILLS = int(os.environ.get("ANGELPTM_RANK_KILLS", "6"))
SEED = int(os.environ.get("ANGELPTM_RANK_SEED", "1"))
STEPS, RANKS = 12, 3


def losses_in(folder: Path) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for path in folder.glob("loss-*"):
        found.setdefault(int(path.name.split("-")[1]), set()).add(path.read_text())
    return found


@pytest.mark.parametrize("placement", ["ssd", "host"])
def test_run_goes_on_from_a_commit_of_all_ranks(tmp_path: Path, placement: str) -> None:
    keys = {
        "placement": dict.fromkeys(("param", "grad", "states"), placement),
        "distributed": {"deadline_seconds": 10},
    }
    whole_config, config = (
        tight_config(GPT2.model(), tmp_path / name, checkpoint={"folder": str(tmp_path / name / "commits")}, **keys)
        for name in ("whole", "killed")
    )
    run_ranks(1, tmp_path / "first", os.getpid)  # what all are forked from is there afterwards
    began = time.monotonic()
    whole = run_ranks(RANKS, tmp_path / "whole", train_on, whole_config, STEPS, str(tmp_path / "whole"))
    seconds = time.monotonic() - began
    expected = losses_in(tmp_path / "whole")
    dice, killed = random.Random(SEED), 0
    while killed < KILLS:
        folder = tmp_path / "killed"
        processes = start_ranks(RANKS, folder, train_on, config, STEPS, str(folder))
        time.sleep(dice.uniform(0, seconds))
        victim = dice.choice(processes)
        if victim.exitcode is None:
            victim.kill()
            killed += 1
        if all(process.exitcode == 0 for process in processes):
            for path in folder.glob("commits/commits/*.manifest"):
                path.unlink()  # it got to the end: from the beginning, then
        time.sleep(dice.uniform(0, 0.2))  # torchrun ends the others soon
        for process in processes:
            process.kill()
            process.join()
    found = wait_for_ranks(start_ranks(RANKS, folder, train_on, config, STEPS, str(folder)), folder)
    for rank in range(RANKS):
        for name, value in whole[rank].items():
            assert torch.equal(found[rank][name], value), name
    for step, texts in losses_in(folder).items():
        assert texts == expected[step], f"step {step}, each time that it was taken"
    assert set(losses_in(folder)) == set(expected)
