"""What this machine gives to a run that has not begun: rates of its drive, memory, links and cores, in seconds."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import angelptm_native as native
import torch

from angelptm.config import Config, load_config
from angelptm.device import Device, make_device
from angelptm.engine.dtypes import TORCH_DTYPES
from angelptm.engine.engine import Engine
from angelptm.engine.measure import DriveWatch, Scratch, measure_rates
from angelptm.engine.optimizer import RULES
from angelptm.engine.setup import existing_folder, grad_precision
from angelptm.foresight.step import ComputeRates
from angelptm.memory import gpu_memory_bytes, host_memory
from angelptm.model.materialize import build_model
from angelptm.plan import Rates
from angelptm.states.formats import FP32, StateFormats

_SECONDS = 0.2  # for each rate
_ROWS, _SIZE = 256, 2048
_CACHED_BYTES, _LARGE_BYTES = 2 * 2**20, 128 * 2**20
_DRIVE_SECONDS = 4.0
_LAYERS = 24  # of the small model: 43 M parameters, whose states are more than a drive's fast cache gives back at once
_PLACE_BYTES = 2**20  # of an arena that nothing lies in
_SCRATCH_ELEMENTS = 1 << 22  # more than caches hold
_GATHERED_BYTES, _GATHERS, _GATHER_DEADLINE_SECONDS = 256 * 2**20, 7, 120.0
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


def measure_device(name: str) -> dict[str, Any]:
    """``device``, ``host`` and ``links`` of a hardware file: what this machine's device ``name`` and its cores give."""
    device = make_device(name, _PLACE_BYTES, 0)
    try:
        compute, where = compute_rates(device), device.torch_device
        on_gpu = where.type == "cuda"
        one, index = (
            Scratch(_SCRATCH_ELEMENTS, FP32, native.Rule.ADAMW, torch.float32, torch.bfloat16),
            where.index or 0,
        )
        updates = {form: _update_rate(form) for form in ("fp32", "bf16", "int8")}
        found: dict[str, Any] = {
            "device": {
                "name": torch.cuda.get_device_name(index) if on_gpu else "CPU",
                "kind": where.type,
                "count": torch.cuda.device_count() if on_gpu else 1,
                "memory": gpu_memory_bytes(index) if on_gpu else None,
                "flops_per_s": dict(compute.flops_per_s),
                "memory_bytes_per_s": compute.memory_bytes_per_s,
                "cached_bytes_per_s": compute.cached_bytes_per_s,
                "cache": compute.cache_bytes,
                "call_seconds": compute.call_seconds,
            },
            "host": {
                "memory": host_memory().allowed_bytes,
                "cores": len(os.sched_getaffinity(0)),
                "copy_bytes_per_s": 1 / one.copy_seconds(),
                "checksum_bytes_per_s": 1 / one.check_seconds(),
                "accumulate_bytes_per_s": 1 / one.accumulate_seconds(),
                "memory_bytes_per_s": _memory_rate(),
                "update_elements_per_s": updates,
            },
        }
        if on_gpu:
            found["links"] = _link_rates(device)
        return found
    finally:
        device.close()


def _memory_rate() -> float:
    """Of the host, with all cores."""
    one = torch.ones(_LARGE_BYTES // 4)
    out = torch.empty_like(one)
    return 2 * one.nbytes / _median_seconds(partial(torch.add, one, 1.0, out=out))


def _update_rate(moments: str) -> float:
    formats = FP32 if moments == "fp32" else StateFormats("split", moments, moments)
    grad = torch.float32 if moments == "fp32" else torch.bfloat16
    return 1 / Scratch(_SCRATCH_ELEMENTS, formats, native.Rule.ADAMW, grad, torch.bfloat16).step_seconds()


def _link_rates(device: Device) -> dict[str, float | None]:
    """Of page-locked memory, each way by itself; and among all GPUs where there are several."""
    there = torch.empty(_LARGE_BYTES, dtype=torch.uint8, device=device.torch_device)
    here = torch.empty(_LARGE_BYTES, dtype=torch.uint8, pin_memory=True)
    return {
        "host_to_device_bytes_per_s": _per_second(device, lambda: there.copy_(here, non_blocking=True), _LARGE_BYTES),
        "device_to_host_bytes_per_s": _per_second(device, lambda: here.copy_(there, non_blocking=True), _LARGE_BYTES),
        "all_gather_bytes_per_s": all_gather_rate("cuda", torch.cuda.device_count()),
    }


def all_gather_rate(kind: str, count: int) -> float | None:
    """Bytes that each of ``count`` devices receives in a second of an all-gather among them, in a process for each;
    ``kind`` is cuda (NCCL) or cpu (gloo). None where there is one only."""
    if count < 2:
        return None
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="angelptm-gather-") as folder,
        ProcessPoolExecutor(count, mp_context=context) as processes,
    ):
        rates = [processes.submit(_gather, rank, kind, count, folder) for rank in range(count)]
        return min(rate.result(timeout=_GATHER_DEADLINE_SECONDS) for rate in rates)


def _gather(rank: int, kind: str, count: int, folder: str) -> float:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    torch.distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=_GATHER_DEADLINE_SECONDS),
    )
    own = torch.ones(_GATHERED_BYTES // count // 4, device=device)
    whole = torch.empty(own.numel() * count, device=device)
    taken: list[float] = []
    for _ in range(_GATHERS):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_gather(list(whole.chunk(count)), own)
        if kind == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    torch.distributed.destroy_process_group()
    return own.nbytes * (count - 1) / statistics.median(taken[1:])


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

    flops = {}
    for name, dtype in TORCH_DTYPES.items():
        left = torch.ones(scale * _ROWS, scale * _SIZE, dtype=dtype, device=where)
        right = torch.ones(scale * _SIZE, scale * _SIZE, dtype=dtype, device=where)
        flops[name] = _per_second(device, partial(torch.matmul, left, right), 2 * left.numel() * right.shape[1])
    rates = []
    for size in (_CACHED_BYTES, _LARGE_BYTES):
        one = torch.ones(size // 4, device=where)
        out = torch.empty_like(one)
        rates.append(_per_second(device, partial(torch.add, one, 1.0, out=out), 2 * one.nbytes))
    tiny = torch.ones(1, device=where)
    call = 1 / _per_second(device, lambda: [tiny + 1.0 for _ in range(100)], 100)
    return ComputeRates(
        flops,
        memory_bytes_per_s=rates[1],
        cached_bytes_per_s=rates[0],
        cache_bytes=4 * _CACHED_BYTES,
        call_seconds=call,
    )


def _per_second(device: Device, act: Callable[[], object], amount: float) -> float:
    def whole() -> None:
        act()
        device.synchronize()

    device.synchronize()
    return amount / _median_seconds(whole)


def _median_seconds(act: Callable[[], object]) -> float:
    act()
    taken: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
