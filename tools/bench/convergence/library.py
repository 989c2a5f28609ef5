"""A library's 8-bit AdamW beside ours: torchao's AdamW8bit on the same model in plain PyTorch, everything in DRAM.

Its moments have one scale for 256 elements and a dynamic code, after bitsandbytes; tensors below 4096 elements keep
fp32 moments. It is no dependency of this project: ``pip install torchao`` (0.18.0 was tried); torch.compile, which it
uses, wants a C++ compiler.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from angelptm.config import Config
from angelptm.engine.setup import lay_out
from angelptm.model.materialize import build_model, source_of


class Library:
    """See :class:`bench.convergence.training.Trained`."""

    def __init__(self, config: Config) -> None:
        """Raises RuntimeError where torchao is not there."""
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise RuntimeError(f"mode torchao-int8 needs torchao ({error}): pip install torchao") from None
        from transformers import AutoModelForCausalLM

        blank: Any = build_model(config)
        self.module: Any = AutoModelForCausalLM.from_config(blank.config)
        source, values = source_of(blank), {}
        for layout in lay_out(blank, config)[1]:
            values.update(source.values(blank, layout))
        with torch.no_grad():
            for name, param in self.module.named_parameters():
                param.copy_(values[name])
        self.module.train()
        keys = config.optimizer
        self.optimizer: torch.optim.Optimizer = AdamW8bit(
            self.module.parameters(), lr=keys.lr, betas=keys.betas, eps=keys.eps, weight_decay=keys.weight_decay
        )
        self._clip = config.gradient_clipping
        self.global_step = 0

    def step(self, batch: dict[str, Any]) -> None:
        self.module(**batch).loss.backward()
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.global_step += 1

    def loss(self, batch: dict[str, Any]) -> float:
        return float(self.module(**batch).loss)

    def stalled_seconds(self) -> float:
        return 0.0

    def drain(self) -> None:
        """Nothing is left under way."""

    def facts(self) -> dict[str, Any]:
        return {"staleness": {}, "library": f"torchao {metadata.version('torchao')}"}

    def close(self) -> None:
        pass
