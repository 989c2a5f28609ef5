"""The simulated computing thread: it enters uses, waits for their units, computes, and hands gradients over.

At the entry of use k every move with trigger k is issued; then computing waits until the units of k are on the device
with their newest parameters, and then it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from angelptm.plan.channels import Cores, Event, Machine, Ssd
from angelptm.plan.fetching import SimulatedFetcher
from angelptm.plan.placed import Plan
from angelptm.plan.prediction import CHANNELS, Settings
from angelptm.plan.rates import Rates
from angelptm.plan.residence import neighbours_of
from angelptm.plan.schedule import LINKS, Fetch, Schedule, Traffic
from angelptm.plan.trace import Trace
from angelptm.plan.transfers import transfers_of
from angelptm.plan.updating import Group, SimulatedUpdater, groups_of


@dataclass
class StepTotals:
    """Since the start of the first step, or of one step: the difference of two."""

    busy: dict[str, float]
    stalls: dict[str, float]
    traffic: Traffic
    handed_over: int
    now: float
    events: list[Event] = field(default_factory=list)


class SimulatedStep:
    """The computing thread, and what it shares with updater and fetcher."""

    def __init__(self, plan: Plan, trace: Trace, schedule: Schedule, rates: Rates, settings: Settings) -> None:
        self._plan, self._trace, self._schedule, self._rates = plan, trace, schedule, rates
        self._serial = settings.mode == "serial"
        self._planned = settings.mode == "planned"
        late = self._serial or schedule.updates == "forward"
        self._late = {unit for unit in schedule.update_order if late or plan.units[unit].waits_for_step}
        self.machine = Machine(
            Ssd(rates.ssd_read_bytes_per_s, rates.ssd_write_bytes_per_s, rates.ssd_mixed_bytes_per_s),
            Cores(
                rates.cores,
                rates.compute_threads,
                rates.compute_beside_update,
                rates.update_beside_compute,
                rates.compute_beside_drive,
            ),
        )
        transfers = transfers_of(plan)
        kinds = plan.state_kinds
        trained = schedule.update_order
        self._names = [unit.layout.name for unit in plan.units]
        self._always = [own.always_there for own in transfers]
        self._resident = list(self._always)
        self._sizes = [unit.frame_count for unit in plan.units]
        self._frames = sum(size for size, there in zip(self._sizes, self._resident) if there)
        self.peak_frames = self._frames
        self._neighbours = neighbours_of(self._sizes, schedule.offsets)
        self._submitted = [0] * len(plan.units)  # updates asked for
        self._unpublished = [0] * len(plan.units)  # groups under way of the last of them
        self._unwritten = [0] * len(plan.units)
        self._published = [0] * len(plan.units)  # updates complete; always what a fetch of that step needs
        self._trained = set(trained)
        self.updater = SimulatedUpdater(
            self.machine,
            dict(zip(trained, groups_of(transfers, trained, len(kinds)))),
            {unit: place for place, unit in enumerate(trained)},
            schedule.read_ahead_order if self._planned else (),
            threads=settings.update_threads or plan.update_threads,
            ring_depth=settings.ring_depth or plan.ring_depth,
            write_depth=plan.write_depth,
            latency=rates.ssd_latency_seconds,
            elements_per_s=rates.update_elements_per_s,
            state_kinds=kinds,
            published=self._group_published,
            written=self._group_written,
            moved=self._moved,
            drawn=self._draw,
        )
        self.fetcher = SimulatedFetcher(
            self.machine,
            transfers,
            staging_frames=plan.fetch_frames,
            read_ahead_frames=min(schedule.read_ahead_frames, plan.fetch_frames - 1) if self._planned else 0,
            latency=rates.ssd_latency_seconds,
            bytes_per_s=rates.host_to_device_bytes_per_s,
            on_cores=rates.compute_uses_cores,
            current=self._is_current,
            written=lambda unit, step: self._is_current(unit, step) and not self._unwritten[unit],
            begin=self._clear_frames,
            arrive=self._arrived,
            moved=self._moved,
            drawn=self._draw,
            order={unit: place for place, unit in enumerate(trained)},
        )
        self._triggers: dict[int, list[tuple[Callable[..., None], Fetch, int]]] = {}
        if self._planned:
            self._lay_triggers()
        self._copies: dict[int, list[int]] = {}
        self._submits: dict[int, list[int]] = {}
        ended = [max((window.end for window in own), default=0) for own in trace.windows()]
        for place, done in enumerate(trace.gradients):
            self._copies.setdefault(done.use, []).append(place)
            self._submits.setdefault(max(done.use, ended[done.unit]), []).append(place)
        self._spilling = 0  # gradient writes under way
        self._after_spill: list[Callable[[], None]] = []
        self.step, self.use = 0, -1
        self._waits_since: tuple[float, str] | None = None
        self.totals = StepTotals(
            dict.fromkeys(CHANNELS, 0.0),
            {},
            {kind: dict.fromkeys(LINKS, 0) for kind in ("PARAM", "GRAD", *kinds)},
            0,
            0.0,
        )
        self.step_ended = False

    def _lay_triggers(self) -> None:
        """Moves by the slot at which they are issued: (what to do, fetch, steps ahead)."""
        period = self._schedule.use_count + 1
        for fetch in sorted(self._schedule.fetches, key=lambda one: one.use):
            for act, trigger in (
                (self.fetcher.read_ahead, fetch.read_ahead_trigger),
                (self.fetcher.issue, fetch.trigger),
            ):
                ahead = trigger < 0
                self._triggers.setdefault(trigger % period, []).append((act, fetch, int(ahead)))

    # Pages

    def _is_current(self, unit: int, step: int) -> bool:
        return self._published[unit] >= step or unit not in self._trained

    def _clear_frames(self, unit: int) -> None:
        for other in self._neighbours[unit]:
            if self._resident[other]:
                self._resident[other] = False
                self._frames -= self._sizes[other]
        self._frames += self._sizes[unit]
        self.peak_frames = max(self.peak_frames, self._frames)

    def _arrived(self, unit: int) -> None:
        self._resident[unit] = True
        self._look()

    def _group_published(self, group: Group) -> None:
        unit = group.unit
        self.fetcher.hand_over(group, self._submitted[unit])
        self._unpublished[unit] -= 1
        if not self._unpublished[unit]:
            self._published[unit] = self._submitted[unit]
            self.fetcher.pump()
            self._look()

    def _group_written(self, group: Group) -> None:
        self._unwritten[group.unit] -= 1
        if not self._unwritten[group.unit]:
            self.fetcher.pump()
        if self.step_waits and not any(self._unwritten):
            self._end_wait()
            self._next_step()

    def _moved(self, kind: str, link: str, size: int) -> None:
        self.totals.traffic[kind][link] += size

    def _draw(self, lane: str, name: str, start: float, size: int) -> None:
        self.totals.events.append(Event(lane, name, start, self.machine.now, size))

    # Computing

    step_waits = False

    def begin(self) -> None:
        """The first step; what is fetched ahead of it is issued now."""
        self._issue(self._schedule.use_count, -1)
        for slot in sorted(self._triggers):
            for act, fetch, ahead in self._triggers[slot]:
                if ahead and slot != self._schedule.use_count:
                    act(fetch.unit, 0, fetch.use)
        self.updater.feed()
        self._enter()

    def _issue(self, slot: int, step: int) -> None:
        for act, fetch, ahead in self._triggers.get(slot, ()):
            if step + ahead >= 0:
                act(fetch.unit, step + ahead, fetch.use)

    def _enter(self) -> None:
        self.use += 1
        if self.use == len(self._trace.uses):
            self._end_step()
            return
        self._issue(self.use, self.step)
        self._waits_since = (self.machine.now, "")
        self._look()

    def _missing(self) -> tuple[int, str] | None:
        """The first unit of the use that is not there, and what is waited for."""
        for unit in self._trace.uses[self.use].units:
            if not self._is_current(unit, self.step):
                return unit, f"update of {self._names[unit]}"
            if not self._resident[unit]:
                return unit, f"fetch of {self._names[unit]}"
        return None

    def _look(self) -> None:
        """Goes on if computing waits for pages and they are there; demands those that are not."""
        if self._waits_since is None or self.step_waits:
            return
        missing = self._missing()
        cause = missing[1] if missing else ""
        if cause != self._waits_since[1]:
            self._end_wait()
            self._waits_since = (self.machine.now, cause)
        if missing is None:
            self._waits_since = None
            self._compute()
            return
        for unit in self._trace.uses[self.use].units:
            if not self._resident[unit]:
                found = self.fetcher.find(unit, self.step, self.use)
                if found is None or not found.demanded:
                    self.fetcher.issue(unit, self.step, self.use, demanded=True)
                    return  # it may have looked again already

    def _end_wait(self) -> None:
        assert self._waits_since is not None
        since, cause = self._waits_since
        if cause and self.machine.now > since:
            self.totals.stalls[cause] = self.totals.stalls.get(cause, 0.0) + self.machine.now - since
            self._draw("compute", f"wait for {cause}", since, 0)
        self._waits_since = None

    def _compute(self) -> None:
        use = self._trace.uses[self.use]
        start = self.machine.now

        def done() -> None:
            self.totals.busy["compute"] += self.machine.now - start
            self._draw("compute", f"{use.phase} {use.site}", start, 0)
            self._copy_gradients()

        if self._rates.compute_uses_cores:
            self.machine.compute_on_cores(use.seconds, done)
        else:
            self.machine.after(use.seconds, done)

    def _copy_gradients(self) -> None:
        done = [self._trace.gradients[place] for place in self._copies.get(self.use, ())]
        if not done:
            self._leave()
            return
        rate = self._rates.gradient_bytes_per_s
        seconds = sum(one.copy_seconds or one.bytes / rate for one in done)
        start = self.machine.now

        def copied() -> None:
            self.totals.busy["gradient copy"] += self.machine.now - start
            self._draw("compute", "gradients", start, sum(one.bytes for one in done))
            for one in done:
                self._moved("GRAD", "device_to_host", one.bytes)
                self._spill(one.unit)
            self._leave()

        if self._rates.compute_uses_cores:
            self.machine.run_on_core(seconds, copied)
        else:
            self.machine.after(seconds, copied)

    def _spill(self, unit: int) -> None:
        """Gradients whose home is the SSD are written behind."""
        size = sum(group.grad_bytes for group in self.updater.groups[unit])
        if not size:
            return
        start = self.machine.now
        self._spilling += 1
        self._moved("GRAD", "ssd_written", size)

        def written() -> None:
            self._spilling -= 1
            self._draw("ssd write", "gradients", start, size)
            if not self._spilling:
                waiting, self._after_spill = self._after_spill, []
                for act in waiting:
                    act()

        self.machine.transfer(write=True, size=size, latency=self._rates.ssd_latency_seconds, done=written)

    def _when_spilled(self, act: Callable[[], None]) -> None:
        if self._spilling:
            self._after_spill.append(act)
        else:
            act()

    def _leave(self) -> None:
        """The use is over: updates of units that it completed begin."""
        done = [self._trace.gradients[place].unit for place in self._submits.get(self.use, ())]
        if early := [unit for unit in done if unit not in self._late]:
            self._ask(early)
        self._enter()

    def _ask(self, units: list[int]) -> None:
        """Asks for the update of units: what the arena has of them is outdated."""
        for unit in units:
            self._submitted[unit] += 1
            self._unpublished[unit] += len(self.updater.groups[unit])
            if not self.updater.groups[unit]:  # all its pages belong to other ranks
                self._published[unit] = self._submitted[unit]
            self._unwritten[unit] += len(self.updater.groups[unit])
            if self._resident[unit] and not self._always[unit]:
                self._resident[unit] = False
                self._frames -= self._sizes[unit]
        self._when_spilled(lambda: self.updater.submit(units))

    def _end_step(self) -> None:
        if self._late:
            self._ask([unit for unit in self._schedule.update_order if unit in self._late])
        self._issue(self._schedule.use_count, self.step)
        if self._serial and any(self._unwritten):
            self.step_waits = True
            self._waits_since = (self.machine.now, "the updates")
            return
        self._next_step()

    def _next_step(self) -> None:
        self.step_waits = False
        self.step_ended = True
        self.step, self.use = self.step + 1, -1

    def resume(self) -> None:
        """Begins the step after one that ended."""
        self.step_ended = False
        self._enter()

    def take_totals(self) -> StepTotals:
        """All so far; events since the last call."""
        totals = self.totals
        busy = dict(totals.busy)
        busy["ssd"] = self.machine.ssd.busy_seconds
        busy["cores"] = self.machine.cores.busy_seconds
        busy["host_to_device"] = self.fetcher.copy_seconds
        busy["updater"] = self.updater.kernel_seconds / len(self.updater.active)
        taken = StepTotals(
            busy,
            dict(totals.stalls),
            {kind: dict(links) for kind, links in totals.traffic.items()},
            self.fetcher.handed_over_bytes,
            self.machine.now,
            totals.events,
        )
        totals.events = []
        return taken
