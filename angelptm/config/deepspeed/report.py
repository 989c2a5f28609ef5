"""What became of each key of a DeepSpeed configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["mapped", "approximated", "ignored", "not set"]
OUTCOMES: tuple[Outcome, ...] = ("mapped", "approximated", "ignored", "not set")


@dataclass(frozen=True)
class KeyReport:
    """One key. ``target`` is our dotted key if it has one, ``why`` the reason or the difference."""

    key: str
    value: Any
    outcome: Outcome
    target: str = ""
    why: str = ""

    def __str__(self) -> str:
        target = f" -> {self.target}" if self.target else ""
        why = f" ({self.why})" if self.why else ""
        return f"{self.key}: {self.value!r}{target}: {self.outcome}{why}"


@dataclass(frozen=True)
class DeepSpeedReport:
    """All keys, in the file's order."""

    entries: Sequence[KeyReport]

    def of(self, outcome: Outcome) -> list[KeyReport]:
        return [entry for entry in self.entries if entry.outcome == outcome]

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.of(outcome))} {outcome}" for outcome in OUTCOMES if self.of(outcome))
        return "\n  ".join([f"DeepSpeed configuration: {counts}", *map(str, self.entries)])
