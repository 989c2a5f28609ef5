"""How fast each update mode steps where the drive is the limit, beside the same model entirely in DRAM.

Optimizer states live on the SSD, parameters and gradients in memory, and a step has few tokens, so that the states take
longer than computing. All cases train the same model from the same values on the same batches, each in a process of
its own, a block at a time in rotating order. A block has steps that are not timed, until accumulators are as full as
they get, and then the timed ones; what is left to apply at its end is drained and told apart, since training ends once.

    python tools/bench/modes.py                          # GPT-2, 124 M parameters, 48 tokens a step
    python tools/bench/modes.py --orders                 # lock_free with each order of the sweep
    python tools/bench/modes.py --small --json           # seconds: does it run?

Exits with 1 when a worker fails or a loss is not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# As for the other benchmarks: no file beside this one hides a library (transformers looks for `kernels`).
sys.path[0] = str(ROOT / "tools")
sys.path.insert(1, str(ROOT))

from bench.precision import fast_precision  # noqa: E402
from bench.step.process import Worker, WorkerError  # noqa: E402
from bench.step.training import Work  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from io_engine.machine import machine_facts, source_commit  # noqa: E402

MIB = 2**20
DRAM = "torch in DRAM"
MODES: dict[str, dict[str, Any]] = {
    "sync": {},
    "bounded(1)": {"mode": "bounded", "max_staleness": 1},
    "bounded(4)": {"mode": "bounded", "max_staleness": 4},
    "lock_free": {"mode": "lock_free"},
}
ORDERS = {
    f"lock_free {order}": {"mode": "lock_free", "order": order}
    for order in ("round_robin", "most_gradients", "next_needed")
}


@dataclass(frozen=True)
class Size:
    preset: str
    sequence: int
    page: str
    rounds: int
    untimed: int
    timed: int


FULL = Size("gpt2", 48, "4MiB", 5, 8, 16)
SMALL = Size("gpt2-demo", 32, "256KiB", 1, 2, 3)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", action="store_true", help="the orders of the sweep instead of the modes")
    parser.add_argument("--sequence", type=int, help="tokens of a step (default 48)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 where the processor helps with it")
    parser.add_argument("--rounds", type=int, help="blocks of every case (default 5)")
    parser.add_argument("--steps", type=int, help="timed steps of a block (default 16)")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the drive to measure (default: here)")
    parser.add_argument("--small", action="store_true", help="the 10.8 M model and few steps: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args(arguments)
    for name in ("sequence", "rounds", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: no such folder")
    return options


def config_of(update: dict[str, Any], parameters: int, itemsize: int, page: str) -> dict[str, Any]:
    """Budgets in which parameters and gradients fit every tier that they may be in, and states none."""
    params = parameters * itemsize * 5 // 4
    host = params + parameters * 4 * 5 // 4 + (512 * MIB if page == "4MiB" else 48 * MIB)
    swept = bool(update)
    return {
        "tiers": {"device": params + 8 * MIB, "host": host},
        "page_size": page,
        "placement": {"param": "host" if swept else "device", "grad": "host", "states": "ssd"},
        "update": update,
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    size = SMALL if options.small else FULL
    precision = options.precision or fast_precision()
    values = folder / "values"
    values.mkdir()
    work = asdict(Work(str(values), size.preset, 1, options.sequence or size.sequence, precision, False))
    first = Worker("first values", "bench.step.training", work)
    try:
        facts = first.reply()
    finally:
        first.stop()
    updates = ORDERS if options.orders else MODES
    itemsize = 4 if precision == "fp32" else 2
    arguments = {DRAM: {"kind": "resident", "config": {}}} | {
        name: {"kind": "paged", "config": config_of(update, facts["parameters"], itemsize, size.page)}
        for name, update in updates.items()
    }
    timed, rounds = options.steps or size.timed, options.rounds or size.rounds
    workers: dict[str, Worker] = {}
    blocks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    try:
        for name, argument in arguments.items():
            case = {"work": work, "folder": str(folder / name.replace(" ", "-")), "clip": False, **argument}
            Path(case["folder"]).mkdir()
            workers[name] = Worker(name, "bench.step.worker", case)
            workers[name].reply()
            workers[name].ask({"steps": 5})  # traced, and planned from
        for number in range(rounds):
            order = list(workers)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                print(f"round {number + 1}/{rounds}: {name}", file=sys.stderr, flush=True)
                blocks[name].append(workers[name].ask({"steps": size.untimed + timed}))
    finally:
        for worker in workers.values():
            worker.stop()
    cases = [summary(name, replies, size.untimed) for name, replies in blocks.items()]
    base = next(case for case in cases if case["name"] == DRAM)
    for case in cases:
        # Round by round: the machine's other tenants are the same for both.
        ratios = [theirs / ours for theirs, ours in zip(base["step_seconds_by_round"], case["step_seconds_by_round"])]
        case["rate_of_dram"] = statistics.median(ratios)
        case["rate_of_dram_range"] = [min(ratios), max(ratios)]
    return {
        "cases": cases,
        "work": {**work, "values": None, **facts},
        "rounds": rounds,
        "untimed": size.untimed,
        "timed": timed,
    }


def summary(name: str, replies: list[dict[str, Any]], untimed: int) -> dict[str, Any]:
    by_round = [statistics.mean(reply["step_seconds"][untimed:]) for reply in replies]
    count = len(replies[0]["step_seconds"])
    found = {
        "name": name,
        "step_seconds": statistics.median(by_round),
        "step_seconds_by_round": by_round,
        "drain_seconds": statistics.median(reply["seconds"] - sum(reply["step_seconds"]) for reply in replies),
        "ssd_bytes_per_step": statistics.median(sum(reply["process_io"].values()) / count for reply in replies),
        "peak_rss_bytes": max(reply["peak_rss_bytes"] for reply in replies),
        "finite": all(math.isfinite(loss) for reply in replies for loss in reply["losses"]),
        "last_loss": replies[-1]["losses"][-1],
    }
    facts = replies[-1]["facts"]
    if lags := {int(lag): uses for lag, uses in facts.get("staleness", {}).items()}:
        uses = sum(lags.values())
        found["staleness"] = lags
        found["staleness_mean"] = sum(lag * count for lag, count in lags.items()) / uses
        found["staleness_max"] = max(lags)
    return found


def show(found: dict[str, Any]) -> None:
    work = found["work"]
    title = (
        f"{work['preset']}, {work['parameters'] / 1e6:.1f} M parameters, {work['precision']}, {work['sequence']} "
        f"tokens a step, {found['rounds']} rounds of {found['timed']} steps"
    )
    table = Table(title=title)
    for heading in (
        "case",
        "step s",
        "rate of DRAM's",
        "range",
        "drain s",
        "SSD MiB a step",
        "peak RSS MiB",
        "staleness",
    ):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in found["cases"]:
        low, high = case["rate_of_dram_range"]
        stale = f"{case['staleness_mean']:.2f}, at most {case['staleness_max']}" if "staleness" in case else ""
        table.add_row(
            case["name"],
            f"{case['step_seconds']:.3f}",
            f"{100 * case['rate_of_dram']:.0f} %",
            f"{100 * low:.0f} - {100 * high:.0f} %",
            f"{case['drain_seconds']:.2f}",
            f"{case['ssd_bytes_per_step'] / MIB:.0f}",
            f"{case['peak_rss_bytes'] / MIB:.0f}",
            stale,
        )
    (Console() if sys.stdout.isatty() else Console(width=150)).print(table)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="angelptm-modes-", dir=options.folder) as folder:
            found = measure(options, Path(folder).absolute())
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found["machine"] = machine_facts(str(options.folder))
    found["commit"] = source_commit(ROOT)
    found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
    broken = [case["name"] for case in found["cases"] if not case["finite"]]
    for name in broken:
        print(f"error: {name}: a loss is not finite", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
