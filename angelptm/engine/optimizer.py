"""The torch Optimizer whose states live in pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import angelptm_native as native
import torch

from angelptm import kernels
from angelptm.config.schema import Optimizer as OptimizerConfig
from angelptm.errors import AngelPTMError

RULES = {"adamw": native.Rule.ADAMW, "sgd": native.Rule.SGD, "lion": native.Rule.LION}


class PagedOptimizer(torch.optim.Optimizer):
    """Drives lr, weight decay and the other hyperparameters through ``param_groups``, as any torch Optimizer does.

    The parameters in its groups are parked ones. ``step`` takes the gradients: they are gone afterwards, as if
    ``zero_grad`` had been called. It returns before the update is done; the next use of each unit waits for its part.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        config: OptimizerConfig,
        take_step: Callable[[], None],
        drop_gradients: Callable[[], None],
        *,
        seed: int = 0,
    ) -> None:
        """``seed``: of random rounding, where states are in formats that need it."""
        self._seed = seed
        self.rule = RULES[config.type]
        self._take_step = take_step
        self._drop_gradients = drop_gradients
        super().__init__(
            groups,
            {
                "lr": config.lr,
                "betas": config.betas,
                "eps": config.eps,
                "weight_decay": config.weight_decay,
                "momentum": config.momentum,
                "dampening": config.dampening,
                "nesterov": config.nesterov,
            },
        )

    def hyper(self, group: dict[str, Any], step: int, grad_scale: float) -> native.Hyper:
        """The kernel's arguments for a parameter of ``group`` at its ``step``-th update, counted from 1."""
        hyper = self._rule_hyper(group, step, grad_scale)
        hyper.seed, hyper.step = self._seed, step
        return hyper

    def _rule_hyper(self, group: dict[str, Any], step: int, grad_scale: float) -> native.Hyper:
        lr = float(group["lr"])
        if self.rule == native.Rule.ADAMW:
            return kernels.adamw_hyper(
                lr, group["betas"], group["eps"], group["weight_decay"], step=step, grad_scale=grad_scale
            )
        if self.rule == native.Rule.SGD:
            return kernels.sgd_hyper(
                lr,
                group["momentum"],
                group["dampening"],
                group["weight_decay"],
                group["nesterov"],
                step=step,
                grad_scale=grad_scale,
            )
        return kernels.lion_hyper(lr, group["betas"], group["weight_decay"], grad_scale=grad_scale)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Starts the update of every parameter that has a gradient. Raises NonFiniteError, and changes nothing, when a
        gradient is inf or NaN."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  (torch's signature)
        """Drops the accumulated gradients."""
        self._drop_gradients()

    def state_dict(self) -> dict[str, Any]:
        raise AngelPTMError(
            "optimizer.state_dict(): the states live in pages and are not copied into a dictionary. "
            "engine.save_checkpoint() commits them, with the parameters, where they are."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: ARG002
        raise AngelPTMError(
            "optimizer.load_state_dict(): the states live in pages. engine.load_checkpoint(folder) resumes them."
        )
