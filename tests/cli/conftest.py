"""Runs the command in this process, so that a test does not pay for importing torch again."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from .runs import Run, make_run

SMALL = """
tiers:
  device: 512KiB
  host: 1MiB
  ssd: [{path: SSD}]
page_size: 64KiB
precision: fp32
placement: {param: ssd, grad: ssd, states: ssd}
optimizer: {type: adamw, lr: 1e-3}
model:
  preset: gpt2-demo
  config: {n_layer: 2, n_embd: 64, n_head: 2, n_positions: 64}
data: {path: CORPUS, sequence_length: 32, micro_batch_size: 2, validation_fraction: 0.2}
training: {steps: 3, seed: 1, eval_batches: 2, sample_tokens: 8, threads: 1}
run_dir: RUN
"""


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def angelptm(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """``angelptm("plan", "config.yaml")`` → exit code, standard output and error."""
    from angelptm.cli.main import main

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["angelptm", *arguments])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A small run on a small corpus, all below ``tmp_path``: ``run`` and ``ssd`` do not exist yet."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(5):
        (corpus / f"{index}.txt").write_text(f"chapter {index}. " + "the quick brown fox jumps. " * 60)
    text = SMALL.replace("SSD", str(tmp_path / "ssd")).replace("CORPUS", str(corpus))
    path = tmp_path / "small.yaml"
    path.write_text(text.replace("RUN", str(tmp_path / "run")))
    return path


@pytest.fixture(scope="session", params=["fp32", "bf16"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with commits, not to be changed."""
    return make_run(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def run_copy(trained: Run, tmp_path: Path) -> Run:
    """A run of one's own, to be damaged."""
    shutil.copytree(trained.folder, tmp_path / "run")
    shutil.copytree(trained.ssd, tmp_path / "ssd")
    return Run(tmp_path / "run", tmp_path / "ssd", trained.export, trained.masters, trained.precision)
