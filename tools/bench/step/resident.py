"""Plain PyTorch with parameters, gradients and states in DRAM, and torch's fused AdamW: the case to beat.

bf16 keeps fp32 masters as AngelPTM does. What can be had for nothing is taken: gradients are cast and parameters
published in one multi-tensor call each, into tensors that stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.step.training import LEARNING_RATE, MAX_NORM, WEIGHT_DECAY, Steps, Work


class Resident:
    def __init__(self, work: Work, folder: Path, clip: bool, config: dict[str, Any]) -> None:
        import torch

        del folder, config  # of the cases that page
        self._model = work.model()
        named = dict(self._model.named_parameters())
        self._params = list(named.values())
        self._masters = self._params
        if work.precision != "fp32":
            values = work.masters(list(named))
            self._masters = [torch.nn.Parameter(values[name].clone()) for name in named]
            for master in self._masters:
                master.grad = torch.zeros_like(master)
        self._optimizer = torch.optim.AdamW(self._masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        self._clip = clip
        self._steps = Steps(work)

    def step(self) -> float:
        import torch

        loss = self._model(**self._steps.next()).loss
        value = float(loss.detach())
        loss.backward()
        if self._masters is self._params:
            self._update()
            self._optimizer.zero_grad()
            return value
        with torch.no_grad():
            torch._foreach_copy_([master.grad for master in self._masters], [param.grad for param in self._params])
            for param in self._params:
                param.grad = None
            self._update()
            torch._foreach_copy_(self._params, self._masters)
        return value

    def _update(self) -> None:
        import torch

        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._masters, MAX_NORM, foreach=True)
        self._optimizer.step()

    def drain(self) -> None:
        """Nothing is left under way."""

    def facts(self) -> dict[str, Any]:
        import torch

        return {"parameters": sum(param.numel() for param in self._params), "torch": torch.__version__}

    def counters(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass
