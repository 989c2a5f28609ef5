"""Brings a unit's pages from the ranks that have them into the arenas of all, straight into the unit's frames."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from angelptm.errors import AngelPTMError
from angelptm.ranks.ranks import Ranks

# The second is what torch called it before 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ticket(Protocol):
    """Of the pages that this rank has: when they are in its arena."""

    def done(self) -> bool: ...

    def wait(self, deadline_seconds: float) -> None: ...


@dataclass(frozen=True)
class GatheredPage:
    """A page's bytes in the arena, (n,) uint8, and the index of the rank of the copy that has it."""

    content: torch.Tensor
    owner: int


class Arrival:
    """A unit on its way from all ranks; a ticket as those of fetches are."""

    def __init__(self, ranks: Ranks, what: str) -> None:
        self._ranks, self.what = ranks, what
        self._launched = threading.Event()
        self._works: list[Any] = []
        self._error: BaseException | None = None

    def _launch(self, works: list[Any]) -> None:
        self._works = works
        self._launched.set()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._launched.set()

    def done(self) -> bool:
        return self._launched.is_set() and (self._error is not None or all(work.is_completed() for work in self._works))

    def wait(self, deadline_seconds: float) -> None:
        """Returns when the unit is there; on a device that works on its own time, for what it is given next."""
        # The thread has a deadline for this rank's own pages, and says what became of them.
        if not self._launched.wait(2 * deadline_seconds):
            raise AngelPTMError(f"{self.what}: waited {2 * deadline_seconds} s for this rank's own pages")
        if self._error is not None:
            raise self._error
        with self._ranks.doing(self.what):
            for work in self._works:
                work.wait()
            self._works.clear()


@dataclass
class _Gather:
    arrival: Arrival
    own: Ticket
    pages: Sequence[GatheredPage]
    order: AbstractContextManager[Any]
    deadline_seconds: float


class Gatherer:
    """A thread that begins gathers in the order in which they were asked for, which is the same on all ranks, each as
    soon as the pages that this rank has are in its arena. After an error it begins none any more: what others expect
    next is not what would come."""

    def __init__(self, ranks: Ranks) -> None:
        assert ranks.groups is not None
        self._ranks, self._group = ranks, ranks.groups.gathers
        self._changed = threading.Condition()
        self._queue: deque[_Gather] = deque()
        self._closed = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="angelptm-gather", daemon=True)
        self._thread.start()

    def gather(
        self,
        what: str,
        own: Ticket,
        pages: Sequence[GatheredPage],
        order: AbstractContextManager[Any],
        deadline_seconds: float,
    ) -> Arrival:
        """Queues a gather. ``own`` is the ticket of this rank's pages among ``pages``, which are all of the unit's in
        order. In ``order`` the device does what it is given after what may still read the frames."""
        arrival = Arrival(self._ranks, what)
        with self._changed:
            self._queue.append(_Gather(arrival, own, pages, order, deadline_seconds))
            self._changed.notify()
        return arrival

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                one = self._queue.popleft()
            if self._broken is None:
                try:
                    one.own.wait(one.deadline_seconds)
                    with self._ranks.doing(one.arrival.what), one.order:
                        one.arrival._launch(self._begin(one.pages))
                    continue
                except BaseException as error:
                    self._broken = error
            one.arrival._fail(self._broken)

    def _begin(self, pages: Sequence[GatheredPage]) -> list[Any]:
        share = self._ranks.share
        works, index = [], 0
        while index < len(pages):
            turn = pages[index : index + share.count]
            if self._ranks.coalesces and self._is_whole_turn(turn):
                start = turn[0].content
                run = torch.as_strided(start, (start.numel() * share.count,), (1,))
                own = turn[share.index].content
                works.append(_all_gather(run, own, group=self._group, async_op=True))
                index += share.count
                continue
            page = pages[index]
            works.append(dist.broadcast(page.content, self._ranks.member(page.owner), group=self._group, async_op=True))
            index += 1
        return works

    def _is_whole_turn(self, pages: Sequence[GatheredPage]) -> bool:
        """Whether the pages are one of each rank in order, as long as each other and without gaps."""
        size = pages[0].content.numel()
        return len(pages) == self._ranks.share.count and all(
            page.owner == index
            and page.content.numel() == size
            and page.content.storage_offset() == pages[0].content.storage_offset() + index * size
            for index, page in enumerate(pages)
        )

    def close(self) -> None:
        """What is queued is not begun."""
        with self._changed:
            self._broken = self._broken or AngelPTMError("the engine was closed")
            self._closed = True
            self._changed.notify()
        self._thread.join(self._ranks.deadline_seconds)
