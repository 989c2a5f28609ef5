"""Turns a plan into pages of the native store. All memory and disk space of a run is taken here, once."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import angelptm_native as native

from angelptm.errors import ConfigError
from angelptm.plan import PEER, Plan, SpanPlan

_BACKENDS = {"auto": native.Backend.AUTO, "uring": native.Backend.URING, "threads": native.Backend.THREADS}
_HOMES = {"host": native.Home.HOST, "ssd": native.Home.SSD}


NOT_MINE = -1
"""In place of the id of a page that belongs to another rank."""


@dataclass(frozen=True)
class SpanPages:
    """Page ids of one span; ``states`` as SpanPlan.states has them. ``param`` is None where the parameters live on the
    device. ``step_grad`` are a step's own gradients, where those in ``grad`` may be of several steps. Of a span that
    belongs to another rank every id is NOT_MINE."""

    elements: int
    states: tuple[int, ...]
    grad: tuple[int, ...]
    param: int | None
    step_grad: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnitPages:
    """Page ids of one unit. ``params`` covers the frozen section too, and is empty for parameters that live on the
    device; ``frozen_start`` is its first frozen page. ``own_params`` are (index, page id) of those of this rank."""

    spans: tuple[SpanPages, ...]
    params: tuple[int, ...]
    frozen_start: int

    @property
    def own_params(self) -> list[tuple[int, int]]:
        return [(index, page) for index, page in enumerate(self.params) if page != NOT_MINE]


PageIds = tuple[UnitPages, ...]


@dataclass(frozen=True)
class SlotFiles:
    """Names of the files that hold the slots, one for each entry of ``Plan.ssd_slots_by_path``, and the slots that each
    has already: the files stay, since commits name their slots. ``claimed`` are the (file, index) of these, one entry
    for each time that a commit names one."""

    names: tuple[str, ...]
    slot_counts: tuple[int, ...]
    claimed: Sequence[tuple[int, int]] = ()


def open_store(
    plan: Plan,
    *,
    slot_files: SlotFiles | None = None,
    backend: str,
    queue_depth: int,
    direct: bool,
    deadline_seconds: float,
    faults: native.FaultPlan | None = None,
) -> native.Store:
    """Allocates the host pool and preallocates the slot files.

    Folders are created where missing. Without ``slot_files`` the files have no name from the moment they are open, so
    their space is given back when the process ends, however it ends. Raises ConfigError for a folder that cannot be
    used, IoError otherwise.
    """
    files: list[tuple[str, int, float]] = []
    made: list[Path] = []
    for index, (folder, slots, weight) in enumerate(plan.ssd_slots_by_path):
        path = Path(folder)
        try:
            made += [parent for parent in (path, *path.parents) if not parent.exists()]
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            remove_folders(made)
            raise ConfigError(
                f"tiers.ssd.{index}.path", folder, f"a folder that can be written ({error.strerror})"
            ) from error
        name = f"angelptm-{uuid.uuid4().hex}.pages"
        if slot_files is not None:
            name, slots = slot_files.names[index], max(slots, slot_files.slot_counts[index])
        files.append((str(path / name), slots, weight))
    try:
        store = native.Store(
            plan.page_bytes,
            plan.host_frames,
            files,
            backend=_BACKENDS[backend],
            queue_depth=queue_depth,
            direct=direct,
            deadline_seconds=deadline_seconds,
            faults=faults,
            keep_files=slot_files is not None,
        )
    except BaseException:
        remove_folders(made)
        raise
    if slot_files is not None:
        store.claim_slots(list(slot_files.claimed))
    return store


def remove_folders(folders: list[Path]) -> None:
    """Removes the folders that were made for a store that could not be opened; one that is in use stays."""
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _add_states(store: native.Store, plan: Plan, span: SpanPlan, arena: int) -> tuple[int, ...]:
    if span.state_frame is None:
        return tuple(store.add_page(_HOMES[span.states_home], page.bytes) for page in span.states.pages)
    return tuple(
        store.add_page_at(arena + frame * plan.page_bytes, page.bytes)
        for frame, page in enumerate(span.states.pages, span.state_frame)
    )


def _add_span(store: native.Store, plan: Plan, span: SpanPlan, arena: int) -> SpanPages:
    if not span.is_mine:
        grads_of_others = (NOT_MINE,) * len(span.grad_homes)
        return SpanPages(span.elements, (NOT_MINE,) * len(span.states.pages), grads_of_others, NOT_MINE)
    states = _add_states(store, plan, span, arena)
    step = plan.grad_page_elements
    grads, step_grads = (
        tuple(
            store.add_page(_HOMES[home], min(step, span.elements - index * step) * plan.grad_itemsize)
            for index, home in enumerate(span.grad_homes if number < plan.grad_sets else ())
        )
        for number in range(2)
    )
    param = (
        None
        if span.param_home == "device"
        else store.add_page(_HOMES[span.param_home], span.elements * plan.param_itemsize)
    )
    return SpanPages(span.elements, states, grads, param, step_grads)


def allocate_pages(store: native.Store, plan: Plan, arena: int = 0) -> PageIds:
    """One page id for each page of the plan. ``arena``: address of the device's arena, for states that live there."""
    pages = []
    for unit in plan.units:
        spans = tuple(_add_span(store, plan, span, arena) for span in unit.spans)
        params = [span.param for span in spans if span.param is not None]
        frozen_start = len(unit.spans)
        left = unit.layout.frozen_elements
        for home in unit.frozen_homes:
            elements = min(left, plan.page_elements)
            left -= elements
            if home == PEER:
                params.append(NOT_MINE)
            elif home != "device":
                params.append(store.add_page(_HOMES[home], elements * plan.param_itemsize))
        pages.append(UnitPages(spans, tuple(params), frozen_start))
    return tuple(pages)
