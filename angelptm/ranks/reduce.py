"""Adds up the ranks' gradients, each page's on the rank that has the page."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from angelptm.ranks.ranks import Ranks

_MOST_BYTES = 64 * 2**20
"""Of gradients that are being reduced, as long as there is more than one."""


class Key(NamedTuple):
    """A gradient of a pass: that of a unit's leaf, the ``turn``-th of the leaf in this pass."""

    unit: int
    leaf: int
    turn: int


_Then = Callable[[torch.Tensor], None]
_END = [-1, -1, -1]


@dataclass(frozen=True)
class LeafShape:
    """What a leaf's gradient is: ``shape``; ``pieces`` (start, end, owner) of its elements, by page; and its name."""

    name: str
    shape: tuple[int, ...]
    pieces: Sequence[tuple[int, int, int]]


@dataclass
class _Flight:
    key: Key
    gradient: torch.Tensor
    works: list[Any]
    then: _Then


class Reducer:
    """Reduces gradients in one order on all ranks, whatever order they come in on each.

    In the first pass the ranks tell each other of each gradient that came, and one that all have is reduced. Later ones
    keep to that order: a gradient that comes before its turn waits, and at the end of a pass the ranks tell each other
    how far they came. What some rank has and others have not (an expert that no token of theirs chose) is zeros there.

    ``then`` is called with the mean over all ranks, of which the pieces of this rank alone are of use. That happens
    when the next gradients come or the pass ends, and not when the network is done: what follows from a gradient, and
    so what is gathered next, is the same on all ranks.
    """

    def __init__(
        self,
        ranks: Ranks,
        leaves: Mapping[tuple[int, int], LeafShape],
        device: torch.device,
        dtype: torch.dtype,
        for_others: Callable[[int, int], _Then],
    ) -> None:
        """``dtype``: in which gradients are added. ``for_others`` makes ``then`` of a unit's leaf that has a gradient
        on other ranks alone."""
        assert ranks.groups is not None
        self._ranks, self._leaves, self._device, self._dtype = ranks, leaves, device, dtype
        self._group, self._replicas = ranks.groups.gradients, ranks.groups.replicas
        self._for_others = for_others
        self._order: list[Key] | None = None  # not known before the first pass is over
        self._began: list[Key] = []  # in this pass
        self._told: dict[Key, set[int]] = {}  # in the first pass: the ranks that have it
        self._turns: Counter[tuple[int, int]] = Counter()
        self._waiting: dict[Key, tuple[torch.Tensor, _Then]] = {}
        self._next = 0  # of the order
        self._flights: deque[_Flight] = deque()
        self._flying = 0

    def take(self, unit: int, leaf: int, gradient: torch.Tensor, then: _Then) -> None:
        """A leaf's gradient of this pass, which is written to from here on."""
        key = Key(unit, leaf, self._turns[unit, leaf])
        self._turns[unit, leaf] += 1
        self._waiting[key] = (gradient, then)
        if self._order is None:
            self._tell(key)
        else:
            while self._next < len(self._order) and self._order[self._next] in self._waiting:
                self._launch(self._order[self._next])
                self._next += 1
        while self._flying > _MOST_BYTES and len(self._flights) > 1:
            self._land()

    def _tell(self, key: Key | None) -> bool:
        """Tells the others of a gradient that came, None for the end of the pass, and begins what all have. Says
        whether all ranks are at the end."""
        told = self._ranks.table(list(key) if key is not None else _END, "the first backward pass")
        ended = {rank for rank, row in enumerate(told) if row == _END}
        for rank, row in enumerate(told):
            if row != _END:
                self._told.setdefault(Key(*row), set()).add(rank)
        for one in [one for one, having in self._told.items() if len(having | ended) == self._ranks.count]:
            del self._told[one]
            self._launch_or_zeros(one)
        return len(ended) == self._ranks.count

    def finish(self) -> None:
        """Ends a pass, on all ranks."""
        if self._order is None:
            while not self._tell(None):
                pass
        else:
            self._catch_up(self._order)
        self.land()
        if self._order is None and self._began:
            self._order = list(self._began)
        self._begin_pass()

    def _catch_up(self, order: Sequence[Key]) -> None:
        most = self._ranks.most([self._next], "the end of a backward pass")[0]
        for key in order[self._next : most]:
            self._launch_or_zeros(key)
        left = sorted(self._waiting)
        if not self._ranks.any(bool(left), "the end of a backward pass"):
            return
        wanted = {key for keys in self._ranks.every(left, "gradients that came out of order") for key in keys}
        known = {key: place for place, key in enumerate(order)}
        for key in sorted(wanted, key=lambda one: (known.get(one, len(known)), one)):
            self._launch_or_zeros(key)

    def _begin_pass(self) -> None:
        self._began.clear()
        self._told.clear()
        self._turns.clear()
        self._next = 0

    def land(self) -> None:
        """Returns when what was begun is done."""
        while self._flights:
            self._land()

    def drop(self) -> None:
        """Forgets the pass; on all ranks. Returns when nobody uses the gradients any more."""
        self._waiting.clear()
        flights, self._flying = list(self._flights), 0
        self._flights.clear()
        # What went wrong is for those who wait for something: this is on the way out of an error, or all is well. After
        # the first failure the group is of no use, and to wait for more would take a deadline each.
        with suppress(RuntimeError):
            for flight in flights:
                for work in flight.works:
                    work.wait()
        self._begin_pass()

    def _launch_or_zeros(self, key: Key) -> None:
        if key not in self._waiting:
            shape = self._leaves[key.unit, key.leaf].shape
            zeros = torch.zeros(shape, dtype=self._dtype, device=self._device)
            self._waiting[key] = (zeros, self._for_others(key.unit, key.leaf))
        self._launch(key)

    def _launch(self, key: Key) -> None:
        self._began.append(key)
        gradient, then = self._waiting.pop(key)
        # Their mean, as that of a batch is: of equal parts of it on each rank.
        flat = gradient.contiguous().reshape(-1).to(self._dtype).div_(self._ranks.count)
        with self._ranks.doing(self._what(key)):
            works = self._begin(flat, self._leaves[key.unit, key.leaf].pieces)
        self._flights.append(_Flight(key, flat, works, then))
        self._flying += flat.nbytes

    def _begin(self, flat: torch.Tensor, pieces: Sequence[tuple[int, int, int]]) -> list[Any]:
        share = self._ranks.share
        works = []
        for start, end, owner in pieces if not share.is_whole else ():
            part = flat[start:end]
            works.append(dist.reduce(part, self._ranks.member(owner), group=self._group, async_op=True))
        return works

    def _land(self) -> None:
        flight = self._flights.popleft()
        self._flying -= flight.gradient.nbytes
        shape = self._leaves[flight.key.unit, flight.key.leaf]
        with self._ranks.doing(self._what(flight.key)):
            for work in flight.works:
                work.wait()
            if self._replicas is not None:
                for start, end, owner in shape.pieces:
                    if owner == self._ranks.share.index:
                        dist.all_reduce(flight.gradient[start:end], group=self._replicas)
        flight.then(flight.gradient.reshape(shape.shape))

    def _what(self, key: Key) -> str:
        return f"the gradient of {self._leaves[key.unit, key.leaf].name}"
