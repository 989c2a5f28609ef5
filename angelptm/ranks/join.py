"""Becoming one of the ranks of a run, as torchrun and torch.distributed say."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from angelptm.config import Config
from angelptm.errors import ConfigError
from angelptm.memory import RANKS_HERE, ranks_here
from angelptm.plan import Share, shares_of
from angelptm.ranks.ranks import Groups, Ranks
from angelptm.ranks.watch import Watch

_PATIENCE = 10
"""Of those who make a commit together, in deadlines of the others."""


def join(config: Config) -> Ranks:
    """The ranks of this run: those of torch.distributed where it is initialized or torchrun's variables are set, which
    initializes it; else this process alone. On all ranks. Raises ConfigError for what several ranks cannot do."""
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return Ranks()
        backend = "cpu:gloo,cuda:nccl" if config.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.distributed.deadline_seconds))
    count, index = dist.get_world_size(), dist.get_rank()
    if count == 1:
        return Ranks()
    _refuse_what_is_not_there(config)
    here = min(count, ranks_here()) if RANKS_HERE in os.environ else count
    if config.device == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    shares = shares_of(config.distributed.shard, count, here)
    on_gpu = config.device.startswith("cuda")
    device_backend = "nccl" if on_gpu else "gloo"
    within = timedelta(seconds=config.distributed.deadline_seconds)

    def group(members: list[int], backend: str) -> Any:
        return dist.new_group(members, timeout=within, backend=backend)

    everyone = list(range(count))
    control = group(everyone, "gloo")
    committers = everyone[:shares]
    # Ranks come to a commit's end one after the other, as each has its pages written.
    patient = timedelta(seconds=_PATIENCE * config.distributed.deadline_seconds)
    commits = dist.new_group(committers, timeout=patient, backend="gloo")
    # Each process makes all groups, in one order, those that it is not in too.
    own: dict[str, Any] = {}
    first = index // shares * shares
    for start in range(0, count, shares):
        members = list(range(start, start + shares))
        made = {
            "copy": group(members, "gloo"),
            "gathers": group(members, device_backend),
            "gradients": group(members, device_backend),
        }
        if start == first:
            own |= made
    replicas = None
    if shares < count:
        for share in range(shares):
            made_here = group(list(range(share, count, shares)), device_backend)
            if share == index % shares:
                replicas = made_here
    store = dist.distributed_c10d.PrefixStore("angelptm", _own_connection())
    store.set_timeout(within)
    watch, own_share = Watch(store, index, count), Share(index % shares, shares)
    groups = Groups(control=control, replicas=replicas, members=tuple(range(first, first + shares)), **own)
    committing = None
    if shares > 1 and index < shares:
        committing = Ranks(
            index,
            shares,
            share=own_share,
            groups=replace(groups, control=commits),
            watch=watch,
            deadline_seconds=_PATIENCE * config.distributed.deadline_seconds,
        )
    return Ranks(
        index,
        count,
        share=own_share,
        here=here,
        groups=groups,
        watch=watch,
        deadline_seconds=config.distributed.deadline_seconds,
        coalesces=on_gpu,
        committing=committing,
    )


def _own_connection() -> Any:
    """A connection to the run's store that waits of other threads do not block."""
    store = dist.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def _refuse_what_is_not_there(config: Config) -> None:
    if config.update.is_swept:
        raise ConfigError(
            "update.mode",
            config.update.mode,
            "sync with several ranks",
            "Ranks gather parameters in one order, which updates that nobody waits for do not have.",
        )
    if config.device == "late":
        raise ConfigError("device", "late", "cpu or cuda with several ranks")
