"""A rank that dies, stops or hangs: every other one ends within the deadline, and says who it was."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.engine.models import GPT2
from tests.engine.training import tight_config

from .spawn import result_of, start_ranks
from .work import train_until_something_happens

DEADLINE = 8


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("kill", r"rank 1 \(process \d+ on .*\) tells nothing any more: it died, was stopped, or cannot be reached"),
        ("stop", r"rank 1 \(process \d+ on .*\) tells nothing any more: it died, was stopped, or cannot be reached"),
        ("raise", r"rank 1 \(process \d+ on .*\) ended with ValueError: something of its own"),
        ("sleep", r"rank 1 \(process \d+ on .*\) lives and did not come"),
    ],
)
def test_others_end_in_time_and_name_it(tmp_path: Path, what: str, said: str) -> None:
    keys = {"distributed": {"deadline_seconds": DEADLINE}}
    config = tight_config(GPT2.model(), tmp_path, **keys)
    folder = tmp_path / "ranks"
    processes = start_ranks(3, folder, train_until_something_happens, "gpt2", config, what, str(folder))
    limit = time.monotonic() + 120
    while not (folder / "there").exists():
        assert time.monotonic() < limit, (folder / "output-1").read_text()
        time.sleep(0.05)
    began = time.monotonic()
    try:
        for rank in (0, 2):
            processes[rank].join(60)
            assert processes[rank].exitcode == 0, (folder / f"output-{rank}").read_text()
        took = time.monotonic() - began
        for rank in (0, 2):
            text = result_of(folder, rank)
            assert re.search(said, text), text
            assert f"rank {rank} of 3, at " in text
            assert "goes on from its last commit" in text
        assert took < 3 * DEADLINE, took
    finally:
        for process in processes:
            process.kill()
            process.join()
