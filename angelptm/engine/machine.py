"""What this machine gives to a run that has not begun: rates of its drive, memory, links and cores, in seconds."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import angelptm_native as native
import torch

from angelptm.config import Config, load_config
from angelptm.device import Device
from angelptm.engine.dtypes import TORCH_DTYPES
from angelptm.engine.engine import Engine
from angelptm.engine.foresight import ComputeRates
from angelptm.engine.measure import DriveWatch, measure_rates
from angelptm.engine.optimizer import RULES
from angelptm.engine.setup import existing_folder, grad_precision
from angelptm.model.materialize import build_model
from angelptm.plan import Rates

_SECONDS = 0.2  # for each rate
_ROWS, _SIZE = 256, 2048
_CACHED_BYTES, _LARGE_BYTES = 2 * 2**20, 128 * 2**20
_DRIVE_SECONDS = 4.0
_LAYERS = 24  # of the small model: 43 M parameters, whose states are more than a drive's fast cache gives back at once
_PAGES = 96  # of host memory, for rings and the like


def measure_machine(config: Config) -> tuple[Rates, ComputeRates, torch.device]:
    """Rates as a run of the config will meet them, from a small model that is placed as its states are.

    Takes a few seconds, some hundred MiB of memory, and of each SSD folder some space, which is free again afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="angelptm-measure-", dir=_folder(config)) as folder:
        small = load_config(
            {
                "device": config.device,
                "tiers": {
                    "device": "64MiB",
                    "host": max(512 * 2**20, _PAGES * config.page_size),
                    "ssd": [{"path": folder}],
                },
                "page_size": min(config.page_size, 4 * 2**20),
                "precision": config.precision,
                "placement": {"param": "ssd", "grad": "host", "states": "ssd"},
                "optimizer": {
                    **config.optimizer.model_dump(mode="json", include={"type", "states"}),
                    "lr": 1e-4,
                },
                "io": config.io.model_dump(mode="json"),
                "model": {"preset": "gpt2-demo", "config": {"n_layer": _LAYERS}},
            }
        )
        engine = Engine(build_model(small), small)
        try:
            parts = engine._planning._parts
            rates = measure_rates(
                parts.store,
                engine.plan,
                parts.device,
                rule=RULES[small.optimizer.type],
                grad_dtype=TORCH_DTYPES[grad_precision(config)],
                param_dtype=parts.dtype,
                watched=_drive_of(engine, parts.store),
            )
            return rates, compute_rates(parts.device), parts.device.torch_device
        finally:
            engine.close()


def _drive_of(engine: Engine, store: native.Store) -> dict[str, float]:
    """What the drive gives to steps, which read and write as those of the run will."""
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    watch, end = DriveWatch(store), time.perf_counter() + _DRIVE_SECONDS
    while time.perf_counter() < end:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.drain()
    engine._updates.recall()
    engine._fetcher.let_go()
    return watch.take()


def _folder(config: Config) -> Path:
    """On the drive that is asked about."""
    if config.tiers.ssd:
        return existing_folder(config.tiers.ssd[0].path)
    return Path.cwd()


def compute_rates(device: Device) -> ComputeRates:
    """Of the device itself, which computes nothing else meanwhile."""
    where = device.torch_device
    scale = 1 if where.type == "cpu" else 4

    def per_second(act: Callable[[], object], amount: float) -> float:
        act()
        taken: list[float] = []
        end = time.perf_counter() + _SECONDS
        while len(taken) < 3 or time.perf_counter() < end:
            device.synchronize()
            start = time.perf_counter()
            act()
            device.synchronize()
            taken.append(time.perf_counter() - start)
        return amount / statistics.median(taken)

    flops = {}
    for name, dtype in TORCH_DTYPES.items():
        left = torch.ones(scale * _ROWS, scale * _SIZE, dtype=dtype, device=where)
        right = torch.ones(scale * _SIZE, scale * _SIZE, dtype=dtype, device=where)
        flops[name] = per_second(partial(torch.matmul, left, right), 2 * left.numel() * right.shape[1])
    rates = []
    for size in (_CACHED_BYTES, _LARGE_BYTES):
        one = torch.ones(size // 4, device=where)
        out = torch.empty_like(one)
        rates.append(per_second(partial(torch.add, one, 1.0, out=out), 2 * one.nbytes))
    tiny = torch.ones(1, device=where)
    call = 1 / per_second(lambda: [tiny + 1.0 for _ in range(100)], 100)
    return ComputeRates(
        flops,
        memory_bytes_per_s=rates[1],
        cached_bytes_per_s=rates[0],
        cache_bytes=4 * _CACHED_BYTES,
        call_seconds=call,
    )
