"""The host pool: which pages live in it, and what frames serve pages on the move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from angelptm.errors import CapacityError
from angelptm.plan.budgets import Budgets, SsdBudget
from angelptm.plan.shape import Demand
from angelptm.sizes import format_bytes, mib

_MIN_STAGING = 2
_MOST_READOUT_FRAMES = 16
AUTO_RING_DEPTH = 3
_MOST_UPDATE_THREADS = 16
_DEEPEST_AUTO_RING = 16
_LEAST_PAGE_BYTES = 64 * 2**10  # of what a config may ask for


@dataclass(frozen=True)
class _Split:
    """Host allowance in pages of each kind, and what of the pool serves moving pages."""

    param: int
    grad: int
    states: int
    threads: int
    depth: int
    slot_frames: int
    staging: int
    spare: int = 0

    @property
    def ring_frames(self) -> int:
        return self.threads * self.depth * self.slot_frames

    @property
    def home_frames(self) -> int:
        return self.param + self.grad + self.states

    @property
    def needed_frames(self) -> int:
        return self.home_frames + self.ring_frames + self.staging + self.spare


@dataclass(frozen=True)
class _Wishes:
    """Host pages that are fixed by placement.*, None where the plan decides; and the pages that there are."""

    fixed: tuple[int | None, int | None, int | None]  # param, grad, states
    total: tuple[int, int, int]

    @property
    def fixed_sum(self) -> int:
        return sum(pages or 0 for pages in self.fixed)

    def with_room(self, room: int) -> tuple[int, int, int]:
        """Host pages of each kind when ``room`` frames are to spare for the kinds that the plan places."""
        chosen = []
        for fixed, total in zip(self.fixed, self.total):
            pages = min(total, room) if fixed is None else fixed
            room -= pages if fixed is None else 0
            chosen.append(pages)
        return chosen[0], chosen[1], chosen[2]


def _wishes(budgets: Budgets, demand: Demand, param_on_device: bool) -> _Wishes:
    total = (0 if param_on_device else demand.param_pages, demand.grad_pages, demand.state_pages)
    if budgets.sweep is not None:
        budgets = replace(budgets, param="host", grad="host")
    fixed: list[int | None] = [
        {"host": pages, "ssd": 0, "device": 0}.get(str(placement))
        for placement, pages in zip((budgets.param, budgets.grad, budgets.states), total)
    ]
    if isinstance(budgets.states, float):
        fixed[2] = math.floor(demand.state_pages * budgets.states)
    return _Wishes((fixed[0], fixed[1], fixed[2]), total)


def most_threads(budgets: Budgets) -> int:
    """Updating threads at most: where the model computes on a GPU, cores have little else to do."""
    if budgets.update_threads is not None:
        return budgets.update_threads
    most = min(_MOST_UPDATE_THREADS, budgets.cores - 2) if budgets.device_is_apart else 0
    return max(1, most, min(2, budgets.cores))


def split_host(budgets: Budgets, demand: Demand, param_on_device: bool, spare: int) -> _Split:
    """Homes and ring. Raises CapacityError where the pool is too small for any."""
    page, frames = budgets.page_bytes, budgets.host_bytes // budgets.page_bytes
    enough, lacking = budgets, None
    # More than once where the larger pool keeps more frames for gradients that come from the device.
    while (split := _find_split(enough, demand, param_on_device, spare)).needed_frames * page > enough.host_bytes:
        enough, lacking = replace(enough, host_bytes=split.needed_frames * page), split
    if lacking is None:
        return split

    def fits(other: Budgets) -> bool:
        found = _find_split(other, demand, param_on_device, spare if other.sweep is not None else 0)
        return found.needed_frames <= frames

    instead = next((text for text, other in _other_homes(budgets) if fits(other)), None)
    if instead is None and _wishes(budgets, demand, param_on_device).fixed_sum == 0:
        instead = _smaller_pages(budgets, demand)
    raise _host_error(budgets, lacking, frames, instead)


def _find_split(budgets: Budgets, demand: Demand, param_on_device: bool, spare: int) -> _Split:
    """What fits stays in memory, if need be with a narrow ring; else homes and moving pages share. Where neither is
    possible, what needs the fewest frames.

    More host frames never mean fewer homes: pages on the move get half of what is not fixed, at least what one span in
    flight needs, at most what the full ring needs, and so homes get what grows with the pool.
    """
    frames = budgets.host_bytes // budgets.page_bytes
    wishes = _wishes(budgets, demand, param_on_device)
    threads = most_threads(budgets)
    depth = budgets.ring_depth or AUTO_RING_DEPTH
    least_threads, least_depth = budgets.update_threads or 1, budgets.ring_depth or 1

    def split(homes: tuple[int, int, int], ring_room: int) -> _Split:
        """With the widest ring that ``ring_room`` frames hold, less what is kept for staging."""
        on_ssd = [pages < total for pages, total in zip(homes, wishes.total)]
        # A span that straddles the border of its kind counts as one on the SSD.
        taken = on_ssd[1] or budgets.sweep is not None
        slot = (0 if param_on_device else 1) + (demand.span_grad_pages if taken else 0)
        slot += demand.span_state_pages if on_ssd[2] else 0
        staging = (_MIN_STAGING if any(on_ssd) or wishes.total[0] else 0) + kept_frames(budgets)
        n, d = threads, depth
        while d > least_depth and n * d * slot + staging + spare > ring_room:
            d -= 1
        while n > least_threads and n * d * slot + staging + spare > ring_room:
            n -= 1
        return _Split(*homes, n, d, slot, staging, spare)

    in_memory = wishes.with_room(sum(wishes.total))
    everything = split(in_memory, frames - sum(in_memory))
    if everything.needed_frames <= frames:
        return _deepened(budgets, demand, everything, frames)
    least = split(wishes.with_room(0), 0)
    if budgets.ssd and least.needed_frames <= frames:
        slot = (0 if param_on_device else 1) + demand.span_state_pages + demand.span_grad_pages
        full = threads * depth * slot + max(_MIN_STAGING, budgets.queue_depth) + kept_frames(budgets) + spare
        shared = frames - wishes.fixed_sum
        moving = max(least.needed_frames - wishes.fixed_sum, min(full, shared // 2))
        return _deepened(budgets, demand, split(wishes.with_room(shared - moving), moving), frames)
    return min(everything, least, key=lambda one: one.needed_frames) if budgets.ssd else everything


def _deepened(budgets: Budgets, demand: Demand, split: _Split, frames: int) -> _Split:
    """A deeper ring where frames are left over, in which the updater reads states before their gradients come: at most
    one that holds all of them that live on the SSD."""
    spans = math.ceil((demand.state_pages - split.states) / max(1, demand.span_state_pages))
    if budgets.ring_depth is not None or split.depth < AUTO_RING_DEPTH:
        return split
    deeper = replace(split, depth=split.depth + 1)
    while (
        deeper.depth <= min(_DEEPEST_AUTO_RING, math.ceil(spans / split.threads))
        and deeper.needed_frames + budgets.queue_depth <= frames
    ):
        split, deeper = deeper, replace(deeper, depth=deeper.depth + 1)
    return split


def _other_homes(budgets: Budgets) -> Iterator[tuple[str, Budgets]]:
    """What may spare the host pages that live there: as the user is told, and as budgets."""
    swept = budgets.sweep is not None
    forced = [name for name in ("param", "grad") if getattr(budgets, name) == "host" and not swept]
    if budgets.states == "host" or (isinstance(budgets.states, float) and budgets.states > 0):
        forced.append("states")
    texts = []
    if not budgets.ssd:
        texts.append("add tiers.ssd: [{path: FOLDER}] to keep what does not fit on the SSD")
        budgets = replace(budgets, ssd=(SsdBudget("", None, 0),))
        yield texts[0], budgets
    if forced:
        texts.append(f"set {' and '.join(f'placement.{name}' for name in forced)} to auto")
        budgets = replace(
            budgets,
            param="auto" if "param" in forced else budgets.param,
            grad="auto" if "grad" in forced else budgets.grad,
            states="auto" if "states" in forced else budgets.states,
        )
        yield ", and ".join(texts), budgets
    if swept:
        texts.append("set update.mode to sync")
        yield ", and ".join(texts), replace(budgets, sweep=None)


def _smaller_pages(budgets: Budgets, demand: Demand) -> str | None:
    """The largest page size, below the one that is set, with which frames for pages on the move fit."""
    if not budgets.ssd or budgets.sweep is not None:
        return None
    threads, depth = budgets.update_threads or 1, budgets.ring_depth or 1
    page = budgets.page_bytes // 2
    while page >= _LEAST_PAGE_BYTES:
        moving = threads * depth * demand.full_span_pages + _MIN_STAGING
        if (moving + kept_frames(replace(budgets, page_bytes=page))) * page <= budgets.host_bytes:
            return f"lower page_size to {format_bytes(page)} (now {format_bytes(budgets.page_bytes)})"
        page //= 2
    return None


def _host_error(budgets: Budgets, split: _Split, frames: int, instead: str | None) -> CapacityError:
    page = budgets.page_bytes
    return CapacityError(
        "host",
        split.needed_frames * page,
        frames * page,
        f"pages that live there ({format_bytes(split.home_frames * page)}) and frames for pages on the move "
        f"({format_bytes((split.ring_frames + split.staging + split.spare) * page)})",
        f"Raise tiers.host to {mib(split.needed_frames * page)}{f', or {instead}' if instead else ''}.",
    )


def spare_frames(budgets: Budgets, demand: Demand, stay: bool) -> int:
    """For former parameters: a step computes with one version of a unit from its forward to its backward. Where the
    unit stays in the arena meanwhile, the former content is read only until it has been copied there."""
    if budgets.sweep is None:
        return 0
    threads = most_threads(budgets)
    return min(demand.param_pages, threads + 1) if stay else demand.param_pages


def saver_frames(budgets: Budgets) -> int:
    """What the thread that makes commits keeps for itself."""
    return 1 if budgets.commits is not None else 0


def readout_frames(budgets: Budgets) -> int:
    """More of them for a larger pool: what is being copied is what hides the link's latency."""
    if not budgets.device_is_apart:
        return 0
    return max(2, min(_MOST_READOUT_FRAMES, budgets.host_bytes // budgets.page_bytes // 32))


def kept_frames(budgets: Budgets) -> int:
    return saver_frames(budgets) + readout_frames(budgets)
