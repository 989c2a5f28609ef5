"""A run that is stopped for longer than its deadlines, as Ctrl-Z and schedulers do, goes on as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

DEADLINE_SECONDS = 1.0


@pytest.mark.slow
def test_stopped_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    content = {
        "tiers": {"device": "32MiB", "host": "64MiB", "ssd": [{"path": str(tmp_path / "ssd")}]},
        "page_size": "1MiB",
        "placement": {"param": "ssd", "states": "ssd"},
        "io": {"deadline_seconds": DEADLINE_SECONDS},
        "model": {"preset": "gpt2-demo"},
        "data": {"sequence_length": 16, "micro_batch_size": 1},
        "training": {"steps": 60, "eval_batches": 1, "threads": 1},
        "run_dir": str(tmp_path / "run"),
    }
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "angelptm.cli.main", "train", str(path), "--json"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        waiting = time.monotonic() + 120
        while not (tmp_path / "run/plan.json").exists():
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < waiting
            time.sleep(0.01)
        moments = random.Random(1)
        stops = 0
        while run.poll() is None and stops < 6:
            time.sleep(moments.uniform(0.05, 0.4))
            run.send_signal(signal.SIGSTOP)
            time.sleep(2 * DEADLINE_SECONDS)
            run.send_signal(signal.SIGCONT)
            stops += 1
        said, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 0, said
    assert stops > 1
    assert len(json.loads(said.splitlines()[-1])["losses"]) == 60
