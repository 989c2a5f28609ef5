"""What a run reports, for people and programs."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RunResult:
    """Figures of one run. Losses are means over the micro-batches of a step; times are wall-clock seconds; sizes bytes.

    ``bytes`` holds ``read`` and ``written`` of each tier over all steps, evaluation not counted; ``peak_bytes`` the
    most that was in use of each tier, ``budget_bytes`` what was allowed. A resumed run's losses, times and bytes are
    those of all its parts, as the metrics have them; ``commit_seconds``: how long training stood still for each commit.
    ``updates``: of this part, in the modes in which nothing waits for them (lagging.py). Losses and tokens are those of
    all ``ranks``; bytes and times those of this one.
    """

    model: str = ""
    parameters: int = 0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens_per_step: int = 0
    validation_loss_before: float | None = None
    validation_loss_after: float | None = None
    sample: str | None = None
    phase_seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    budget_bytes: dict[str, int] = field(default_factory=dict)
    activation_bytes: int = 0
    peak_rss_bytes: int = 0
    resumed_from_step: int | None = None
    commits: int = 0
    commit_seconds: list[float] = field(default_factory=list)
    endurance: dict[str, float] = field(default_factory=dict)
    updates: dict[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    run_dir: str = ""
    rank: int = 0
    ranks: int = 1

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all steps over their time."""
        seconds = sum(self.step_seconds)
        return self.tokens_per_step * len(self.step_seconds) / seconds if seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        median = statistics.median(self.step_seconds) if self.step_seconds else None
        return {**asdict(self), "tokens_per_s": self.tokens_per_s, "step_seconds_median": median}
