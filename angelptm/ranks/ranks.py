"""The ranks of a run, and what they agree on. A run of one process is one rank, which agrees with itself at once.

Every method that is called on all ranks says so; they have to come to it in the same order. Each wait has a deadline,
and what goes wrong in it becomes a RankError that names the rank which did not come (watch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from angelptm.errors import AngelPTMError, RankError
from angelptm.plan import Party, Share
from angelptm.plan.shares import WHOLE
from angelptm.ranks.watch import Watch

_T = TypeVar("_T")
_SUMMED_AT_ONCE = 1 << 20  # doubles: 8 MiB


@dataclass(frozen=True)
class Groups:
    """Process groups, each with an order of its own. ``control``: all ranks, of the CPU's memory. ``copy``: the ranks
    that hold one copy of the model together, of the CPU's memory. ``gathers`` and ``gradients``: the same, of the
    device's. ``replicas``: the ranks that have the same share in every copy, of the device's; None where there is one
    copy."""

    control: Any
    copy: Any
    gathers: Any
    gradients: Any
    replicas: Any | None
    members: tuple[int, ...]  # of ``copy``: their numbers in the whole run


class Ranks:
    """``index`` of ``count`` processes, of which ``here`` are on this machine; ``share`` is what this one has of a
    model's pages."""

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        *,
        share: Share = WHOLE,
        here: int = 1,
        groups: Groups | None = None,
        watch: Watch | None = None,
        deadline_seconds: float = 120.0,
        coalesces: bool = False,
        committing: Ranks | None = None,
    ) -> None:
        """``coalesces``: whether the device's backend is best with collectives of many pages at once (NCCL).
        ``committing``: the ranks whose pages are in commits, as the thread that makes these talks to them."""
        assert (groups is None) == (count == 1), "several ranks have groups"
        self.index, self.count, self.here = index, count, here
        self.share = share
        self.groups = groups
        self.watch = watch
        self.deadline_seconds = deadline_seconds
        self.coalesces = coalesces
        self._committing = committing

    @property
    def committing(self) -> Ranks:
        """The ranks that make commits together, in a group of their own, for the thread that does it."""
        assert self.commits_pages, "of a copy whose pages are in no commit"
        return self._committing or self

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that does what is done once: writing to the run folder, speaking to people."""
        return self.index == 0

    @property
    def party(self) -> Party:
        return Party(self.share, self.here, self.commits_pages)

    @property
    def commits_pages(self) -> bool:
        """Whether this rank's pages are in commits: those of one copy are."""
        return self.index < self.share.count

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Around what waits for other ranks: makes an error of torch.distributed one that says who did not come."""
        if self.is_alone:
            yield
            return
        assert self.watch is not None, "several ranks watch each other"
        self.watch.enter(what)
        try:
            yield
        except AngelPTMError:
            raise
        except (RuntimeError, ValueError) as error:  # what torch.distributed raises is one of these
            raise self.watch.explain(what, error) from error
        self.watch.leave()

    # On all ranks.

    def any(self, flag: bool, what: str) -> bool:
        """Whether it is true on any rank."""
        return flag if self.is_alone else self.most([int(flag)], what)[0] > 0

    def most(self, numbers: Sequence[int], what: str) -> list[int]:
        """The largest of each number over all ranks."""
        if self.is_alone:
            return list(numbers)
        assert self.groups is not None
        values = torch.tensor(numbers, dtype=torch.int64)
        with self.doing(what):
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.groups.control)
        return [int(value) for value in values]

    def table(self, row: Sequence[int], what: str) -> list[list[int]]:
        """Each rank's row of numbers, all of one length, in order of rank."""
        if self.is_alone:
            return [list(row)]
        assert self.groups is not None
        found = [torch.empty(len(row), dtype=torch.int64) for _ in range(self.count)]
        with self.doing(what):
            dist.all_gather(found, torch.tensor(row, dtype=torch.int64), group=self.groups.control)
        return [one.tolist() for one in found]

    def mean(self, value: float, what: str) -> float:
        """The mean over all ranks, the same bits on each."""
        return self.add(value, what) / self.count

    def add(self, value: float, what: str) -> float:
        """The sum over all ranks, the same bits on each."""
        if self.is_alone:
            return value
        assert self.groups is not None
        found = [torch.empty(1, dtype=torch.float64) for _ in range(self.count)]
        with self.doing(what):
            dist.all_gather(found, torch.tensor([value], dtype=torch.float64), group=self.groups.control)
        return float(torch.cat(found).sum())

    def every(self, value: _T, what: str) -> list[_T]:
        """Each rank's value, of any kind that pickles, in order of rank."""
        if self.is_alone:
            return [value]
        assert self.groups is not None
        found: list[Any] = [None] * self.count
        with self.doing(what):
            dist.all_gather_object(found, value, group=self.groups.control)
        return found

    def of_first(self, value: _T, what: str) -> _T:
        """The first rank's value."""
        if self.is_alone:
            return value
        assert self.groups is not None
        found: list[Any] = [value if self.is_first else None]
        with self.doing(what):
            dist.broadcast_object_list(found, src=0, group=self.groups.control)
        return found[0]  # type: ignore[no-any-return]

    def agree(self, error: BaseException | None, what: str) -> None:
        """Raises this rank's error; or where others have one, an AngelPTMError that has its text. So that all ranks
        refuse, or none does."""
        if self.is_alone:
            if error is not None:
                raise error
            return
        texts = self.every(None if error is None else str(error), what)
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise RankError(rank, what, f"rank {rank}: {text}")

    def together(self, act: Callable[[], _T], what: str) -> _T:
        """What ``act`` returns, when it has returned on all ranks; its error, or that of another rank."""
        error, found = None, None
        try:
            found = act()
        except Exception as caught:
            error = caught
        self.agree(error, what)
        return found  # type: ignore[return-value]

    def gathered(self, act: Callable[[], _T], what: str) -> list[_T]:
        """What ``act`` returns on each rank, in order, when it has returned on all: on the first rank; its own alone on
        others. Raises its error, or that of another rank."""
        own = self.together(act, what)
        if self.is_alone:
            return [own]
        assert self.groups is not None
        found: list[Any] = [None] * self.count if self.is_first else []
        with self.doing(what):
            dist.gather_object(own, found if self.is_first else None, dst=0, group=self.groups.control)
        return found if self.is_first else [own]

    def barrier(self, what: str) -> None:
        """Returns when all ranks have come here."""
        self.any(False, what)

    def add_up(self, values: torch.Tensor, what: str) -> None:
        """(n,) float64 of which each rank of a copy of the model has some, and zeros for the rest: all, on each."""
        if self.share.is_whole:
            return
        assert self.groups is not None
        with self.doing(what):
            for start in range(0, len(values), _SUMMED_AT_ONCE):
                dist.all_reduce(values[start : start + _SUMMED_AT_ONCE], group=self.groups.copy)

    def complete(self, values: torch.Tensor, pieces: Sequence[tuple[int, int, int]], what: str) -> None:
        """(n,) of any dtype, of which elements [start, end) are there on their owner: all of them, on each rank of a
        copy. ``pieces`` are (start, end, owner)."""
        if self.share.is_whole:
            return
        assert self.groups is not None
        with self.doing(what):
            works = [
                dist.broadcast(
                    values[start:end].view(torch.uint8), self.member(owner), group=self.groups.copy, async_op=True
                )
                for start, end, owner in pieces
            ]
            for work in works:
                work.wait()

    def member(self, owner: int) -> int:
        """The number in the whole run of the rank of this copy that has a share."""
        assert self.groups is not None
        return self.groups.members[owner]

    def leave(self, error: BaseException) -> None:
        """This rank ends with an error, of which the others are told."""
        if self.watch is not None:
            self.watch.fail(error)
            self.watch.close()

    def close(self) -> None:
        """This rank has done its part."""
        if self.watch is not None:
            self.watch.close()
