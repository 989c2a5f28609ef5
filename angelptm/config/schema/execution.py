"""How a step is carried out: updating threads, I/O, and what forms a unit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from angelptm.config.schema.types import Section, UserPath, expected

_PATIENCE = 0.05  # of a step


def _count(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise expected("'auto' or a whole number of at least 1")
    return value


CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count)]


class Update(Section):
    """The native updater: threads that read states, apply the rule, write states and publish parameters."""

    mode: Literal["sync", "bounded", "lock_free"] = Field(
        default="sync",
        description="sync: bit-identical to the same kernel without paging, and still overlapped. bounded: parameters "
        "may lack the gradients of up to max_staleness steps. lock_free: nothing waits for an update; how far "
        "parameters are behind is recorded. The last two keep parameters and gradients in tiers.host.",
    )
    max_staleness: int | None = Field(
        default=None, ge=0, description="mode bounded: steps whose gradients parameters may lack. null: 1."
    )
    patience: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="mode bounded: share of a step's time for which it may wait for parameters that lack gradients, "
        "before it computes with them as they are. null: 0.05.",
    )
    gradients: Literal["mean", "sum"] = Field(
        default="mean",
        description="What gradients that came while a span was busy become. mean: their average, applied for as many "
        "steps at once. sum: their sum, applied as one step's.",
    )
    order: Literal["auto", "round_robin", "most_gradients", "next_needed"] = Field(
        default="auto", description="Span that bounded and lock_free update next. auto: most_gradients."
    )
    record: UserPath | None = Field(
        default=None,
        description="Modes bounded and lock_free: a file that gets, at the end, which gradients each update took and "
        "which parameters each step computed with.",
    )
    replay: UserPath | None = Field(
        default=None, description="Does what such a file recorded, bit by bit: to debug. Slower, as it waits for it."
    )
    threads: CountOrAuto = Field(default="auto", description="Updating threads. auto: from the cores available.")
    ring_depth: CountOrAuto = Field(default="auto", description="Spans in flight per updating thread.")

    @field_validator("mode", mode="before")
    @classmethod
    def _known_mode(cls, value: Any) -> Any:
        return "lock_free" if value == "lock-free" else value

    @model_validator(mode="after")
    def _belongs_to_the_mode(self) -> Self:
        for name in ("record", "replay"):
            if getattr(self, name) is not None and not self.is_swept:
                raise expected(
                    "null with update.mode: sync, in which nothing depends on timing",
                    key=f"update.{name}",
                    value=str(getattr(self, name)),
                )
        for name in ("max_staleness", "patience"):
            if getattr(self, name) is not None and self.mode != "bounded":
                raise expected(
                    f"null with update.mode: {self.mode}",
                    key=f"update.{name}",
                    value=getattr(self, name),
                    remedy="Set update.mode: bounded.",
                )
        return self

    @property
    def is_swept(self) -> bool:
        """Whether updating threads take gradients when they come to them, instead of the computing thread's waiting."""
        return self.mode != "sync"

    @property
    def waits_share(self) -> float:
        """Of a step's time, for parameters that it might use as they are."""
        return (_PATIENCE if self.patience is None else self.patience) if self.mode == "bounded" else 0.0

    @property
    def most_behind(self) -> int | None:
        """Steps whose gradients parameters may lack; None where nothing bounds it."""
        if self.mode == "lock_free":
            return None
        return (1 if self.max_staleness is None else self.max_staleness) if self.mode == "bounded" else 0


class Execution(Section):
    """When pages move and when updates run, relative to the computing."""

    moves: Literal["planned", "demand", "serial"] = Field(
        default="planned",
        description="planned: ahead of use, as a plan made from the first step says. demand: at use. serial: at use, "
        "and updates end before the next step begins; for comparison.",
    )
    updates: Literal["auto", "backward", "forward"] = Field(
        default="auto",
        description="backward: a unit is updated as soon as its gradients are complete, inside engine.backward. "
        "forward: all after step(), under the next forward pass. auto: backward where nothing needs all gradients "
        "first.",
    )
    lead: CountOrAuto = Field(
        default="auto", description="Uses by which fetches run ahead at most. auto: as the plan finds best."
    )
    timeline_steps: int = Field(
        default=3, ge=0, le=100, description="Planned steps of `angelptm train` to record for `angelptm trace`."
    )


class Io(Section):
    """How page files are read and written."""

    backend: Literal["auto", "uring", "threads"] = Field(
        default="auto", description="I/O engine. auto: uring where the kernel permits it, else threads."
    )
    queue_depth: int = Field(default=16, ge=1, le=4096, description="Page transfers in flight per queue.")
    direct: bool = Field(default=True, description="Bypass the page cache with O_DIRECT where the file system permits.")
    deadline_seconds: float = Field(
        default=120.0, gt=0, description="Seconds that any wait for I/O may last before the run stops with an error."
    )


class Distributed(Section):
    """Several processes that train one model, as torchrun starts them. Budgets of tiers are each rank's own."""

    shard: Literal["all", "node"] | Annotated[int, Field(ge=1)] = Field(
        default="all",
        description="How many ranks hold the pages of one copy of the model, each its own. all: one copy, of all "
        "ranks. node: one in each machine. A number divides that of the ranks, and 1 gives each rank a whole copy.",
    )
    deadline_seconds: float = Field(
        default=120.0, gt=0, description="Seconds that a rank may wait for others before it ends with an error."
    )


class Checkpoint(Section):
    """Commits: durable states of a run that cost metadata instead of a copy, since SSD pages are never overwritten."""

    every: int = Field(
        default=0, ge=0, description="Optimizer steps between commits of `angelptm train`. 0: no commits."
    )
    keep: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Commits to keep. Each one that differs holds the SSD space of one set of optimizer states.",
    )
    folder: UserPath | None = Field(
        default=None,
        description="Folder of the manifests. null: `checkpoint` in the run folder for train, no commits otherwise.",
    )


class Units(Section):
    """What is fetched together."""

    classes: list[str] = Field(
        default=[],
        description="Class names of modules that form a unit. Empty: the repeated blocks of a ModuleList, then leaves.",
    )
