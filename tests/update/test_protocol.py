"""The protocol of the bounded and lock-free modes, searched exhaustively with spin at small sizes: nothing goes wrong
in any interleaving, and each deliberate fault is found. What is checked, and larger sizes: see the model's comment."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "csrc" / "update" / "model" / "protocol.pml"
MOST_MIB = 1500
DEADLINE = 120

pytestmark = [
    pytest.mark.unsanitized,
    pytest.mark.skipif(shutil.which("spin") is None, reason="spin, the model checker, is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler for what spin generates"),
]


@dataclass(frozen=True)
class Size:
    """``bound`` None: no gate, as in lock-free mode. ``cut``: the step after which a commit is made, 0 for none."""

    spans: int
    workers: int
    steps: int
    bound: int | None
    cut: int
    open_empty: bool = False

    @property
    def defines(self) -> list[str]:
        bound = self.steps if self.bound is None else self.bound
        return [
            f"-DSPANS={self.spans}",
            f"-DWORKERS={self.workers}",
            f"-DSTEPS={self.steps}",
            f"-DBOUND={bound}",
            f"-DCUT={self.cut}",
            f"-DOPEN_EMPTY={int(self.open_empty)}",
        ]


SMALL = Size(spans=1, workers=1, steps=3, bound=1, cut=0)
SMALL_COMMIT = Size(spans=1, workers=2, steps=2, bound=None, cut=1)
SIZES = {
    "small": SMALL,
    "bounded-0-commit": Size(spans=2, workers=1, steps=3, bound=0, cut=1),
    "bounded-1": Size(spans=2, workers=1, steps=3, bound=1, cut=0),
    "bounded-1-two-workers": Size(spans=1, workers=2, steps=3, bound=1, cut=0),
    "lock-free": Size(spans=2, workers=2, steps=2, bound=None, cut=0),
    "lock-free-commit": Size(spans=2, workers=1, steps=2, bound=None, cut=1),
    "opened-when-empty": Size(spans=2, workers=1, steps=3, bound=None, cut=0, open_empty=True),
}

# The faults of the model's BREAK: a size at which the search finds it, and what it finds.
WAITS_FOR_EVER = "invalid end state"
WRONG_CONTENT = "assertion violated ((low[held[span]]==content[span])"
TOO_STALE = "& ~(content[span]))==0)"
FAULTS = {
    1: ("take-without-the-box", SMALL, WAITS_FOR_EVER),
    2: ("frame-reused-unseen", SMALL, WRONG_CONTENT),
    3: ("word-not-read-again", SMALL, WRONG_CONTENT),
    4: ("produced-counted-late", SMALL, "(published[span]<=produced[span])"),
    5: ("held-before-the-gate-looks", SMALL, TOO_STALE),
    6: ("workers-notified-without-mutex", SMALL, WAITS_FOR_EVER),
    7: ("opened-before-captured", SMALL_COMMIT, "assertion violated (saved[span]"),
    8: ("progress-notified-without-mutex", SMALL, WAITS_FOR_EVER),
    9: ("no-spare-frame", SMALL, "assertion violated (own<"),
    10: ("waits-with-the-box", SMALL_COMMIT, WAITS_FOR_EVER),
    11: ("claimed-twice", SMALL_COMMIT, "assertion violated ((states[span]=="),
    12: ("published-counted-early", SMALL, TOO_STALE),
    13: ("applied-counted-early", SMALL, "assertion violated ((states[span]=="),
    14: ("readers-looked-at-too-early", SMALL, WRONG_CONTENT),
}


def search(folder: Path, defines: list[str]) -> str:
    """What pan prints. Stops at the first error."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
        return done.stdout

    shutil.copy(MODEL, folder)
    run("spin", "-a", *defines, MODEL.name)
    # Unoptimized: at these sizes an optimizer would take longer than it saves.
    run("cc", "-O0", "-w", "-DSAFETY", f"-DMEMLIM={MOST_MIB}", "-o", "pan", "pan.c")
    return run("./pan")


def error_count(report: str) -> int:
    found = re.search(r"errors: (\d+)", report)
    assert found is not None, report
    return int(found[1])


def assert_faultless(report: str) -> None:
    """The search has found nothing, and left out nothing."""
    assert error_count(report) == 0, report
    for sign in ("Search not completed", "max search depth too small", "out of memory", "MEMLIM", "hash-compact"):
        assert sign not in report, report


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_no_interleaving_breaks_the_protocol(size: Size, tmp_path: Path) -> None:
    assert_faultless(search(tmp_path, size.defines))


def test_the_search_comes_to_every_statement_of_workers_and_commits(tmp_path: Path) -> None:
    report = search(tmp_path, SMALL_COMMIT.defines)
    assert_faultless(report)
    for process in ("Worker", "Commit"):
        assert re.search(rf"unreached in proctype {process}\n\t\(0 of \d+ states\)", report), report


@pytest.mark.parametrize("number", FAULTS.keys(), ids=[name for name, _, _ in FAULTS.values()])
def test_a_fault_in_the_protocol_is_found(number: int, tmp_path: Path) -> None:
    _, size, what = FAULTS[number]
    report = search(tmp_path, [*size.defines, f"-DBREAK={number}"])
    assert error_count(report) > 0, report
    assert what in report, report


def test_every_fault_that_the_model_offers_is_searched() -> None:
    offered = {int(number) for number in re.findall(r"BREAK [!=]= (\d+)", MODEL.read_text())}
    assert offered == FAULTS.keys()
