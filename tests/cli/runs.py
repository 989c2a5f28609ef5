"""Small runs that make real commits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from angelptm import materialize
from angelptm.config import Config, load_config
from angelptm.engine import Engine


@dataclass(frozen=True)
class Run:
    """``folder``: the run folder, with commits of steps 1 and 2 and the config; ``ssd``: its slot files; ``export``:
    what the engine exports after step 2; ``masters``: the same in fp32."""

    folder: Path
    ssd: Path
    export: Path
    masters: Path
    precision: str


def run_config(checkpoint: Path, ssd: Path, precision: str, **keys: Any) -> Config:
    content: dict[str, Any] = {
        "tiers": {"device": "1MiB", "host": "2MiB", "ssd": [{"path": str(ssd)}]},
        "page_size": "64KiB",
        "precision": precision,
        "placement": {"param": "ssd", "grad": "ssd", "states": "ssd"},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"folder": str(checkpoint), "keep": 2},
    }
    return load_config(content | keys)


@contextmanager
def engine_of(config: Config, **keys: Any) -> Iterator[Engine]:
    """An engine over a GPT-2 of 110,336 parameters, which has a tied head."""
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 128, "n_positions": 32}
    architecture = AutoConfig.for_model("gpt2", **sizes, bos_token_id=0, eos_token_id=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that waking a second one costs more than it computes
    engine = Engine(materialize(architecture, seed=3), config, **keys)
    try:
        yield engine
    finally:
        engine.close()
        torch.set_num_threads(threads)


def train_step(engine: Engine, index: int) -> torch.Tensor:
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(index))
    loss: torch.Tensor = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def continuation(config: Config, resume: Path, step: int | None = None) -> list[torch.Tensor]:
    """Losses of two more steps after a resume, and every master afterwards."""
    with engine_of(config, resume=resume, resume_step=step) as engine:
        losses = [train_step(engine, engine.global_step) for _ in range(2)]
        return [*losses, *engine.state_dict(master=True).values()]


def make_run(base: Path, precision: str) -> Run:
    run = Run(base / "run", base / "ssd", base / "export", base / "masters", precision)
    config = run_config(run.folder / "checkpoint", run.ssd, precision)
    with engine_of(config) as engine:
        for step in range(2):
            train_step(engine, step)
            engine.save_checkpoint(data={"position": step}, client_state={"note": "ok"}, wait=True)
        engine.export_safetensors(run.export)
        engine.export_safetensors(run.masters, master=True)
    (run.folder / "config.yaml").write_text(config.resolved_yaml())
    return run
