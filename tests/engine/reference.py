"""Training without pages, with the very kernels of the updater: what the engine must equal bit for bit.

Masters are whole fp32 numbers here, whatever the engine makes of them; moments are in the formats that it keeps.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import angelptm_native as native
import torch
from torch import nn

from angelptm import kernels
from angelptm.config import Config
from angelptm.engine.dtypes import NATIVE_DTYPES, TORCH_DTYPES, rounded
from angelptm.engine.setup import grad_precision, lay_out
from angelptm.states.codec import MOMENT_FORMATS

from .models import loss_of


class Moment:
    """(elements,) in a format; zeros at first."""

    def __init__(self, form: str, elements: int) -> None:
        self.values = torch.zeros(elements, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}.get(form, torch.int8))
        self.scales = torch.zeros(-(-elements // native.BLOCK8))
        self.codes = native.MomentCodes(MOMENT_FORMATS[form], self.values.data_ptr(), self.scales.data_ptr())


class Reference:
    """A deep copy of a model, fp32 masters and moments as flat arrays, and plain autograd.

    Nothing of the engine takes part but the order of the parameters in their units, which defines the order of
    summation in the global gradient norm.
    """

    def __init__(
        self, model: nn.Module, config: Config, settings: Sequence[tuple[str, Mapping[str, Any]]] = ()
    ) -> None:
        """``settings``: (fnmatch pattern on names, hyperparameters); the first match replaces those of the config."""
        self.model = copy.deepcopy(model)
        self.config = config
        self.settings = settings
        self.lr_factor = 1.0
        self.grad_norm: float | None = None
        self.dtype = TORCH_DTYPES[config.precision]
        self.grad_dtype = TORCH_DTYPES[grad_precision(config)]
        _, layouts = lay_out(self.model, config)
        self.units = {param.name: layout.index for layout in layouts for param in layout.params}
        self.formats = {param.name: param.states for layout in layouts for param in layout.params}
        self.offsets = {param.name: param.offset for layout in layouts for param in layout.params if param.trainable}
        params = dict(self.model.named_parameters())
        self.params = {name: params[name] for name in self.offsets}
        self.masters = {name: param.detach().float().flatten().clone() for name, param in self.params.items()}
        for param in self.model.parameters():
            param.data = rounded(param.data, self.dtype)
        self.moments = {
            name: [Moment(form, m.numel()) for form in (self.formats[name].exp_avg, self.formats[name].exp_avg_sq)]
            for name, m in self.masters.items()
        }
        self.steps = dict.fromkeys(self.masters, 0)
        self.gradients: dict[str, torch.Tensor] = {}

    def forward(self, **batch: Any) -> Any:
        def cast(value: Any) -> Any:
            return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return self.model(**{key: cast(value) for key, value in batch.items()})

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.config.gradient_accumulation_steps).backward()
        for name, param in self.params.items():
            if param.grad is None:
                continue
            gradient, param.grad = param.grad.contiguous().flatten(), None
            if name in self.gradients:
                kernels.accumulate(self.gradients[name], gradient, add=True)
            else:
                self.gradients[name] = gradient.to(self.grad_dtype)

    def norm(self) -> float:
        total = 0.0
        for name, offset in self.offsets.items():
            if name in self.gradients:
                gradient = self.gradients[name]
                total += kernels.accumulate(
                    torch.empty_like(gradient), gradient, add=False, first_element=offset
                ).sum_squares
        return total**0.5

    def step(self) -> None:
        scale = 1.0
        if self.config.gradient_clipping is not None:
            self.grad_norm = self.norm()
            scale = min(1.0, self.config.gradient_clipping / (self.grad_norm + 1e-6))
        for name, gradient in self.gradients.items():
            self.steps[name] += 1
            self._update(name, gradient, scale)
        self.gradients.clear()

    def _update(self, name: str, gradient: torch.Tensor, scale: float) -> None:
        optimizer = self.config.optimizer
        own = next((values for pattern, values in self.settings if fnmatch.fnmatchcase(name, pattern)), {})
        lr = own.get("lr", optimizer.lr) * self.lr_factor
        decay = own.get("weight_decay", optimizer.weight_decay)
        step, (first, second) = self.steps[name], self.moments[name]
        moments: tuple[Moment | None, Moment | None]
        if optimizer.type == "adamw":
            hyper = kernels.adamw_hyper(lr, optimizer.betas, optimizer.eps, decay, step=step, grad_scale=scale)
            moments = (first, second)
        elif optimizer.type == "sgd":
            hyper = kernels.sgd_hyper(
                lr, optimizer.momentum, optimizer.dampening, decay, optimizer.nesterov, step=step, grad_scale=scale
            )
            moments = (first if optimizer.momentum else None, None)
        else:
            hyper = kernels.lion_hyper(lr, optimizer.betas, decay, grad_scale=scale)
            moments = (first, None)
        published = torch.empty_like(self.masters[name], dtype=self.dtype)
        codes = [native.MomentCodes(native.MomentFormat.F32, 0) if one is None else one.codes for one in moments]
        native.step_compact(
            hyper,
            native.MasterFormat.F32,
            self.masters[name].data_ptr(),
            codes[0],
            codes[1],
            gradient.data_ptr(),
            NATIVE_DTYPES[gradient.dtype],
            0,
            published.data_ptr(),
            NATIVE_DTYPES[published.dtype],
            gradient.numel(),
            native.rounding_key(self.config.training.seed, step, self.units[name]),
            self.offsets[name],
        )
        self.params[name].data.copy_(published.view_as(self.params[name]))

    def train_step(self, batches: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
        """One optimizer step over its micro-batches; their losses."""
        losses = []
        for batch in batches:
            loss = loss_of(self.forward(**batch))
            losses.append(loss.detach())
            self.backward(loss)
        self.step()
        return losses

    def master_of(self, name: str) -> torch.Tensor:
        """The fp32 value behind a parameter, a frozen one's too."""
        param = dict(self.model.named_parameters())[name].detach()
        return self.masters[name].view_as(param) if name in self.masters else param.float()
