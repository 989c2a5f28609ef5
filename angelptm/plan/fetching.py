"""The simulated fetcher: one thread that brings units to the device, and the reads that run ahead of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from angelptm.plan.channels import Machine
from angelptm.plan.transfers import UnitTransfers
from angelptm.plan.updating import Group

_READS_PER_FETCH = 4


@dataclass
class Arrival:
    """A unit on its way to the device for ``use`` of step ``step``, which needs its parameters of version ``step``."""

    unit: int
    step: int
    use: int
    unread_pages: int
    unread_ssd: int  # bytes
    unread_content: int
    ready_bytes: int  # in memory, to be copied
    issued: bool = False  # its frames in the arena are free: it may be copied
    demanded: bool = False
    reading: int = 0
    ready_pages: int = 0  # of what is ready, in staging frames

    @property
    def complete(self) -> bool:
        return not (self.unread_pages or self.reading or self.ready_bytes)


@dataclass
class _Kept:
    """New parameters of a group that stay in staging frames, for a fetch that nobody has asked for yet."""

    group: Group
    step: int


class SimulatedFetcher:
    """Serves arrivals first in, first out, those that computing waits for before all others; one whose unit's update is
    not published lets later ones pass.

    New parameters stay in free staging frames until they are fetched; those that are needed sooner (``order``) displace
    others, and so do reads for an arrival that was issued.

    ``current(unit, step)`` and ``written(unit, step)`` say whether the parameters of that step are published, and on
    the SSD. ``begin(unit)`` clears the unit's frames, ``arrive(unit)`` tells that it is there.
    """

    def __init__(
        self,
        machine: Machine,
        transfers: tuple[UnitTransfers, ...],
        *,
        staging_frames: int,
        read_ahead_frames: int,
        latency: float,
        bytes_per_s: float,
        on_cores: bool,
        current: Callable[[int, int], bool],
        written: Callable[[int, int], bool],
        begin: Callable[[int], None],
        arrive: Callable[[int], None],
        moved: Callable[[str, str, int], None],
        drawn: Callable[[str, str, float, int], None],
        order: Mapping[int, int],
    ) -> None:
        self._machine, self._transfers = machine, transfers
        self._staging, self._read_ahead = max(1, staging_frames), read_ahead_frames
        self._latency, self._rate, self._on_cores = latency, bytes_per_s, on_cores
        self._current, self._written = current, written
        self._begin, self._arrive, self._moved, self._drawn = begin, arrive, moved, drawn
        self._open: list[Arrival] = []  # issued ones in their order, then those that are only read ahead
        self._served: Arrival | None = None
        self._copying = False
        self._order = order
        self._kept: dict[int, _Kept] = {}  # by the identity of the group
        self._used_frames = 0
        self.peak_frames = 0
        self.copy_seconds = 0.0
        self.handed_over_bytes = 0

    def find(self, unit: int, step: int, use: int) -> Arrival | None:
        for arrival in self._open:
            if (arrival.unit, arrival.step, arrival.use) == (unit, step, use):
                return arrival
        return None

    def read_ahead(self, unit: int, step: int, use: int) -> None:
        """The unit's pages may be read into staging frames."""
        if self.find(unit, step, use) is None:
            self._open.append(self._new(unit, step, use))
            self.pump()

    def issue(self, unit: int, step: int, use: int, *, demanded: bool = False) -> None:
        """The unit may be copied to the device."""
        arrival = self.find(unit, step, use)
        if arrival is None:
            arrival = self._new(unit, step, use)
            self._open.append(arrival)
        if demanded and not arrival.demanded:
            arrival.demanded = True
        if not arrival.issued:
            arrival.issued = True
            self._begin(unit)
            self._open.remove(arrival)
            place = sum(one.issued for one in self._open)
            self._open.insert(place, arrival)
        self.pump()

    def _new(self, unit: int, step: int, use: int) -> Arrival:
        own = self._transfers[unit]
        return Arrival(
            unit,
            step,
            use,
            own.fetch_ssd_pages,
            own.fetch_ssd_bytes,
            own.fetch_ssd_content,
            own.fetch_bytes - own.fetch_ssd_content,
        )

    def hand_over(self, group: Group, step: int) -> None:
        """A group of a unit has its new parameters: an arrival that was issued takes them from the updater's frames;
        for others they stay in staging frames, if these are free or hold what is needed later."""
        pages = group.param_ssd_pages
        if not pages:
            return
        if id(group) in self._kept:
            self._drop(id(group))  # of a version that has passed
        for arrival in self._open:
            if (arrival.unit, arrival.step) == (group.unit, step) and arrival.issued and arrival.unread_pages:
                self._take_over(arrival, group)
                return
        while self._used_frames + pages > self._staging:
            farthest = max(self._kept, key=lambda one: self._order[self._kept[one].group.unit], default=None)
            if farthest is None or self._order[self._kept[farthest].group.unit] <= self._order[group.unit]:
                return
            self._drop(farthest)
        self._take_frames(pages)
        self._kept[id(group)] = _Kept(group, step)

    def _take_over(self, arrival: Arrival, group: Group) -> None:
        """The group's pages need not be read."""
        pages = min(group.param_ssd_pages, arrival.unread_pages)
        arrival.unread_pages -= pages
        arrival.unread_ssd -= group.param_ssd_bytes
        arrival.unread_content -= group.param_content_bytes
        arrival.ready_bytes += group.param_content_bytes
        self.handed_over_bytes += group.param_content_bytes

    def _drop(self, key: int) -> None:
        self._used_frames -= self._kept.pop(key).group.param_ssd_pages

    def _take_kept(self, arrival: Arrival) -> None:
        """An arrival gets what is kept of its unit."""
        for key, kept in list(self._kept.items()):
            if (kept.group.unit, kept.step) == (arrival.unit, arrival.step):
                del self._kept[key]
                self._take_over(arrival, kept.group)
                arrival.ready_pages += kept.group.param_ssd_pages

    def _take_frames(self, pages: int) -> None:
        self._used_frames += pages
        self.peak_frames = max(self.peak_frames, self._used_frames)

    def pump(self) -> None:
        """Begins whatever can begin: call it after anything changed."""
        if self._served is None:
            waiting = [one for one in self._open if one.issued and self._current(one.unit, one.step)]
            if waiting:
                self._served = min(waiting, key=lambda one: not one.demanded)
        if self._served is not None:
            self._read(self._served, self._staging)
            self._copy(self._served)
        for arrival in sorted(self._open, key=lambda one: not one.demanded):
            if self._used_frames >= self._read_ahead:
                break
            if arrival is not self._served:
                self._read(arrival, self._read_ahead)

    def _read(self, arrival: Arrival, quota: int) -> None:
        """Reads as many of the arrival's pages as staging frames allow."""
        if arrival.unread_pages and (arrival.issued or self._used_frames <= quota):
            self._take_kept(arrival)
        while arrival.unread_pages and self._written(arrival.unit, arrival.step):
            while arrival.issued and self._used_frames >= quota and self._kept:
                self._drop(next(iter(self._kept)))
            whole = self._transfers[arrival.unit].fetch_ssd_pages
            # Half of the frames at most, as one read is under way while the one before it is copied.
            pages = min(
                arrival.unread_pages,
                quota - self._used_frames,
                max(1, quota // 2),
                -(-whole // _READS_PER_FETCH),
            )
            if pages <= 0:
                return
            size = arrival.unread_ssd * pages // arrival.unread_pages
            content = arrival.unread_content * pages // arrival.unread_pages
            arrival.unread_pages -= pages
            arrival.unread_ssd -= size
            arrival.unread_content -= content
            arrival.reading += 1
            self._take_frames(pages)
            self._moved("PARAM", "ssd_read", size)
            self._submit(arrival, pages, size, content)

    def _submit(self, arrival: Arrival, pages: int, size: int, content: int) -> None:
        start = self._machine.now

        def arrived() -> None:
            arrival.reading -= 1
            arrival.ready_pages += pages
            arrival.ready_bytes += content
            self._drawn("ssd read", f"unit {arrival.unit}", start, size)
            self.pump()

        self._machine.transfer(write=False, size=size, latency=self._latency, done=arrived)

    def _copy(self, arrival: Arrival) -> None:
        if self._copying:
            return
        if arrival.complete:
            self._served = None
            self._open.remove(arrival)
            self._arrive(arrival.unit)
            self.pump()
            return
        if not arrival.ready_bytes:
            return
        size, pages = arrival.ready_bytes, arrival.ready_pages
        arrival.ready_bytes = arrival.ready_pages = 0
        self._copying = True
        start = self._machine.now
        self._moved("PARAM", "host_to_device", size)

        def copied() -> None:
            self._copying = False
            self.copy_seconds += self._machine.now - start
            self._used_frames -= pages
            self._drawn("host to device", f"unit {arrival.unit}", start, size)
            self.pump()

        if self._on_cores:
            self._machine.run_on_core(size / self._rate, copied)
        else:
            self._machine.after(size / self._rate, copied)
