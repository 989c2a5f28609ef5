"""Allocates everything that a run needs, once, and wires it together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import angelptm_native as native
import torch
from torch import nn

from angelptm.config import Config
from angelptm.device import Device, make_device
from angelptm.engine.commits import Commits
from angelptm.engine.dtypes import NATIVE_DTYPES, TORCH_DTYPES
from angelptm.engine.gradients import Gradients
from angelptm.engine.kept import Durable
from angelptm.engine.leaves import UnitLeaves
from angelptm.engine.optimizer import RULES
from angelptm.engine.residency import Residency
from angelptm.engine.setup import grad_precision
from angelptm.engine.sweeping import SweptUpdates
from angelptm.engine.updates import Updates
from angelptm.engine.values import Values
from angelptm.pages import Catalogue, PageIds, SlotFiles, allocate_pages, open_store
from angelptm.plan import Plan
from angelptm.ranks import Gatherer, Ranks
from angelptm.units import ParamLayout

_log = logging.getLogger("angelptm")


@dataclass(frozen=True)
class Parts:
    """What an engine is made of. ``commits`` is None where the config has no folder for them."""

    plan: Plan
    store: native.Store
    device: Device
    pages: PageIds
    catalogue: Catalogue
    fetcher: native.Fetcher
    updates: Updates
    commits: Commits | None
    gradients: Gradients
    values: Values
    leaves: list[UnitLeaves]
    residency: Residency
    dtype: torch.dtype
    ranks: Ranks
    gatherer: Gatherer | None  # where other ranks have pages of this model

    @property
    def swept(self) -> SweptUpdates | None:
        """The updates, where nobody waits for them."""
        return self.updates if isinstance(self.updates, SweptUpdates) else None


def assemble(
    model: nn.Module,
    config: Config,
    plan: Plan,
    durable: Durable | None,
    slot_files: SlotFiles | None,
    faults: native.FaultPlan | None,
    take_gradient: Callable[[int, int, ParamLayout, torch.Tensor], None],
    ranks: Ranks,
) -> Parts:
    """Takes all memory and disk space. ``take_gradient`` gets each gradient as it completes."""
    dtype, grad_dtype = TORCH_DTYPES[config.precision], TORCH_DTYPES[grad_precision(config)]
    deadline_seconds = config.io.deadline_seconds
    store = open_store(
        plan,
        slot_files=slot_files,
        backend=config.io.backend,
        queue_depth=config.io.queue_depth,
        direct=config.io.direct,
        deadline_seconds=deadline_seconds,
        faults=faults,
    )
    if durable is not None:
        for folder, _, _ in plan.ssd_slots_by_path:
            durable.disk.sync_names(Path(folder))  # a commit is worth nothing without its slot files
    for note in store.notes:
        _log.info("%s", note)
    device = make_device(config.device, plan.device_frames * plan.page_bytes, config.tiers.keep_freed_bytes)
    device.use_host_memory(store.host_address, plan.host_frames * plan.page_bytes)
    pages = allocate_pages(store, plan, device.address(0))
    catalogue = Catalogue(plan, pages)
    fetcher = native.Fetcher(store, most_frames=plan.fetch_frames, memory=device, stream=device.copies_in)
    make_updates = partial(SweptUpdates, update=config.update) if config.update.is_swept else Updates
    updates = make_updates(
        store,
        plan,
        pages,
        rule=RULES[config.optimizer.type],
        grad_dtype=NATIVE_DTYPES[grad_dtype],
        param_dtype=NATIVE_DTYPES[dtype],
        device_params={
            (unit, span): device.address(plan.param_offset(unit, span))
            for unit, unit_plan in enumerate(plan.units)
            if not pages[unit].params
            for span in range(len(unit_plan.spans))
        },
        deadline_seconds=deadline_seconds,
        name_page=catalogue.name,
        fetcher=fetcher,
        memory=device,
    )
    commits = None
    if durable is not None:
        commits = Commits(
            durable,
            store,
            plan,
            catalogue,
            updates,
            device,
            keep=config.checkpoint.keep,
            deadline_seconds=deadline_seconds,
        )
    gradients = Gradients(plan, pages, store, device, grad_dtype, catalogue.name, deadline_seconds, ranks)
    gatherer = None if ranks.share.is_whole else Gatherer(ranks)
    leaves = [
        UnitLeaves(unit.layout, model, device, dtype, gradients.has, take_gradient, one_leaf=grad_dtype != dtype)
        for unit in plan.units
    ]
    return Parts(
        plan=plan,
        store=store,
        device=device,
        pages=pages,
        catalogue=catalogue,
        fetcher=fetcher,
        updates=updates,
        commits=commits,
        gradients=gradients,
        values=Values(plan, pages, store, device, dtype, updates, fetcher, catalogue.name, ranks),
        leaves=leaves,
        residency=Residency(plan, pages, fetcher, device, leaves, updates, catalogue.name, deadline_seconds, gatherer),
        dtype=dtype,
        ranks=ranks,
        gatherer=gatherer,
    )
