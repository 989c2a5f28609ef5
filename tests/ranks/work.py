"""What ranks do in the tests: each function runs in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from angelptm.config import Config
from angelptm.engine import Engine
from angelptm.errors import NonFiniteError
from angelptm.ranks import join
from tests.engine.models import FAMILIES, loss_of


@dataclass(frozen=True)
class Trained:
    """What a rank has to show: losses and gradient norms of its steps, values in the end, and what it used."""

    losses: list[float]
    norms: list[float | None]
    values: dict[str, Any]
    peak_bytes: dict[str, int]
    planned_bytes: dict[str, int]
    kind_bytes: dict[str, dict[str, int]]
    fetches: dict[str, int]


def known_rates() -> None:
    from angelptm.engine import planning
    from angelptm.plan import NOMINAL_RATES

    planning.measure_rates = lambda *_, **__: NOMINAL_RATES  # type: ignore[assignment]
    planning.compute_speed = lambda *_: 1.0  # type: ignore[assignment]


def part_of(batch: dict[str, Any], rank: int, count: int) -> dict[str, Any]:
    """A rank's share of a global batch: as many samples as every other one's."""
    return {
        name: value.chunk(count)[rank] if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }


def train_family(name: str, config: Config, steps: int, copies: int = 4, coalesces: bool = False) -> Trained:
    """Trains a tiny model on this rank's part of each batch, which is ``copies`` different ones of the family's.
    ``coalesces``: with collectives of several pages, as on GPUs."""
    known_rates()
    family = next(one for one in FAMILIES if one.name == name)
    torch.manual_seed(0)
    ranks = join(config)
    ranks.coalesces = coalesces
    engine = Engine(family.model(), config, ranks=ranks)
    rank, count = ranks.index, ranks.count
    losses, norms = [], []
    for step in range(steps):
        for micro in range(config.gradient_accumulation_steps):
            first = (step * config.gradient_accumulation_steps + micro) * copies
            whole = global_batch(family, first, copies)
            loss = loss_of(engine(**part_of(whole, rank, count)))
            losses.append(engine.ranks.mean(float(loss.detach()), "the loss"))
            engine.backward(loss)
            engine.step()
        norms.append(engine.grad_norm)
    engine.drain()
    values = {key: value.clone() for key, value in engine.state_dict(master=True).items()}
    found = Trained(
        losses,
        norms,
        values,
        engine.peak_bytes(),
        {
            "device": config.tiers.device,
            "host": engine.plan.host_frames * engine.plan.page_bytes,
            "ssd": engine.plan.ssd_slots * engine.plan.page_bytes,
        },
        engine.plan.kind_bytes,
        vars(engine._residency.counts) | {"stall_seconds": 0},
    )
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return found


def global_batch(family: Any, first: int, copies: int) -> dict[str, Any]:
    batches = [family.batch(first + index) for index in range(copies)]
    return {
        name: torch.cat([batch[name] for batch in batches]) if isinstance(value, torch.Tensor) else value
        for name, value in batches[0].items()
    }


def train_and_commit(
    name: str, config: Config, first: int, steps: int, copies: int = 4, resume: str | None = None
) -> Trained:
    """As train_family, on global batches from ``first`` on; commits after the last step."""
    known_rates()
    family = next(one for one in FAMILIES if one.name == name)
    engine = Engine(family.model(), config, resume=resume)
    rank, count = engine.ranks.index, engine.ranks.count
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(engine(**part_of(global_batch(family, step * copies, copies), rank, count)))
        losses.append(engine.ranks.mean(float(loss.detach()), "the loss"))
        engine.backward(loss)
        engine.step()
        if step % 2 == 1 or step == first + steps - 1:
            engine.save_checkpoint()
    engine.wait_for_checkpoint()
    values = {key: value.clone() for key, value in engine.state_dict(master=True).items()}
    assert engine.global_step == first + steps
    resumed = vars(engine.resumed.pages) if engine.resumed is not None else {}
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return Trained(losses, [], values, {}, {}, {}, resumed)


def meet_infinity(config: Config) -> list[str]:
    """The loss of the last rank is infinite in its third step: what each rank says, and whether it can go on."""
    known_rates()
    family = next(one for one in FAMILIES if one.name == "gpt2")
    engine = Engine(family.model(), config)
    rank, count = engine.ranks.index, engine.ranks.count
    said = []
    for step in range(5):
        loss = loss_of(engine(**part_of(global_batch(family, step * 2, 2), rank, count)))
        if step == 2 and rank == count - 1:
            loss = loss * float("inf")
        try:
            engine.backward(loss)
            engine.step()
        except NonFiniteError as error:
            said.append(str(error))
    said.append(f"{engine.global_step} steps")
    engine.close()
    return said


def train_until_something_happens(name: str, config: Config, what: str, folder: str) -> str:
    """Trains; rank 1 does ``what`` in its sixth step. Returns the error that this rank ends with."""
    known_rates()
    family = next(one for one in FAMILIES if one.name == name)
    engine = Engine(family.model(), config)
    rank, count = engine.ranks.index, engine.ranks.count
    try:
        for step in range(12):
            loss = loss_of(engine(**part_of(global_batch(family, step * 3, 3), rank, count)))
            if step == 5 and rank == 1:
                Path(folder, "there").write_text(str(os.getpid()))
                if what == "raise":
                    raise ValueError("something of its own")
                if what == "sleep":
                    time.sleep(30)
                if what in ("kill", "stop"):
                    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])
            engine.backward(loss)
            engine.step()
    except Exception as error:
        engine.ranks.leave(error)
        began = time.monotonic()
        with contextlib.suppress(Exception):
            engine.close()
        return f"{type(error).__name__}: {error} / {time.monotonic() - began:.1f}"
    return "no error"


def train_on(config: Config, steps: int, folder: str) -> dict[str, Any]:
    """Trains up to ``steps`` steps from the newest commit on, with a commit after each; the first rank notes losses."""
    known_rates()
    family = next(one for one in FAMILIES if one.name == "gpt2")
    commits = config.checkpoint.folder
    assert commits is not None
    ranks = join(config)
    there = ranks.of_first(any(commits.glob("commits/*.manifest")), "whether there is a commit")
    engine = Engine(family.model(), config, resume=commits if there else None, ranks=ranks)
    for step in range(engine.global_step, steps):
        loss = loss_of(engine(**part_of(global_batch(family, step * 3, 3), ranks.index, ranks.count)))
        engine.backward(loss)
        engine.step()
        mean = ranks.mean(float(loss.detach()), "the loss")
        if ranks.is_first:
            Path(folder, f"loss-{step}-{os.getpid()}").write_text(repr(mean))
        engine.save_checkpoint()
    engine.wait_for_checkpoint()
    values = {key: value.clone() for key, value in engine.state_dict(master=True).items()}
    engine.close()
    return values
