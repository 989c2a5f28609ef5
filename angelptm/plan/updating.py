"""The simulated updater: workers with rings of spans in flight.

Neighbouring spans of a unit travel as one where a model has very many of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from angelptm.plan.channels import Machine
from angelptm.plan.transfers import SpanTransfers, UnitTransfers

_MOST_GROUPS = 1500


@dataclass
class Group:
    """Spans of a unit that are updated together. ``queued`` and ``finished`` count its updates."""

    unit: int
    elements: int
    state_bytes: int  # on the SSD, all kinds
    grad_bytes: int
    old_param_bytes: int  # on the SSD, read with the gradients
    param_ssd_bytes: int
    param_content_bytes: int
    param_ssd_pages: int
    queued: int = 0
    finished: int = 0
    worker: int = -1  # whose ring it is in
    arrived: bool = False  # its states are in memory
    called: bool = False  # its gradients are complete
    grads_read: bool = False


def groups_of(transfers: Sequence[UnitTransfers], units: Sequence[int], state_kinds: int) -> list[list[Group]]:
    """Of each of ``units``."""
    total = sum(len(transfers[unit].spans) for unit in units)
    each = max(1, -(-total // _MOST_GROUPS))
    result = []
    for unit in units:
        spans = transfers[unit].spans
        result.append([_group(unit, spans[first : first + each], state_kinds) for first in range(0, len(spans), each)])
    return result


def _group(unit: int, spans: Sequence[SpanTransfers], state_kinds: int) -> Group:
    return Group(
        unit,
        elements=sum(span.elements for span in spans),
        state_bytes=state_kinds * sum(span.state_ssd_bytes for span in spans),
        grad_bytes=sum(span.grad_ssd_bytes for span in spans),
        old_param_bytes=sum(span.old_param_ssd_bytes for span in spans),
        param_ssd_bytes=sum(span.param_ssd_bytes for span in spans),
        param_content_bytes=sum(span.param_content_bytes for span in spans),
        param_ssd_pages=sum(span.param_ssd_bytes > 0 for span in spans),
    )


class SimulatedUpdater:
    """Carries groups through read → kernel → publish → write.

    ``published`` is called when a group's kernel is done, ``written`` when its writes are. ``moved(kind, link, bytes)``
    is told of what crosses a link. ``order[unit]``: the smaller, the sooner the next forward needs it.
    """

    def __init__(
        self,
        machine: Machine,
        groups: dict[int, list[Group]],
        order: dict[int, int],
        read_ahead: Sequence[int],
        *,
        threads: int,
        ring_depth: int,
        write_depth: int,
        latency: float,
        elements_per_s: float,
        state_kinds: Sequence[str],
        published: Callable[[Group], None],
        written: Callable[[Group], None],
        moved: Callable[[str, str, int], None],
        drawn: Callable[[str, str, float, int], None],
    ) -> None:
        self._machine = machine
        self.groups = groups
        self._order = order
        self._sequence = [group for unit in read_ahead for group in groups[unit]]
        self._next_ahead = 0  # counts on from step to step
        self._depth, self._latency, self._rate = ring_depth, latency, elements_per_s
        self._write_depth = write_depth
        self._writing = [0] * threads
        self._computed: list[list[Group]] = [[] for _ in range(threads)]
        self._state_kinds = state_kinds
        self._published, self._written, self._moved, self._drawn = published, written, moved, drawn
        self._queue: list[tuple[int, int, Group]] = []
        self._count = 0
        self.active = [0] * threads
        self._ready: list[list[Group]] = [[] for _ in range(threads)]
        self._computing = [False] * threads
        self.kernel_seconds = 0.0

    def submit(self, units: Sequence[int]) -> None:
        """The units' gradients are complete and in their pages."""
        for unit in units:
            for group in self.groups[unit]:
                group.queued += 1
                if group.finished < group.queued - 1:
                    continue  # its last update is still being written: it queues up when that is done
                if group.worker >= 0:
                    self._call(group)
                else:
                    self._enqueue(group)
        self.feed()

    def _enqueue(self, group: Group) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self._order[group.unit], self._count, group))

    def feed(self) -> None:
        """Fills free ring slots: with what is queued, or else with states whose gradients are yet to come."""
        while True:
            worker = min(range(len(self.active)), key=self.active.__getitem__)
            if self.active[worker] >= self._depth:
                return
            if self._queue:
                group = heapq.heappop(self._queue)[2]
                self._start(group, worker)
                self._call(group)
            elif (ahead := self._take_ahead()) is not None:
                self._start(ahead, worker)
            else:
                return

    def _take_ahead(self) -> Group | None:
        while self._sequence:
            step, place = divmod(self._next_ahead, len(self._sequence))
            group = self._sequence[place]
            if group.queued > step:  # its update began before its turn came
                self._next_ahead += 1
                continue
            if group.finished < step or group.worker >= 0:
                return None
            self._next_ahead += 1
            return group
        return None

    def _start(self, group: Group, worker: int) -> None:
        assert group.worker < 0, "a group is in one ring slot"
        self.active[worker] += 1
        group.worker, group.arrived, group.called, group.grads_read = worker, False, False, False
        start = self._machine.now

        def arrived() -> None:
            group.arrived = True
            self._drawn("ssd read", "states", start, group.state_bytes)
            self._compute_if_ready(group)

        if group.state_bytes:
            for kind in self._state_kinds:
                self._moved(kind, "ssd_read", group.state_bytes // len(self._state_kinds))
            self._machine.transfer(write=False, size=group.state_bytes, latency=self._latency, done=arrived)
        else:
            group.arrived = True

    def _call(self, group: Group) -> None:
        """The group's gradients are complete."""
        group.called = True
        start = self._machine.now

        def read() -> None:
            group.grads_read = True
            self._drawn("ssd read", "gradients" if group.grad_bytes else "former parameters", start, size)
            self._compute_if_ready(group)

        size = group.grad_bytes + group.old_param_bytes
        if size:
            self._moved("GRAD", "ssd_read", group.grad_bytes)
            self._moved("PARAM", "ssd_read", group.old_param_bytes)
            self._machine.transfer(write=False, size=size, latency=self._latency, done=read)
        else:
            group.grads_read = True
            self._compute_if_ready(group)

    def _compute_if_ready(self, group: Group) -> None:
        if group.arrived and group.called and group.grads_read:
            self._ready[group.worker].append(group)
            self._compute(group.worker)

    def _compute(self, worker: int) -> None:
        if self._computing[worker] or not self._ready[worker]:
            return
        group = self._soonest(self._ready[worker])
        self._computing[worker] = True
        start = self._machine.now

        def done() -> None:
            self._computing[worker] = False
            self.kernel_seconds += self._machine.now - start
            self._drawn(f"update {worker}", "kernel", start, group.param_content_bytes)
            self._moved("PARAM", "published", group.param_content_bytes)
            self._computed[worker].append(group)
            self._write_computed(worker)
            self._published(group)
            self._compute(worker)

        self._machine.run_on_core(group.elements / self._rate, done)

    def _soonest(self, groups: list[Group]) -> Group:
        return groups.pop(min(range(len(groups)), key=lambda place: (self._order[groups[place].unit], place)))

    def _write_computed(self, worker: int) -> None:
        while self._computed[worker] and self._writing[worker] < self._write_depth:
            self._writing[worker] += 1
            self._write(self._soonest(self._computed[worker]))

    def _write(self, group: Group) -> None:
        worker = group.worker
        size = group.state_bytes + group.param_ssd_bytes
        start = self._machine.now

        def finish() -> None:
            if size:
                self._drawn("ssd write", "states and parameters", start, size)
            group.finished += 1
            self.active[worker] -= 1
            self._writing[worker] -= 1
            group.worker = -1
            self._write_computed(worker)
            if group.finished < group.queued:
                self._enqueue(group)
            self._written(group)
            self.feed()

        if size:
            for kind in self._state_kinds:
                self._moved(kind, "ssd_written", group.state_bytes // len(self._state_kinds))
            self._moved("PARAM", "ssd_written", group.param_ssd_bytes)
            self._machine.transfer(write=True, size=size, latency=self._latency, done=finish)
        else:
            self._machine.after(0.0, finish)
