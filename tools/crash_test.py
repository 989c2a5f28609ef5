"""Kills training runs at any moment, cuts the power in simulation, resumes them, and compares with uninterrupted runs.

A run goes through the code of `angelptm train`, in a process of its own that ends by SIGKILL: by a timer, at a native
write or sync (before it, in the middle of it, after it), or at an operation on a manifest or another small file. After
each kill every kept commit has to verify, none that was durable may be missing, and a resume has to go on from the
newest; the completed run has to have the same losses, masters, moments, files and slots as one that nobody interrupted.
With power cuts, what was not flushed is lost besides, as chance has it.

    python tools/crash_test.py                                   # 200 kills and 200 power cuts, and more at one commit
    python tools/crash_test.py --small --prove                   # some of each, and whether broken rules are noticed
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

from io_engine.machine import machine_facts, source_commit  # noqa: E402

Planned = tuple[int, str, Case, str | None]  # number, which moments, case, broken rule
Found = tuple[str, Case, Outcome]

SMALL_KILLS = 6
MAX_UNNOTICED = 12
"""Cases after which a broken rule counts as not noticed."""
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

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = folder / "corpus"
        write_corpus(self.corpus)
        self.references: dict[str, Reference] = {}

    def reference(self, variant: str) -> Reference:
        return run_reference(variant, self.folder / f"reference-{variant}", self.corpus)

    def run(self, planned: Planned) -> Found:
        number, why, case, broken = planned
        folder = self.folder / f"case-{number}"
        return why, case, run_case(case, self.references[case.variant], folder, self.corpus, broken)


_runner: Runner


def _reference(variant: str) -> Reference:
    return _runner.reference(variant)


def _run(planned: Planned) -> Found:
    return _runner.run(planned)


def run_all(pool: Any, planned: list[Planned], *, until_failure: bool = False) -> list[Found]:
    found: list[Found] = []
    for one in pool.imap(_run, planned):
        found.append(one)
        if one[-1].failure:
            print(f"{one[-1].case}: {one[-1].failure[:300]}", file=sys.stderr)
            if until_failure:
                break
        if len(found) % 100 == 0:
            print(f"{len(found)} of {len(planned)} cases", file=sys.stderr)
    return found


def prove(pool: Any, first: int) -> dict[str, int]:
    """Breaks each rule in turn. Cases until it was noticed, by its name; 0 where it never was."""
    reference = _runner.references["ssd"]
    noticed = {}
    for name in BROKEN:
        noticed[name] = 0
        cases = [*around_a_commit("ssd", True, reference, 0, MIDDLE)][:MAX_UNNOTICED]
        for count, case in enumerate(cases, 1):
            first += 1
            *_, outcome = pool.apply(_run, ((first, "proof", case, name),))
            if outcome.failure:
                noticed[name] = count
                break
        print(f"{name:24} " + (f"noticed after {noticed[name]} cases" if noticed[name] else "NOT NOTICED"))
    return noticed


def report(found: list[Found]) -> list[dict[str, Any]]:
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


def report_failures(found: list[Found], broken: str | None) -> list[dict[str, str]]:
    """Prints and returns them."""
    failures = []
    for _, case, outcome in found:
        if outcome.failure:
            command = f"python tools/crash_test.py --case '{case}'" + (f" --break {broken}" if broken else "")
            failures.append({"case": outcome.case, "failure": outcome.failure[:2000], "command": command})
            print(f"seed {case.seed}: {outcome.failure[-600:]}\n    {command}")
    return failures


def machine(folder: Path) -> dict[str, Any]:
    return {**machine_facts(str(folder)), "release": platform.release(), "commit": source_commit(ROOT)}


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
    parser.add_argument("--prove", action="store_true", help="break each rule in turn as well: all must be noticed")
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
    prepare(measure=not arguments.small)
    start = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="crash-test-", dir=arguments.folder))
    _runner = Runner(folder)
    chosen = arguments.variant or list(VARIANTS)
    if arguments.case:
        chosen = list(dict.fromkeys(case.variant for case in arguments.case))
    context = multiprocessing.get_context("fork")
    with context.Pool(arguments.jobs) as pool:
        _runner.references = dict(zip(chosen, pool.map(_reference, chosen)))
    repeated = [("repeated", case) for case in arguments.case or ()]
    cases = enumerate(repeated or list(cases_of(arguments, _runner.references)))
    planned: list[Planned] = [(number, why, case, arguments.broken) for number, (why, case) in cases]
    with context.Pool(arguments.jobs) as pool:  # forked now, so that it has the references
        found = run_all(pool, planned, until_failure=arguments.until_failure)
        noticed = prove(pool, len(planned)) if arguments.prove else {}
    rows = report(found)
    failures = report_failures(found, arguments.broken)
    seconds = round(time.perf_counter() - start, 1)
    print(f"{seconds} s")
    if failures:
        print(f"what the failed runs left is in {folder}")
    else:
        shutil.rmtree(folder)
    if arguments.json:
        content = {
            "machine": machine(arguments.folder),
            "date": date.today().isoformat(),
            "seed": arguments.seed,
            "seconds": seconds,
            "results": rows,
            "failures": failures,
            "cases_until_broken_rule_was_noticed": noticed,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(bool(failures) or not all(noticed.values()))


if __name__ == "__main__":
    sys.exit(main())
