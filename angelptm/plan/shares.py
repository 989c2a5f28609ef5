"""Which pages belong to which rank, where several ranks hold one model together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from angelptm.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """One of ``count`` ranks that hold the pages of a model together, each of them its own."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count, f"share {self.index} of {self.count}"

    @property
    def is_whole(self) -> bool:
        return self.count == 1


WHOLE = Share()


@dataclass(frozen=True)
class Party:
    """Who shares what: ``share`` of the model's pages, and this machine's disks and cores with ``here`` ranks in all.
    ``commits``: whether the pages are in commits, as those of one copy of the model are."""

    share: Share = WHOLE
    here: int = 1
    commits: bool = True


ALONE = Party()


def shares_of(asked: str | int, count: int, here: int) -> int:
    """How many of ``count`` ranks, of which ``here`` are on each machine, hold one copy of the model, where
    ``distributed.shard`` says ``asked``. Raises ConfigError."""
    shares = {"all": count, "node": here}[asked] if isinstance(asked, str) else asked
    if shares > count or count % shares:
        raise ConfigError(
            "distributed.shard",
            asked,
            f"a number of ranks that divides all {count} of them",
            "Each copy of the model is held by as many ranks.",
        )
    return shares


def owners_of(page_counts: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """For each PARAM page of each unit the index of the rank that has it; ``page_counts`` are those of the units.

    Pages are dealt in turn, from one unit to the next: the shares differ by one page at most, also where units have
    fewer pages than there are ranks, and pages that follow each other in the arena come from different ranks.
    """
    owners, first = [], 0
    for pages in page_counts:
        owners.append(tuple((first + page) % count for page in range(pages)))
        first += pages
    return owners
