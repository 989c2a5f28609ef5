"""One run in its own process: trains, validates as it goes, and tells one line for each validation and one at the end.

What is timed is what a user waits for between two validations: forward, backward, step and whatever they wait for. The
engine's drain before a validation, and the validation, are timed apart.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from bench.convergence.modes import LIBRARY_MODE, lr_factor, state_keys, update_keys
from bench.step.worker import reply_channel, send

import angelptm
from angelptm.config import Config, load_config
from angelptm.data import TokenBatches, open_dataset
from angelptm.errors import NonFiniteError
from angelptm.memory import peak_rss_bytes
from angelptm.model.materialize import build_model
from angelptm.train.schedule import make_scheduler

_VALIDATION_SEED = 0  # of the held-out samples that are looked at: the same ones in every run


@dataclass(frozen=True)
class Settings:
    """What all runs of one table have in common."""

    steps: int
    batch: int
    sequence: int
    lr: float
    schedule: str
    warmup_steps: int
    clip: float | None
    evaluate_every: int
    validation_batches: int
    validation_batch: int
    threads: int | None
    """Of torch; None is its own choice."""
    layers: int = 6
    width: int = 384
    states: str = "ssd"
    """Where they live: late gradients are about the drive, formats are the same numbers everywhere."""


def config_of(settings: Settings, mode: str, seed: int, drive: Path) -> Config:
    """The model of configs/demo.yaml, or a larger one of its kind, its text and optimizer; parameters and gradients in
    memory, states where the settings say."""
    # The demo has 43 MB of parameters in the device arena, as many in host memory, and gradients once or twice.
    larger = max(1.0, settings.layers * settings.width**2 / (6 * 384**2))
    shape = {"n_layer": settings.layers, "n_embd": settings.width, "n_head": settings.width // 64}
    return load_config(
        {
            "tiers": {
                "device": f"{round(64 * larger)}MiB",
                "host": f"{round(320 * larger)}MiB",
                "ssd": [{"path": str(drive)}],
            },
            "page_size": "1MiB",
            "precision": "fp32",
            "placement": {"states": settings.states},
            "optimizer": {
                "type": "adamw",
                "lr": settings.lr * lr_factor(mode),
                "betas": [0.9, 0.95],
                "weight_decay": 0.1,
                "states": state_keys(mode),
            },
            "gradient_clipping": settings.clip,
            "update": update_keys(mode),
            "model": {"preset": "gpt2-demo", "config": shape},
            "data": {"sequence_length": settings.sequence, "micro_batch_size": settings.batch},
            "training": {"steps": settings.steps, "seed": seed, "threads": settings.threads},
            "schedule": {"type": settings.schedule, "warmup_steps": settings.warmup_steps, "min_lr_ratio": 0.1},
        }
    )


class Trained(Protocol):
    """A model and its optimizer, who take one batch a step."""

    module: Any
    global_step: int
    optimizer: torch.optim.Optimizer

    def step(self, batch: dict[str, Any]) -> None: ...

    def loss(self, batch: dict[str, Any]) -> float: ...

    def stalled_seconds(self) -> float:
        """That steps have waited for pages and updates so far."""
        ...

    def drain(self) -> None:
        """Returns when everything that steps began has ended."""
        ...

    def facts(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Paged:
    """AngelPTM. See :class:`Trained`."""

    def __init__(self, config: Config) -> None:
        self._engine = angelptm.initialize(build_model(config), config)
        self.module: Any = self._engine.module
        self.optimizer: torch.optim.Optimizer = self._engine.optimizer

    @property
    def global_step(self) -> int:
        return self._engine.global_step

    def step(self, batch: dict[str, Any]) -> None:
        self._engine.backward(self._engine(**batch).loss)
        self._engine.step()

    def loss(self, batch: dict[str, Any]) -> float:
        return float(self._engine(**batch).loss)

    def stalled_seconds(self) -> float:
        phases = self._engine.phase_seconds()
        return phases["fetch"] + phases["update_gate"]

    def drain(self) -> None:
        self._engine.drain()

    def facts(self) -> dict[str, Any]:
        staleness = sum((Counter(unit) for unit in self._engine.staleness()), Counter[int]())
        return {
            "staleness": {str(lag): count for lag, count in sorted(staleness.items())},
            "gradient_counts": self._engine.gradient_counts(),
            "phase_seconds": self._engine.phase_seconds(),
            "traffic": self._engine.traffic(),
        }

    def close(self) -> None:
        self._engine.close()


def trained_in(mode: str, config: Config) -> Trained:
    if mode == LIBRARY_MODE:
        from bench.convergence.library import Library

        return Library(config)
    return Paged(config)


class Training:
    """One model on its way, and the clocks beside it."""

    def __init__(self, settings: Settings, mode: str, seed: int, folder: Path) -> None:
        """``folder`` keeps the tokens of the text, for the runs to come too, and the run's pages."""
        self._settings = settings
        config = config_of(settings, mode, seed, folder / "ssd")
        self.config_hash = config.model_copy(update={"tiers": config.tiers.model_copy(update={"ssd": []})}).hash
        """Without the folder, which is another one each time."""
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(seed)
        self.trained = trained_in(mode, config)
        vocabulary = self.trained.module.config.vocab_size
        self._batches, _ = open_dataset(config.data, seed, folder, vocabulary)
        larger = config.data.model_copy(update={"micro_batch_size": settings.validation_batch})
        held_out = open_dataset(larger, _VALIDATION_SEED, folder, vocabulary)[1]
        assert held_out is not None, "the config's validation_fraction is not 0"
        self._held_out: TokenBatches = held_out
        self._scheduler = make_scheduler(self.trained.optimizer, config.schedule, settings.steps)
        self.seconds = self.stall_seconds = self.drain_seconds = self.validation_seconds = 0.0
        self.curve: list[dict[str, float]] = []

    def train(self, steps: int) -> None:
        """Raises NonFiniteError when the loss stops being a number."""
        start, stalled = time.perf_counter(), self.trained.stalled_seconds()
        for _ in range(steps):
            self.trained.step(next(self._batches))
            self._scheduler.step()
        self.seconds += time.perf_counter() - start
        self.stall_seconds += self.trained.stalled_seconds() - stalled

    def validate(self) -> dict[str, float]:
        """A point of the curve: the mean loss of the held-out samples, with every gradient so far applied. Raises
        NonFiniteError when it is no number."""
        start = time.perf_counter()
        self.trained.drain()
        drained = time.perf_counter()
        self.trained.module.eval()
        total, count = 0.0, self._settings.validation_batches
        with torch.no_grad():
            for index in range(count):
                total += self.trained.loss(self._held_out.batch(index))
        self.trained.module.train()
        self.drain_seconds += drained - start
        self.validation_seconds += time.perf_counter() - drained
        if not math.isfinite(total):
            raise NonFiniteError(f"step {self.trained.global_step}: the validation loss is {total}")
        point = {"step": self.trained.global_step, "seconds": self.seconds, "validation_loss": total / count}
        self.curve.append(point)
        return point

    def result(self, diverged_at: int | None) -> dict[str, Any]:
        settings, taken = self._settings, self.trained.global_step
        return {
            "diverged_at": diverged_at,
            "final_validation_loss": self.curve[-1]["validation_loss"] if diverged_at is None else None,
            "steps": taken,
            "tokens": taken * settings.batch * settings.sequence,
            "training_seconds": self.seconds,
            "stall_seconds": self.stall_seconds,
            "drain_seconds": self.drain_seconds,
            "validation_seconds": self.validation_seconds,
            "curve": self.curve,
            **self.trained.facts(),
            "peak_rss_bytes": peak_rss_bytes(),
            "config_hash": self.config_hash,
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
        }


def main() -> None:
    channel = reply_channel()
    case = json.loads(sys.argv[1])
    settings = Settings(**case["settings"])
    training = Training(settings, case["mode"], case["seed"], Path(case["folder"]))
    diverged_at = None
    try:
        send(channel, {"point": training.validate()})
        while (left := settings.steps - training.trained.global_step) > 0:
            training.train(min(settings.evaluate_every, left))
            send(channel, {"point": training.validate()})
    except NonFiniteError as error:
        print(error, file=sys.stderr)
        diverged_at = training.trained.global_step
    try:
        result = training.result(diverged_at)
    finally:
        training.trained.close()
    send(channel, {"result": result})


if __name__ == "__main__":
    main()
