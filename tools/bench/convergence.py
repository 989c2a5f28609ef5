r"""What late gradients and small moments cost: validation loss of update modes and state formats against sync in fp32.

The model and the text of configs/demo.yaml, a few seeds for each mode. In all modes a seed has the same first values,
batches and learning rates, so that modes are compared seed by seed: at equal tokens, which is the loss after the same
number of steps, and at equal wall time, which is the loss that each had when the fastest mode of its seed was done.
Optimizer states are on the SSD unless --states says otherwise, parameters and gradients in memory. A step is of 64
tokens only: whatever its batch, sync reads and writes 130 MB of states for it, and where computing takes longer than
that there is nothing for the other modes to gain. The table says how much of training waits; should sync hardly wait on
your machine, try --sequence 32, and --threads 1 where others want its cores.

    python tools/bench/convergence.py --out RESULT.json --plot docs/convergence.png     # 4 modes, 3 seeds, 2000 steps
    python tools/bench/convergence.py --out RESULT.json --plot docs/convergence.png --pace 5
    python tools/bench/convergence.py --modes sync,lock-free,lock-free-sum --out OTHER.json
    python tools/bench/convergence.py --modes sync,sync-nudged,sync-bf16,sync-int8,torchao-int8 --states host \
        --layers 7 --width 512 --steps 3000 --lr 3e-4 --out STATES.json --plot docs/convergence-states.png
    python tools/bench/convergence.py --small --json                                    # seconds: does it run?

Each run has a process of its own, one at a time, all modes of a seed in turn, in an order that rotates with the seed.
With --out a run is kept as soon as it is over, and the same command goes on with those that are missing; more seeds or
modes may be asked for then. Parameters are drained before each validation; drains and validations are not counted as
training time, but told.

A table takes more than an hour, in which a machine has other work too. With --pace the modes take turns with short
blocks of steps after the runs, and the times that are compared are a mode's steps at the median of those.

At equal wall time a slower mode is still amid its learning-rate schedule, whose end lowers the loss: with --schedule
constant that plays no part. Exits with 1 when a run fails.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# As for the workers: `bench` is found, and no file beside this one hides a library (transformers looks for `kernels`).
sys.path[0] = str(ROOT / "tools")
sys.path.insert(1, str(ROOT))

from bench.convergence.comparison import compare  # noqa: E402
from bench.convergence.modes import DEFAULT_MODES, update_keys  # noqa: E402
from bench.convergence.pace import at_pace, measure_pace  # noqa: E402
from bench.convergence.runs import OtherSettings, Runs  # noqa: E402
from bench.convergence.table import show  # noqa: E402
from bench.step.process import Worker, WorkerError  # noqa: E402

from io_engine.errors import IoError  # noqa: E402
from io_engine.machine import machine_facts, source_commit  # noqa: E402
from io_engine.plot import require_matplotlib  # noqa: E402


@dataclass(frozen=True)
class Size:
    """What --small changes. Steps of the full size are of 64 tokens, so that computing takes less time than the drive
    needs for the states; a validation looks at 8192 tokens, and there are as many as cost a tenth of the training."""

    steps: int
    seeds: int
    modes: tuple[str, ...]
    batch: int
    sequence: int
    evaluate_every: int
    validation_batches: int
    validation_batch: int
    threads: int | None
    pace_steps: int  # of a block


FULL = Size(2000, 3, DEFAULT_MODES, 1, 64, 200, 8, 16, None, 100)
SMALL = Size(12, 1, ("sync", "bounded-1"), 1, 16, 6, 1, 4, 1, 2)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def mode_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    try:
        for name in names:
            update_keys(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text}: a mode appears twice")
    return names


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=at_least_one, help=f"of each run (default {FULL.steps})")
    parser.add_argument("--seeds", type=at_least_one, help=f"seeds 1 to N of each mode (default {FULL.seeds})")
    parser.add_argument("--modes", type=mode_names, help=f"with commas between (default {','.join(FULL.modes)})")
    parser.add_argument("--batch", type=at_least_one, help=f"sequences in a step (default {FULL.batch})")
    parser.add_argument("--sequence", type=at_least_one, help=f"tokens of each (default {FULL.sequence})")
    parser.add_argument("--lr", type=float, default=5e-4, help="the highest learning rate (default 5e-4)")
    parser.add_argument(
        "--schedule", choices=["cosine", "constant"], default="cosine", help="after a warm-up of a 20th (cosine)"
    )
    parser.add_argument(
        "--clip", type=float, nargs="?", const=1.0, metavar="NORM", help="clip gradients; without NORM to 1.0"
    )
    parser.add_argument("--evaluate-every", type=at_least_one, help=f"steps (default {FULL.evaluate_every})")
    parser.add_argument(
        "--pace",
        type=at_least_one,
        metavar="ROUNDS",
        help="also measure the modes' pace, and compare at equal time by it",
    )
    parser.add_argument("--layers", type=at_least_one, default=6, help="of the model (default 6, the demo's)")
    parser.add_argument("--width", type=at_least_one, default=384, help="a multiple of 64 (default 384, the demo's)")
    parser.add_argument("--states", choices=["ssd", "host"], default="ssd", help="where they live (default ssd)")
    parser.add_argument("--threads", type=at_least_one, help="of torch (default: its own choice, or 1 with --small)")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the drive to use (default: here)")
    parser.add_argument("--small", action="store_true", help="two modes, one seed, few steps: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="keep each finished run in this file; go on from it")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw loss over tokens and over seconds")
    parser.add_argument(
        "--plot-tokens", action="store_true", help="draw it over tokens alone: the machine had other work meanwhile"
    )
    options = parser.parse_args(arguments)
    size = SMALL if options.small else FULL
    for name, value in asdict(size).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    if options.width % 64:
        parser.error(f"--width {options.width} is not a multiple of 64, the width of a head")
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: no such folder")
    for name in ("out", "plot"):
        path = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{name} {path}: no such folder")
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """As bench.convergence.training.Settings, which is the worker's, as it needs torch."""
    names = ("steps", "batch", "sequence", "lr", "schedule", "clip", "evaluate_every")
    more = ("validation_batches", "validation_batch", "threads", "layers", "width", "states")
    return {**{name: getattr(options, name) for name in (*names, *more)}, "warmup_steps": max(1, options.steps // 20)}


def run_one(mode: str, seed: int, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains in a process of its own and tells what is reached on standard error."""
    name = f"{mode} seed {seed}"
    case = {"mode": mode, "seed": seed, "settings": settings, "folder": str(folder)}
    worker = Worker(name, "bench.convergence.training", case)
    try:
        while "result" not in (reply := worker.reply()):
            point = reply["point"]
            said = f"step {point['step']:.0f}, {point['seconds']:.1f} s, loss {point['validation_loss']:.4f}"
            print(f"{name}: {said}", file=sys.stderr, flush=True)
    finally:
        worker.stop()
    result: dict[str, Any] = reply["result"]
    return result


def measure(options: argparse.Namespace, runs: Runs, folder: Path) -> dict[str, Any]:
    seeds = range(1, options.seeds + 1)

    def others() -> dict[str, Any]:
        missing = runs.missing(options.modes, seeds)
        comparison = compare(at_pace(runs.of(options.modes), runs.pace), options.modes)
        return {"modes": options.modes, "missing": missing, "comparison": comparison}

    def circumstances() -> dict[str, Any]:
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": source_commit(ROOT),
            "machine": machine_facts(str(options.folder)),
        }

    for mode, seed in runs.missing(options.modes, seeds):
        run = {"mode": mode, "seed": seed, **circumstances(), **run_one(mode, seed, runs.settings, folder)}
        runs.all.append(run)
        runs.write(others())
    if options.pace is not None:
        runs.pace = measure_pace(
            options.modes, runs.settings, folder, options.pace, options.pace_steps, circumstances()
        )
        runs.write(others())
    return runs.content(others())


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the worker and its files go
    try:
        if options.plot is not None:
            require_matplotlib()
        runs = Runs(settings_of(options), options.out)
        with tempfile.TemporaryDirectory(prefix="angelptm-convergence-", dir=options.folder) as folder:
            found = measure(options, runs, Path(folder).absolute())
    except (OtherSettings, IoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where --out names a file", file=sys.stderr)
        return 130
    if options.plot is not None and found["comparison"]["seeds"]:
        from bench.convergence.picture import draw

        draw(found, options.plot, with_seconds=not options.plot_tokens)
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
