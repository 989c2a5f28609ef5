"""Every parser of what others wrote, with a small campaign each; tools/fuzz.py runs large ones."""

from __future__ import annotations

import pytest

from .campaign import run_campaign
from .targets import TARGETS, Target


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_input_is_read_in_bounds_or_refused_with_a_typed_error(target: Target) -> None:
    outcome = run_campaign(target, 1, range(target.suite_count))
    assert not outcome.failures, "\n".join(
        f"python tools/fuzz.py --seed 1 --target {target.name}, input {index}: {failure.kind}\n{failure.text}"
        for index, failure in list(outcome.failures.items())[:3]
    )
    assert outcome.inputs == target.suite_count
    assert outcome.accepted, "damage that always shows tests nothing but the first check"
    assert outcome.refused
