"""Kills training runs at any moment, cuts the power in simulation, resumes them, and compares with uninterrupted runs.

A run goes through the code of `angelptm train`, in a process of its own that ends by SIGKILL: by a timer, at a native
write or sync (before it, in the middle of it, after it), or at an operation on a manifest or another small file. After
each kill every kept commit has to verify, none that was durable may be missing, and a resume has to go on from the
newest; the completed run has to have the same losses, masters, moments, files and slots as one that nobody interrupted.
With power cuts, what was not flushed is lost besides, as chance has it.

    python tools/crash_test.py                                   # 200 kills and 200 power cuts, and more at one commit
    python tools/crash_test.py --small                           # some of each
    python tools/crash_test.py --case 'ssd/kill/17/write:45'     # one again: variant, mode, seed, kills in a row

Exits with 1 if a promise was broken; each broken one is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from crash.broken import BROKEN  # noqa: E402
from crash.campaign import MIDDLE, around_a_commit, at_both_ends, at_random, inside_a_commit  # noqa: E402
from crash.case import Case, Outcome, Reference, run_case, run_reference  # noqa: E402
from crash.life import prepare  # noqa: E402
from crash.variants import VARIANTS, write_corpus  # noqa: E402

from io_engine.machine import machine_facts  # noqa: E402

SMALL_KILLS = 6
ALL_MOMENTS = ("ssd", "half", "no-ssd")
"""Variants that are killed at every moment of one commit in the large form."""


def cases_of(arguments: argparse.Namespace, references: dict[str, Reference]) -> Iterator[tuple[str, Case]]:
    """(why, case)."""
    for power_cut in [mode == "power-cut" for mode in ("kill", "power-cut") if arguments.mode in (mode, "both")]:
        for variant in [name for name in ALL_MOMENTS if name in references]:
            given = variant, power_cut, references[variant], arguments.seed
            if arguments.small:
                if variant == "ssd":
                    yield from (("names", case) for case in around_a_commit(*given, MIDDLE))
                continue
            yield from (("names", case) for case in around_a_commit(*given, MIDDLE))
            yield from (("writes", case) for case in inside_a_commit(*given, MIDDLE))
            if variant == "ssd":
                yield from (("start, end", case) for case in at_both_ends(*given))
        yield from (("random", case) for case in at_random(references, power_cut, arguments.seed, arguments.kills))


class Runner:
    """Runs cases in processes that have imported everything and started no thread."""

    def __init__(self, folder: Path, broken: str | None) -> None:
        self.folder, self.broken = folder, broken
        self.corpus = folder / "corpus"
        write_corpus(self.corpus)
        self.references: dict[str, Reference] = {}

    def reference(self, variant: str) -> Reference:
        return run_reference(variant, self.folder / f"reference-{variant}", self.corpus)

    def run(self, numbered: tuple[int, str, Case]) -> tuple[str, Case, Outcome]:
        number, why, case = numbered
        reference = self.references[case.variant]
        return why, case, run_case(case, reference, self.folder / f"case-{number}", self.corpus, self.broken)


_runner: Runner


def _reference(variant: str) -> Reference:
    return _runner.reference(variant)


def _run(numbered: tuple[int, str, Case]) -> tuple[str, Case, Outcome]:
    return _runner.run(numbered)


def report(found: list[tuple[str, Case, Outcome]]) -> list[dict[str, Any]]:
    """Prints a row for each variant, mode and kind of kill, and what failed."""
    rows: dict[tuple[str, ...], list[Outcome]] = defaultdict(list)
    for why, case, outcome in found:
        rows[case.variant, "power-cut" if case.power_cut else "kill", why].append(outcome)
    heads = ("variant", "mode", "moments", "cases", "kills", "from commit", "from start", "failures")
    line = "{:11}{:11}{:12}{:>7}{:>7}{:>13}{:>12}{:>10}".format
    print(line(*heads))
    result = []
    for key, outcomes in [*rows.items(), (("total", "", ""), [outcome for *_, outcome in found])]:
        counts = [
            len(outcomes),
            sum(one.killed for one in outcomes),
            sum(one.from_commit for one in outcomes),
            sum(one.from_start for one in outcomes),
            sum(bool(one.failure) for one in outcomes),
        ]
        print(line(*key, *counts))
        result.append(dict(zip((name.replace(" ", "_") for name in heads), (*key, *counts))))
    return result


def report_failures(found: list[tuple[str, Case, Outcome]], broken: str | None) -> list[dict[str, str]]:
    """Prints and returns them."""
    failures = []
    for _, case, outcome in found:
        if outcome.failure:
            command = f"python tools/crash_test.py --case '{case}'" + (f" --break {broken}" if broken else "")
            failures.append({"case": outcome.case, "failure": outcome.failure[:2000], "command": command})
            print(f"seed {case.seed}: {outcome.failure[-600:]}\n    {command}")
    return failures


def machine(folder: Path) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {**machine_facts(str(folder)), "release": platform.release(), "commit": commit.stdout.strip() or "unknown"}


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="runs of each mode that are killed at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["kill", "power-cut", "both"], default="both")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--small", action="store_true", help="every operation of one commit, and a few at random")
    parser.add_argument("--case", action="append", type=Case.parse, help="only this one")
    parser.add_argument("--break", dest="broken", choices=list(BROKEN), help="break a rule first: it must be noticed")
    parser.add_argument("--until-failure", action="store_true", help="stop at the first failure")
    parser.add_argument("--jobs", type=int, default=2, help="cases at the same time")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the runs write")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    if arguments.kills is None:
        arguments.kills = SMALL_KILLS if arguments.small else 200
    return arguments


def main() -> int:
    global _runner
    arguments = arguments_of()
    prepare()
    start = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="crash-test-", dir=arguments.folder))
    _runner = Runner(folder, arguments.broken)
    chosen = arguments.variant or list(VARIANTS)
    if arguments.case:
        chosen = list(dict.fromkeys(case.variant for case in arguments.case))
    context = multiprocessing.get_context("fork")
    with context.Pool(arguments.jobs, maxtasksperchild=None) as pool:
        _runner.references = dict(zip(chosen, pool.map(_reference, chosen)))
    planned = (
        [("repeated", case) for case in arguments.case]
        if arguments.case
        else list(cases_of(arguments, _runner.references))
    )
    numbered = [(number, why, case) for number, (why, case) in enumerate(planned)]
    found = []
    with context.Pool(arguments.jobs) as pool:  # forked now, so that it has the references
        for one in pool.imap(_run, numbered):
            found.append(one)
            if one[-1].failure and arguments.until_failure:
                break
            if len(found) % 100 == 0:
                print(f"{len(found)} of {len(numbered)} cases, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    rows = report(found)
    failures = report_failures(found, arguments.broken)
    print(f"{time.perf_counter() - start:.0f} s")
    if failures:
        print(f"what the failed runs left is in {folder}")
    else:
        shutil.rmtree(folder)
    if arguments.json:
        content = {
            "machine": machine(arguments.folder),
            "date": date.today().isoformat(),
            "seed": arguments.seed,
            "seconds": round(time.perf_counter() - start, 1),
            "results": rows,
            "failures": failures,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
