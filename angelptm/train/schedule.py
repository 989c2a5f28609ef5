"""The learning-rate schedule, as a torch scheduler on the engine's optimizer."""

from __future__ import annotations

import math

import torch

from angelptm.config.schema import Schedule


def lr_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """The factor on ``optimizer.lr`` at ``step``, counted from 0: linear warmup, then the configured shape."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.type == "constant":
        return 1.0
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
    shape = 1 - progress if schedule.type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(schedule, step, total_steps))
