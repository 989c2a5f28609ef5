"""What a commit costs: steps with a commit after each against steps without, and against torch.save of the same states.

One engine takes blocks of steps, in turn without commits and with one after every step; a block ends when the last
update is published and the last commit is durable, so that nothing of its cost falls outside. The ratio is taken pair
by pair. torch.save writes masters and both moments from memory to the same drive, as DeepSpeed's users do.

    python tools/bench/checkpoint.py                  # GPT-2, 124 M parameters, parameters and states on SSD
    python tools/bench/checkpoint.py --small --json   # seconds instead of minutes
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import angelptm
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import Kind

FULL = {"preset": "gpt2", "device": "256MiB", "host": "512MiB", "page": "4MiB", "sequence": 256, "block": 3}
SMALL = {"preset": "gpt2-demo", "device": "24MiB", "host": "64MiB", "page": "1MiB", "sequence": 64, "block": 2}


def build(case: dict[str, Any], folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """An engine with everything on SSD, and one batch."""
    from transformers import AutoConfig

    from angelptm.model.presets import PRESETS

    keys = PRESETS[case["preset"]]
    config = AutoConfig.for_model(keys["model_type"], **keys["config"])
    model = angelptm.materialize(config, seed=1)
    tokens = torch.randint(0, config.vocab_size, (1, case["sequence"]), generator=torch.Generator().manual_seed(1))
    engine = angelptm.initialize(
        model,
        {
            "tiers": {"device": case["device"], "host": case["host"], "ssd": [{"path": str(folder / "ssd")}]},
            "page_size": case["page"],
            "precision": "bf16",
            "optimizer": {"type": "adamw", "lr": 1e-4},
            "placement": {"param": "ssd", "states": "ssd"},
            "gradient_clipping": 1.0,
            "checkpoint": {"folder": str(folder / "checkpoint"), "keep": 1},
        },
    )
    return engine, {"input_ids": tokens, "labels": tokens}


def block_seconds(engine: Any, batch: dict[str, torch.Tensor], steps: int, commits: bool) -> tuple[float, list[float]]:
    """Seconds of a block of steps, and of each call of save_checkpoint in it."""
    calls = []
    start = time.perf_counter()
    for _ in range(steps):
        engine.backward(engine(**batch).loss)
        engine.step()
        if commits:
            called = time.perf_counter()
            engine.save_checkpoint()
            calls.append(time.perf_counter() - called)
    engine.drain()
    engine.wait_for_checkpoint()
    return time.perf_counter() - start, calls


def states_of(folder: Path) -> dict[str, torch.Tensor]:
    """Masters and moments of the newest commit, in memory."""
    with CheckpointFolder.read(folder / "checkpoint") as commits, commits.hold() as manifest:
        names = [param.name for unit in manifest.header.units for param in unit.params]
        with CommitReader(manifest, [folder / "checkpoint", folder / "ssd"]) as reader:
            return {
                f"{name}.{kind.name.lower()}": torch.from_numpy(reader.read(name, kind))
                for name in names
                for kind in (Kind.MASTER, Kind.EXP_AVG, Kind.EXP_AVG_SQ)
            }


def save_seconds(states: dict[str, torch.Tensor], path: Path) -> tuple[float, float]:
    """Seconds until torch.save returns, and until what it wrote is durable."""
    start = time.perf_counter()
    torch.save(states, path)
    returned = time.perf_counter() - start
    with path.open("rb") as file:
        os.fsync(file.fileno())
    durable = time.perf_counter() - start
    path.unlink()
    return returned, durable


def measure(case: dict[str, Any], pairs: int, folder: Path) -> dict[str, Any]:
    engine, batch = build(case, folder)
    block = case["block"]
    block_seconds(engine, batch, block, commits=True)  # first touch of slots and pages
    without, with_commits, calls, durable = [], [], [], []
    saves: list[tuple[float, float]] = []
    states = states_of(folder)
    for pair in range(pairs):
        for commits in (False, True) if pair % 2 else (True, False):
            seconds, called = block_seconds(engine, batch, block, commits)
            (with_commits if commits else without).append(seconds / block)
            calls += called
            if commits:
                durable.append(engine.checkpoint_seconds)
        saves.append(save_seconds(states, folder / "states.pt"))
    size = sum(value.numel() * value.element_size() for value in states.values())
    engine.close()
    ratios = [one / other for one, other in zip(with_commits, without)]
    returned = statistics.median(save[0] for save in saves)
    call = statistics.median(calls)
    return {
        "parameters": sum(unit.layout.numel for unit in engine.plan.units),
        "state_bytes": size,
        "step_seconds_without": statistics.median(without),
        "step_seconds_with_commit": statistics.median(with_commits),
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "commit_call_seconds": call,
        "commit_call_seconds_max": max(calls),
        "commit_durable_seconds": statistics.median(durable),
        "torch_save_seconds": returned,
        "torch_save_durable_seconds": statistics.median(save[1] for save in saves),
        "faster_to_return": returned / call,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a 10.8 M model and few steps: does it run?")
    parser.add_argument("--pairs", type=int, default=None, help="pairs of blocks (default 7; 2 with --small)")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the drive to measure")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    case = SMALL if arguments.small else FULL
    pairs = arguments.pairs or (2 if arguments.small else 7)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(case, pairs, Path(folder))
    found |= {"case": case, "machine": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{found['parameters'] / 1e6:.1f} M parameters, {found['state_bytes'] / 2**20:.0f} MiB of states on SSD")
    print(f"a step without commits     {found['step_seconds_without']:.3f} s")
    print(f"a step, each with a commit {found['step_seconds_with_commit']:.3f} s")
    ratios = ", ".join(f"{one:.3f}" for one in found["ratios"])
    print(f"ratio, median of {pairs} pairs    {found['ratio_median']:.3f}  ({ratios})")
    call, longest = found["commit_call_seconds"] * 1e3, found["commit_call_seconds_max"] * 1e3
    print(f"save_checkpoint returns in {call:.1f} ms (longest {longest:.1f})")
    print(f"  and is durable after     {found['commit_durable_seconds']:.3f} s, while training goes on")
    print(
        f"torch.save returns in      {found['torch_save_seconds']:.3f} s, {found['faster_to_return']:.0f} times as long"
    )
    print(f"  and is durable after     {found['torch_save_durable_seconds']:.3f} s")


if __name__ == "__main__":
    sys.exit(main())
