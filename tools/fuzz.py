"""Damaged files by the hundred thousand for every parser of what others wrote; tests/fuzz has parsers and damage.

Each target runs in a process of its own, so that a crash is one input's failure. An input is a function of (seed,
index); failing ones are written to a folder all the same. Exits with 1 if anything failed.

    python tools/fuzz.py                                        # 100,000 inputs a target, some minutes
    python tools/fuzz.py --target megatron --count 5000 --seed 7
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from io_engine.machine import source_commit  # noqa: E402
from tests.fuzz.campaign import MAX_FAILURES, Outcome, run_campaign, write  # noqa: E402
from tests.fuzz.guard import Failure  # noqa: E402
from tests.fuzz.mutations import mutated  # noqa: E402
from tests.fuzz.targets import TARGETS, Target  # noqa: E402

SILENCE_SECONDS = 60.0
"""After as long without a new input the child is ended: native code that hangs hears no alarm."""


def child(name: str, seed: int, first: int, stop: int, progress: Any, results: Connection, crash_log: str) -> None:
    faulthandler.enable(open(crash_log, "w"))  # noqa: SIM115 (open for the life of the process)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # libraries comment on every odd value

    def on_input(index: int) -> None:
        progress.value = index

    results.send(run_campaign(_target(name), seed, range(first, stop), on_input=on_input))


def campaign(target: Target, seed: int, count: int, folder: Path) -> Outcome:
    """All inputs of a target, in as many child processes as crashes demand."""
    whole = Outcome(target.name, seed)
    context = multiprocessing.get_context("spawn")
    first, start = 0, time.perf_counter()
    while first < count and len(whole.failures) < MAX_FAILURES:
        progress, (receiver, sender) = context.Value("q", first, lock=False), context.Pipe(duplex=False)
        crash_log = str(folder / f"{target.name}.log")
        process = context.Process(target=child, args=(target.name, seed, first, count, progress, sender, crash_log))
        process.start()
        sender.close()
        part = _outcome_of(process, progress, receiver)
        if part is not None:
            whole.inputs, whole.accepted = whole.inputs + part.inputs, whole.accepted + part.accepted
            whole.refused += part.refused
            whole.failures |= part.failures
            break
        index = progress.value
        text = f"exit code {process.exitcode} (negative: a signal)\n{Path(crash_log).read_text()}"
        whole.failures[index] = Failure("crash", text)
        # What came before the crash was fine, but how it was divided went with the process.
        whole.inputs += max(index, first) - first + 1
        first = index + 1
    whole.seconds = time.perf_counter() - start
    return whole


def _outcome_of(process: Any, progress: Any, receiver: Connection) -> Outcome | None:
    """None if the process ends, or has to be ended, without one."""
    last, since = None, time.monotonic()
    while not receiver.poll(0.2):
        if progress.value != last:
            last, since = progress.value, time.monotonic()
        if not process.is_alive() and not receiver.poll(0):
            return None
        if time.monotonic() - since > SILENCE_SECONDS:
            process.kill()
            process.join()
            return None
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        process.join()
        return None
    process.join()
    return outcome


def save(target: Target, seed: int, failures: dict[int, Failure], folder: Path) -> None:
    seeds = target.seeds()
    for index, failure in failures.items():
        place = folder / f"{target.name}-{seed}-{index}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "failure.txt").write_text(f"{failure.kind}\n{failure.text}\n")
        if index >= 0:  # else a seed itself
            write(place / "input", mutated(seed, index, seeds, target.fields, target.links()))


def _target(name: str) -> Target:
    return next(target for target in TARGETS if target.name == name)


def machine() -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": len(names) or 1,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": source_commit(ROOT),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=[target.name for target in TARGETS], help="default: all")
    parser.add_argument("--count", type=int, default=100_000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time")
    parser.add_argument("--failures", type=Path, default=Path(tempfile.gettempdir(), "fuzz-failures"))
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    arguments.failures.mkdir(parents=True, exist_ok=True)
    chosen = [target for target in TARGETS if not arguments.target or target.name in arguments.target]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(
            pool.map(lambda target: campaign(target, arguments.seed, arguments.count, arguments.failures), chosen)
        )
    print(f"{'target':16}{'inputs':>10}{'accepted':>10}{'refused':>10}{'seconds':>10}{'failures':>10}")
    for target, outcome in zip(chosen, outcomes, strict=True):
        counts = (outcome.inputs, outcome.accepted, outcome.refused, round(outcome.seconds, 1), len(outcome.failures))
        print(f"{outcome.target:16}" + "".join(f"{count:>10}" for count in counts))
        save(target, arguments.seed, outcome.failures, arguments.failures)
        for index, failure in outcome.failures.items():
            lines = failure.text.strip().splitlines()
            print(f"    input {index}: {failure.kind}: {lines[0 if failure.kind == 'crash' else -1][:160]}")
    failed = any(outcome.failures for outcome in outcomes)
    if failed:
        print(f"failing inputs are in {arguments.failures}")
    if arguments.json:
        rows = [
            {
                "target": outcome.target,
                "inputs": outcome.inputs,
                "accepted": outcome.accepted,
                "refused": outcome.refused,
                "seconds": round(outcome.seconds, 1),
                "failures": {str(index): failure.kind for index, failure in outcome.failures.items()},
            }
            for outcome in outcomes
        ]
        content = {"machine": machine(), "date": date.today().isoformat(), "seed": arguments.seed, "results": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
