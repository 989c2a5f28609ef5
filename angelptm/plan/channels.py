"""What simulated work runs on: servers that share their rate among the jobs under way, and the clock of events."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

Action = Callable[[], None]
_NEVER = float("inf")


@dataclass(frozen=True)
class Event:
    """A piece of work on a lane of the drawing, seconds from the start of the step (negative: begun before it)."""

    lane: str
    name: str
    start: float
    end: float
    bytes: int


class SharedServer:
    """Serves all its jobs at one speed each; ``speed`` is set by whoever knows what else runs.

    Virtual time is the service that every job under way has had since the server began; a job is done when virtual time
    has grown by its work.
    """

    def __init__(self) -> None:
        self.speed = 0.0
        self.jobs: list[tuple[float, int, Action]] = []
        self._virtual = 0.0
        self._at = 0.0
        self._count = 0

    def advance(self, now: float) -> None:
        """To be called before anything changes."""
        if self.jobs:
            self._virtual += (now - self._at) * self.speed
        self._at = now

    def add(self, work: float, done: Action) -> None:
        self._count += 1
        heapq.heappush(self.jobs, (self._virtual + work, self._count, done))

    def next_end(self) -> float:
        """Of the jobs under way, of which there is one."""
        left = self.jobs[0][0] - self._virtual
        return self._at if left <= 0 else self._at + left / self.speed

    def take(self) -> Action:
        """The job that is done now."""
        finished, _, done = heapq.heappop(self.jobs)
        self._virtual = max(self._virtual, finished)
        return done


class Ssd:
    """One drive: reads share a rate, writes share another, and when both are under way each direction has half of the
    mixed rate. Every transfer begins with the drive's latency."""

    def __init__(self, read: float, write: float, mixed: float) -> None:
        self._alone = (read, write)
        self._mixed = mixed
        self.directions = (SharedServer(), SharedServer())
        self.busy_seconds = 0.0
        self._at = 0.0

    def advance(self, now: float) -> None:
        if self.busy:
            self.busy_seconds += now - self._at
        self._at = now
        reads, writes = self.directions
        reads.advance(now)
        writes.advance(now)

    @property
    def busy(self) -> bool:
        return bool(self.directions[0].jobs or self.directions[1].jobs)

    def share(self) -> None:
        reads, writes = self.directions
        both = reads.jobs and writes.jobs
        if reads.jobs:
            reads.speed = (self._mixed / 2 if both else self._alone[0]) / len(reads.jobs)
        if writes.jobs:
            writes.speed = (self._mixed / 2 if both else self._alone[1]) / len(writes.jobs)


class Cores:
    """Processor cores shared by runnable threads, and by computing, which is ``compute_threads`` of them, by default as
    many as there are cores.

    ``compute_beside`` and ``thread_beside`` are the speeds of computing and of one other thread beside each other,
    parts of what each has alone. Without them cores are shared evenly; more threads share what one would have.
    ``compute_beside_drive`` is the speed of computing while the drive is busy.
    """

    def __init__(
        self,
        count: int,
        compute_threads: int | None = None,
        compute_beside: float | None = None,
        thread_beside: float | None = None,
        compute_beside_drive: float | None = None,
    ) -> None:
        self._count = count
        self._compute_threads = count if compute_threads is None else compute_threads
        even = min(1.0, count / (self._compute_threads + 1))
        self._compute_beside = (even if compute_beside is None else compute_beside) / even
        self._thread_beside = (even if thread_beside is None else thread_beside) / even
        self._compute_beside_drive = 1.0 if compute_beside_drive is None else compute_beside_drive
        self.compute, self.threads = SharedServer(), SharedServer()
        self.busy_seconds = 0.0  # of all cores together, over their number
        self._at = 0.0

    def advance(self, now: float) -> None:
        if runnable := len(self.threads.jobs) + (self._compute_threads if self.compute.jobs else 0):
            self.busy_seconds += (now - self._at) * min(1.0, runnable / self._count)
        self._at = now
        self.compute.advance(now)
        self.threads.advance(now)

    def share(self, drive_busy: bool) -> None:
        threads = len(self.threads.jobs)
        if not self.compute.jobs:
            self.threads.speed = min(1.0, self._count / threads) if threads else 1.0
        elif not threads:
            self.compute.speed = 1.0
        else:
            even = min(1.0, self._count / (threads + self._compute_threads))
            self.compute.speed = even * self._compute_beside
            self.threads.speed = even * self._thread_beside
        if drive_busy:
            self.compute.speed *= self._compute_beside_drive


class Machine:
    """The clock, the SSD and the cores. Actions run in the order of their times, and of their making at one time."""

    def __init__(self, ssd: Ssd, cores: Cores) -> None:
        self.now = 0.0
        self.ssd, self.cores = ssd, cores
        self._servers = (*ssd.directions, cores.compute, cores.threads)
        self._timers: list[tuple[float, int, Action]] = []
        self._count = 0

    def after(self, seconds: float, action: Action) -> None:
        self._count += 1
        heapq.heappush(self._timers, (self.now + seconds, self._count, action))

    def transfer(self, *, write: bool, size: float, latency: float, done: Action) -> None:
        """A transfer of ``size`` bytes between memory and the SSD."""

        def begin() -> None:
            self.ssd.directions[write].add(size, done)

        self.after(latency, begin)

    def run_on_core(self, seconds: float, done: Action) -> None:
        """One thread's work that takes ``seconds`` on a core of its own."""
        self.cores.threads.add(seconds, done)

    def compute_on_cores(self, seconds: float, done: Action) -> None:
        """Computing that takes ``seconds`` beside nothing else."""
        self.cores.compute.add(seconds, done)

    def step(self) -> bool:
        """Runs the next action; False when there is none."""
        self.ssd.share()
        self.cores.share(self.ssd.busy)
        first = self._timers[0][0] if self._timers else _NEVER
        next_server = None
        for server in self._servers:
            if server.jobs and (end := server.next_end()) < first:
                first, next_server = end, server
        if first == _NEVER:
            return False
        self.now = max(self.now, first)
        self.ssd.advance(self.now)
        self.cores.advance(self.now)
        (next_server.take() if next_server else heapq.heappop(self._timers)[2])()
        return True
