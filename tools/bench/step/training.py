"""What all cases of one run share: the architecture, the first values, and the batch of every step.

One process writes the values to a folder (``write_first_values``). AngelPTM forms the same ones from the seed by
itself, as its users do; the other cases read them.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 1
_BATCHES = 2  # taken in turn, so that a model which learns shows it within a few steps
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
MAX_NORM = 1.0


@dataclass(frozen=True)
class Work:
    """The step that is measured. ``values``: a folder with config.json and model.safetensors."""

    values: str
    preset: str
    batch: int
    sequence: int
    precision: str
    recompute: bool

    def architecture(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.values)

    def batches(self) -> list[dict[str, Any]]:
        import torch

        generator = torch.Generator().manual_seed(SEED)
        vocabulary = self.architecture().vocab_size
        tokens = [
            torch.randint(0, vocabulary, (self.batch, self.sequence), generator=generator) for _ in range(_BATCHES)
        ]
        return [{"input_ids": one, "labels": one} for one in tokens]

    def model(self) -> Any:
        """The model with its first values in memory, in compute precision."""
        import torch
        from safetensors import safe_open
        from transformers import AutoModelForCausalLM

        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]
        model = AutoModelForCausalLM.from_config(self.architecture(), dtype=dtype)
        with safe_open(Path(self.values) / "model.safetensors", "pt") as file, torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(file.get_tensor(name))
        if self.recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def masters(self, names: list[str]) -> dict[str, Any]:
        """The same values in fp32, by name."""
        from safetensors import safe_open

        with safe_open(Path(self.values) / "model.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in names}


def write_first_values(preset: str, folder: Path) -> dict[str, int]:
    """Writes them as ``angelptm.materialize`` forms them, in fp32; returns facts of the model."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from angelptm import materialize
    from angelptm.config import Config
    from angelptm.engine.setup import lay_out
    from angelptm.model.materialize import source_of
    from angelptm.model.presets import PRESETS

    keys = PRESETS[preset]
    without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = AutoConfig.for_model(keys["model_type"], **{**keys["config"], **without_dropout})
    config.save_pretrained(folder)
    model = materialize(config, seed=SEED)
    source, values = source_of(model), {}
    for layout in lay_out(model, Config(tiers={"device": "1GiB", "host": "1GiB"}))[1]:
        values.update(source.values(model, layout))
    save_file({name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors")
    parameters = sum(value.numel() for value in values.values())
    # Every matrix works once for each token, the embedding of tokens as the tied head; that of positions does not.
    matmul = parameters - config.n_positions * config.n_embd
    return {
        "parameters": parameters,
        "largest": max(value.numel() for value in values.values()),
        "matmul_parameters": matmul,
        "layers": config.n_layer,
        "width": config.n_embd,
        "vocabulary": config.vocab_size,
    }


class Steps:
    """Counts the steps of a case and hands each its batch."""

    def __init__(self, work: Work) -> None:
        self._batches = itertools.cycle(work.batches())

    def next(self) -> dict[str, Any]:
        return next(self._batches)


def timed_steps(trained: Any, count: int) -> tuple[float, list[float], list[float]]:
    """Seconds of a block of steps until everything that they began has ended; seconds and loss of each step."""
    losses, seconds = [], []
    start = before = time.perf_counter()
    for _ in range(count):
        losses.append(trained.step())
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    trained.drain()
    return time.perf_counter() - start, seconds, losses


if __name__ == "__main__":
    asked = Work(**json.loads(sys.argv[1]))
    print(json.dumps(write_first_values(asked.preset, Path(asked.values))))
