"""Trains the largest model that a small machine takes: GPT-3 6.7 B within budgets of 4.5 GiB, the rest on SSD.

    python tools/largest.py --folder /nvme                    # 6.7 B parameters, 52 GB of disk: 41 of them states
    python tools/largest.py --preset gpt3-2.7b --device 768MiB --host 1536MiB
    python tools/largest.py --preset gpt3-1.3b --device 512MiB --host 1GiB
    python tools/largest.py --preset gpt3-1.3b --device 3GiB --host 14GiB --in-memory       # the same losses
    python tools/largest.py --preset gpt2 --device 256MiB --host 512MiB --steps 3

Without bf16 instructions a processor takes hours for a step of 6.7 B; --precision fp32 needs 70 % more disk then.
One sequence of random tokens a step, checkpointed blocks, states as split masters and int8 moments, no commit and
no gradient clipping. Gradients that the host has no room for wait on the SSD until the step ends. Peak RSS is that of
this process, Python and torch included.
Exits with 1 when a loss is not finite, or the peak above what should be there: budgets, activations, the largest
gradient, which autograd holds before it is copied out, freed memory that is kept (tiers.keep_freed), and 700 MiB.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GIB = 2**30
FOR_THE_PROCESS_BYTES = 700 * 2**20  # Python, torch, transformers
STATES = {"exp_avg": "int8", "exp_avg_sq": "int8"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt3-6.7b", help="a preset of angelptm.model.presets (default gpt3-6.7b)")
    parser.add_argument("--device", default="1536MiB", help="budget of the emulated device (default 1536MiB)")
    parser.add_argument("--host", default="3GiB", help="budget of the host pool (default 3GiB)")
    parser.add_argument("--page", default="4MiB", help="page size (default 4MiB)")
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        default="bf16",
        help="fp32 where the processor has no bf16 (default bf16)",
    )
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a step (default 128)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default 3)")
    parser.add_argument(
        "--folder", type=Path, default=Path.cwd(), help="on the drive that takes the rest (default here)"
    )
    parser.add_argument("--in-memory", action="store_true", help="keep in memory what fits: for losses to compare with")
    parser.add_argument("--plan", action="store_true", help="only say what it would take")
    parser.add_argument("--out", type=Path, help="also write the result to this file, as JSON")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.sequence < 2:
        parser.error("--steps is at least 1, --sequence at least 2")
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: no such folder")
    return options


def config_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "tiers": {"device": options.device, "host": options.host, "ssd": [{"path": str(folder)}]},
        "page_size": options.page,
        "precision": options.precision,
        "placement": {} if options.in_memory else {"param": "ssd", "states": "ssd"},
        "optimizer": {"type": "adamw", "lr": 1e-4, "states": STATES},
        "gradient_checkpointing": True,
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from transformers import AutoConfig

    import angelptm
    from angelptm.config import Config
    from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of
    from angelptm.memory import peak_rss_bytes
    from angelptm.model.presets import PRESETS
    from angelptm.plan import plan_rows
    from angelptm.sizes import format_bytes

    console = Console(stderr=True)
    if options.preset not in PRESETS:
        raise SystemExit(f"error: --preset {options.preset}: there are {', '.join(PRESETS)}")
    keys = PRESETS[options.preset]
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if keys["model_type"] == "gpt2" else {}
    architecture = AutoConfig.for_model(keys["model_type"], **{**keys["config"], **dropout})
    model = angelptm.materialize(architecture, seed=1)
    config = config_of(options, folder)
    checked = Config(**config)
    plan = plan_of(*lay_out(model, checked), checked, buffer_bytes_of(model))
    parameters = sum(unit.layout.numel for unit in plan.units)
    console.print(f"{options.preset}: {parameters / 1e9:.2f} B parameters; planned:")
    for row in plan_rows(plan):
        sizes = ", ".join(f"{format_bytes(row[tier])} {tier}" for tier in ("device", "host", "ssd") if row[tier])
        if sizes:
            console.print(f"  {row['kind']}: {sizes}")
    if options.plan:
        return {"preset": options.preset, "parameters": parameters, "plan": plan_rows(plan)}

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    generator = torch.Generator().manual_seed(1)
    losses, seconds, moved = [], [], []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("writing first values to the drive", total=None)
        start = time.perf_counter()
        engine = angelptm.initialize(model, config)
        fill_seconds = time.perf_counter() - start
        progress.remove_task(task)
        # Each is computed in forward and, as blocks are checkpointed, again in backward.
        blocks = [module for module in model.modules() if module.__class__.__name__.endswith("Attention")]
        task = progress.add_task("", total=2 * len(blocks))
        for block in blocks:
            block.register_forward_pre_hook(lambda *_: progress.advance(task))
        try:
            for step in range(options.steps):
                said = f", loss {losses[-1]:.3f}, {seconds[-1]:.0f} s" if losses else ""
                progress.reset(task, description=f"step {step + 1} of {options.steps}{said}", total=2 * len(blocks))
                tokens = torch.randint(0, architecture.vocab_size, (1, options.sequence), generator=generator)
                before, start = engine.traffic()["ssd"], time.perf_counter()
                loss = engine(input_ids=tokens, labels=tokens).loss
                losses.append(float(loss.detach()))
                engine.backward(loss)
                del loss
                engine.step()
                engine.drain()
                seconds.append(time.perf_counter() - start)
                after = engine.traffic()["ssd"]
                moved.append({way: after[way] - before[way] for way in ("read", "written")})
            facts = {"peak_bytes": engine.peak_bytes(), "activation_bytes": engine.activation_bytes}
        finally:
            engine.close()
    return {
        "preset": options.preset,
        "precision": options.precision,
        "parameters": parameters,
        "sequence": options.sequence,
        "losses": losses,
        "fill_seconds": fill_seconds,
        "step_seconds": seconds,
        "ssd_bytes": moved,
        "peak_rss_bytes": peak_rss_bytes(),
        "budget_bytes": checked.tiers.device + checked.tiers.host,
        "gradient_bytes": max(param.numel for unit in plan.units for param in unit.layout.params) * plan.param_itemsize,
        "keep_freed_bytes": checked.tiers.keep_freed_bytes,
        **facts,
    }


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    what = f"{found['preset']}, {found['parameters'] / 1e9:.2f} B parameters, {found['precision']}"
    table = Table(title=f"{what}, {found['sequence']} tokens a step")
    for heading in ("step", "seconds", "loss", "SSD read GB", "SSD written GB", "bytes a parameter"):
        table.add_column(heading, justify="right")
    rows = zip(found["step_seconds"], found["losses"], found["ssd_bytes"])
    for number, (seconds, loss, moved) in enumerate(rows, 1):
        table.add_row(
            str(number),
            f"{seconds:.1f}",
            f"{loss:.4f}",
            f"{moved['read'] / 1e9:.1f}",
            f"{moved['written'] / 1e9:.1f}",
            f"{sum(moved.values()) / found['parameters']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"peak RSS {found['peak_rss_bytes'] / GIB:.2f} GiB (budgets {found['budget_bytes'] / GIB:.2f} GiB, "
        f"activations {found['activation_bytes'] / GIB:.2f} GiB), "
        f"first values written in {found['fill_seconds']:.0f} s"
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the folder goes
    from angelptm.errors import AngelPTMError
    from io_engine.machine import machine_facts, source_commit

    try:
        with tempfile.TemporaryDirectory(prefix="angelptm-largest-", dir=options.folder) as folder:
            found = measure(options, Path(folder).absolute())
    except AngelPTMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found |= {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine_facts(options.folder),
        "commit": source_commit(ROOT),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.plan:
        return 0
    show(found)
    if not all(math.isfinite(loss) for loss in found["losses"]):
        print("error: a loss is not finite", file=sys.stderr)
        return 1
    parts = ("budget_bytes", "activation_bytes", "gradient_bytes", "keep_freed_bytes")
    if found["peak_rss_bytes"] > sum(found[part] for part in parts) + FOR_THE_PROCESS_BYTES:
        print("error: the process took more than it should", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
