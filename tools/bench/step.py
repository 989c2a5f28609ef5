"""What a step takes: AngelPTM under several budgets, PyTorch with everything in DRAM, DeepSpeed with NVMe offload.

All cases train the same model from the same values on the same batches, each in a process of its own, a block of steps
at a time in rotating order; matmul, memory and drive are measured between the rounds. A block of AngelPTM ends when its
last update is published, so that nothing falls outside, while updates inside it overlap the steps after them. Each
AngelPTM case is held against

    limit = max(a step of PyTorch in DRAM, its own SSD bytes / fio's rate with the same mix of reads and writes).

    python tools/bench/step.py                                 # GPT-2, 124 M parameters, batch 1: bound by the drive
    python tools/bench/step.py --batch 8                       # the same, bound by compute
    python tools/bench/step.py --deepspeed PYTHON              # DeepSpeed too; see tools/bench/step/deepspeed.md
    python tools/bench/step.py --cases 'angelptm*' --cases torch --rounds 9
    python tools/bench/step.py --small --json                  # seconds: does it run?

Exits with 1 when losses disagree or a worker fails. Install fio for the drive's ceiling.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# As for the workers: `bench` is found, and no file beside this one hides a library (transformers looks for `kernels`).
sys.path[0] = str(ROOT / "tools")
sys.path.insert(1, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench.precision import fast_precision  # noqa: E402
from bench.step.cases import SIZES, BadArgument, Case, all_cases, check_sequence, selected  # noqa: E402
from bench.step.drive import drive_of  # noqa: E402
from bench.step.process import Worker, WorkerError  # noqa: E402
from bench.step.result import report  # noqa: E402
from bench.step.rounds import Rounds  # noqa: E402
from bench.step.table import show  # noqa: E402
from bench.step.training import Work  # noqa: E402

from angelptm.sizes import parse_bytes  # noqa: E402
from io_engine.machine import machine_facts, source_commit  # noqa: E402


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def budget(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(SIZES), default=None, help="default gpt2 (gpt2-demo with --small)")
    parser.add_argument("--batch", type=at_least_one, help="sequences in a step (default 1)")
    parser.add_argument("--sequence", type=at_least_one, help="tokens of each (default 256; 64 for gpt2-demo)")
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], help="default: bf16 where the processor helps with it, else fp32"
    )
    parser.add_argument("--rounds", type=at_least_one, help="blocks of every case (default 5; 2 with --small)")
    parser.add_argument("--steps", type=at_least_one, help="steps of a block (default 4; 3 for gpt2-medium)")
    parser.add_argument("--host", type=budget, metavar="SIZE", help="host budget of the AngelPTM cases (512MiB)")
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="checkpointed blocks (gpt2-medium)")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the drive to measure (default: here)")
    parser.add_argument(
        "--cases", action="append", metavar="PATTERN", help="only these, e.g. 'angelptm ssd*'; repeatable"
    )
    parser.add_argument("--deepspeed", metavar="PYTHON", help="an interpreter that has DeepSpeed")
    parser.add_argument("--small", action="store_true", help="the 10.8 M model and few steps: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: no such folder")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: no such folder")
    return options


def versions() -> dict[str, str]:
    return {"torch": metadata.version("torch"), "platform": platform.platform(), "commit": source_commit(ROOT)}


def write_values(work: Work) -> dict[str, int]:
    """In a process of its own, whose memory goes with it."""
    worker = Worker("first values", "bench.step.training", asdict(work))
    try:
        found: dict[str, int] = worker.reply()
    finally:
        worker.stop()
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    preset = options.preset or ("gpt2-demo" if options.small else "gpt2")
    given = {name: getattr(options, name) for name in ("batch", "sequence", "rounds", "steps", "recompute", "host")}
    size = replace(SIZES[preset], **{name: value for name, value in given.items() if value is not None})
    check_sequence(preset, size.sequence)
    values = folder / "values"
    values.mkdir()
    precision = options.precision or fast_precision()
    work = Work(str(values), preset, size.batch, size.sequence, precision, size.recompute)

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    progress(f"{preset}: forming the first values")
    facts = write_values(work)
    cases = selected(all_cases(size, facts, precision, options.deepspeed), options.cases or ["*"])
    left_out = {case.name: case.left_out for case in cases if case.left_out}
    for name, reason in left_out.items():
        progress(f"left out: {name}: {reason}")
    ready: list[Case] = [case for case in cases if not case.left_out]
    rounds = Rounds(ready, asdict(work), size, folder, options.deepspeed, progress)
    with drive_of(folder, size.file_bytes) as drive:
        rounds.run(drive, facts)
        found = report(rounds, drive, facts, asdict(work))
    return {
        **found,
        "left_out": left_out,
        "work": {**asdict(work), "values": None, **facts},
        "rounds": size.rounds,
        "steps": size.steps,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that workers and files go
    try:
        with tempfile.TemporaryDirectory(prefix="angelptm-step-", dir=options.folder) as folder:
            found = measure(options, Path(folder).absolute())
    except BadArgument as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; workers are stopped and files removed", file=sys.stderr)
        return 130
    found["machine"] = {**machine_facts(str(options.folder)), **versions()}
    found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
    for problem in found["losses"]["problems"]:
        print(f"error: losses: {problem}", file=sys.stderr)
    return 1 if found["losses"]["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
