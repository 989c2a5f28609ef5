"""What the user allows: bytes of each tier, and how pages shall be placed."""

from __future__ import annotations

from dataclasses import dataclass

from angelptm.plan.shares import WHOLE, Share


@dataclass(frozen=True)
class SsdBudget:
    """One folder of the SSD tier, bytes. ``size_bytes`` is None where the plan decides."""

    path: str
    size_bytes: int | None
    free_bytes: int
    weight: float = 1.0


@dataclass(frozen=True)
class CommitBudget:
    """Commits to keep, and the folder whose disk takes them where there is no SSD tier. ``other_bytes``: content that
    is no page of the plan and goes into each commit (the model's buffers)."""

    keep: int
    folder: SsdBudget
    other_bytes: int = 0


@dataclass(frozen=True)
class SweepBudget:
    """For updates that nobody waits for. ``grad_sets``: 2 where a step's gradient must not be added to what waits
    before all of it is known (clipping), 1 where it may."""

    grad_sets: int


@dataclass(frozen=True)
class Budgets:
    """What the user allows, and how pages shall be placed; the ``placement`` fields mean what the config's mean."""

    page_bytes: int
    device_bytes: int
    host_bytes: int
    ssd: tuple[SsdBudget, ...] = ()
    param: str = "auto"
    grad: str = "auto"
    states: str | float = "auto"
    update_threads: int | None = None
    ring_depth: int | None = None
    queue_depth: int = 16
    cores: int = 2
    commits: CommitBudget | None = None
    states_on_device: bool = False
    """Whether states may take device memory that parameters, all of them living there, leave over."""
    sweep: SweepBudget | None = None
    """Parameters and gradients live on the host then, whatever ``param`` and ``grad`` say."""
    share: Share = WHOLE
    """Of the pages: those of this rank. Where it is not the whole, no page lives on the device, as its content there
    also comes from other ranks, and goes with each update."""
    device_is_apart: bool = False
    """Whether pages cannot live on the device, being of memory that updating threads do not reach: parameters that
    would live there live on the host, from where each step brings them anew. Gradients come by way of host frames."""
