"""SSD slots: how many a plan takes, in which folders, and what to do where there is too little room."""

from __future__ import annotations

import math
from collections.abc import Sequence

from angelptm.errors import CapacityError
from angelptm.plan.budgets import Budgets, SsdBudget
from angelptm.plan.placed import PEER, UnitPlan
from angelptm.plan.pool import AUTO_RING_DEPTH, most_threads
from angelptm.plan.shape import Demand
from angelptm.sizes import format_bytes, mib
from angelptm.states.layout import splits_masters


def spread_slots(
    budgets: Budgets, slots: int, commit_slots: int, slots_of_one: int
) -> tuple[tuple[str, int, float], ...]:
    """Slots for each folder: by weight where the user gave no size, else what fits the size. Checks the free space.
    ``slots_of_one``: of ``commit_slots``, what each commit more that is kept takes."""
    if slots == 0:
        return ()
    page = budgets.page_bytes
    ssd = budgets.ssd
    if not ssd and budgets.commits is not None and slots == commit_slots:
        ssd = (budgets.commits.folder,)  # no SSD tier: copies of what is in memory
    room = [(folder.size_bytes if folder.size_bytes is not None else folder.free_bytes) // page for folder in ssd]
    if over := [folder for folder in ssd if (folder.size_bytes or 0) > folder.free_bytes]:
        raise CapacityError(
            "ssd",
            sum(folder.size_bytes or 0 for folder in over),
            sum(folder.free_bytes for folder in over),
            f"the size given for {' and '.join(folder.path for folder in over)}",
            _size_remedy(budgets, slots),
        )
    if sum(room) < slots:
        remedy = _room_remedy(budgets, ssd, slots)
        keep = budgets.commits.keep if budgets.commits is not None else 0
        fewer = math.ceil((slots - sum(room)) / slots_of_one) if slots_of_one else keep
        if ssd and keep > fewer:
            remedy += f" Or lower checkpoint.keep (now {keep}) to {keep - fewer}."
        folders = f" in {', '.join(folder.path for folder in ssd)}" if ssd else ""
        commits = f" ({format_bytes(commit_slots * page)} of it for commits)" if commit_slots else ""
        raise CapacityError("ssd", slots * page, sum(room) * page, f"what lives on the SSD{folders}{commits}", remedy)
    total = sum(folder.weight for folder in ssd)
    counts = [min(pages, math.floor(slots * folder.weight / total)) for folder, pages in zip(ssd, room)]
    for index, pages in enumerate(room):
        counts[index] += min(pages - counts[index], max(0, slots - sum(counts)))
    return tuple((folder.path, count, folder.weight) for folder, count in zip(ssd, counts) if count)


def _raised_sizes(budgets: Budgets, slots: int) -> int:
    """Bytes, in whole MiB, that the sizes given must have in sum; enough however they are divided among the folders."""
    sized = [folder for folder in budgets.ssd if folder.size_bytes is not None]
    others = sum(folder.free_bytes // budgets.page_bytes for folder in budgets.ssd if folder.size_bytes is None)
    return math.ceil((slots - others + len(sized) - 1) * budgets.page_bytes / 2**20) * 2**20


def _size_remedy(budgets: Budgets, slots: int) -> str:
    """For a folder with a size that its disk does not have."""
    sizes = [folder.free_bytes if folder.size_bytes is None else folder.size_bytes for folder in budgets.ssd]
    free = [min(size, folder.free_bytes) for size, folder in zip(sizes, budgets.ssd)]
    page = budgets.page_bytes
    short = sum(size // page for size in sizes) < slots
    raised = f" and raise tiers.ssd[].size to {mib(_raised_sizes(budgets, slots))} in sum" if short else ""
    added = " and add a folder" if sum(size // page for size in free) < slots else ""
    return f"Free disk space{raised}, or lower tiers.ssd[].size{added}."


def _room_remedy(budgets: Budgets, ssd: Sequence[SsdBudget], slots: int) -> str:
    """For folders that have too little room together."""
    if not ssd:
        return "Add tiers.ssd: [{path: FOLDER}], or set what is ssd in placement to auto or host."
    sized = [folder for folder in ssd if folder.size_bytes is not None]
    raised = _raised_sizes(budgets, slots)
    if sized and raised <= sum(folder.free_bytes for folder in sized):
        return f"Raise tiers.ssd[].size to {mib(raised)} in sum."
    free = "Free disk space"
    if len(sized) == len(ssd):
        free += f" and raise tiers.ssd[].size to {mib(raised)} in sum"
    if not budgets.ssd:
        return f"{free}, or add tiers.ssd: [{{path: FOLDER}}] on another disk."
    in_memory = all(place in ("auto", "device", "host", 1.0) for place in (budgets.param, budgets.grad, budgets.states))
    if in_memory and budgets.commits is None:
        return f"{free}, add a folder to tiers.ssd, or raise tiers.host to keep more in memory."
    return f"{free}, or add a folder to tiers.ssd."


def commit_slots_of(
    budgets: Budgets, units: Sequence[UnitPlan], kind_bytes: dict[str, dict[str, int]]
) -> tuple[int, int]:
    """Slots that commits hold beyond what is current, and of them those of each one that is kept.

    Trainable parameters are in no commit, being their masters rounded, unless these are split. A page that lives on the
    SSD is current in one slot and in one more for each commit kept; the commit that is being made shares the current
    one. One that lives in memory has a copy in each commit kept and in the one being made; where that one fails, its
    copies stay until those of the next replace them, some at a time. Frozen parameters never change: one copy.
    """
    if budgets.commits is None:
        return 0, 0
    keep = budgets.commits.keep
    states = [tiers for kind, tiers in kind_bytes.items() if kind not in ("PARAM", "GRAD")]
    on_ssd = sum(tiers["ssd"] for tiers in states) // budgets.page_bytes
    on_host = sum(tiers["host"] + tiers["device"] for tiers in states) // budgets.page_bytes
    if splits_masters([unit.layout for unit in units]):
        homes = [span.param_home for unit in units for span in unit.spans if span.is_mine]
        on_ssd += homes.count("ssd")
        on_host += len(homes) - homes.count("ssd")
    frozen = sum(home not in ("ssd", PEER) for unit in units for home in unit.frozen_homes)
    other = math.ceil(budgets.commits.other_bytes / budgets.page_bytes)
    of_one = on_ssd + on_host + other
    return keep * of_one + on_host + other + min(on_host, budgets.queue_depth) + frozen, of_one


def slots_in_flight(budgets: Budgets, demand: Demand) -> int:
    """Nothing is overwritten in place, so every write in flight needs a slot of its own: those of the full ring, and
    those of the pages written behind. The same for every host budget, so that a larger one never needs more disk."""
    threads = most_threads(budgets)
    depth = budgets.ring_depth or AUTO_RING_DEPTH
    return threads * depth * (1 + demand.span_state_pages + demand.span_grad_pages) + budgets.queue_depth + 1
