"""The report's section on updates that nobody waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from angelptm.timeline.figures import figures_of
from angelptm.timeline.run_files import read_run
from angelptm.timeline.updates import updates_section

from .runs import make_run


def section_of(folder: Path, facts: Any) -> str:
    run = read_run(make_run(folder))
    if facts is not None:
        run.timeline.facts["updates"] = facts
    return "\n".join(updates_section(run, figures_of(run)))


def test_staleness_is_shown_by_unit_and_for_all(tmp_path: Path) -> None:
    facts = {
        "mode": "bounded",
        "max_staleness": 2,
        "staleness": {"h.0": {"0": 1, "2": 3}, "h.<1>": {"1": 4}},
        "gradients": {"produced": 1234, "waiting": 5},
    }
    shown = section_of(tmp_path / "run", facts)
    assert "at most 2, enforced" in shown
    assert "h.&lt;1&gt;" in shown
    assert "<h.<1>" not in shown
    assert "1.25" in shown, "the mean over all units: (2 * 3 + 4) / 8"
    assert "1,234" in shown


def test_without_a_sweep_it_says_that_nothing_was_behind(tmp_path: Path) -> None:
    assert "never behind" in section_of(tmp_path / "run", None)


@pytest.mark.parametrize(
    "facts",
    [[], "x", {"staleness": 3}, {"staleness": {"u": {"a": 1, "-1": 2, "1": "x", "2": -4}}}, {"gradients": {"a": []}}],
)
def test_junk_shows_less_and_breaks_nothing(facts: Any, tmp_path: Path) -> None:
    assert section_of(tmp_path / "run", facts)
