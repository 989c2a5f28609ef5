"""Opens the folder of a run's commits and decides which slot files its store uses."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.records import NONE
from angelptm.checkpoint.slot_files import remove_slot_files, slot_file_name, slot_files_in
from angelptm.engine.kept import Durable, Slot
from angelptm.errors import CheckpointError
from angelptm.pages import SlotFiles
from angelptm.plan import Plan


def open_durable(path: Path, ssd_folders: Sequence[Path], plan: Plan, disk: Disk) -> tuple[Durable, SlotFiles]:
    """Locks the folder, removes what an interrupted run has left, and says where the slots are.

    The slot files of the newest commit are used again where they fit the plan (page size, folders); otherwise there
    will be new ones, and the old ones go when the last commit in them does. Raises StoreLockedError while another
    process uses the folder, CheckpointError for a manifest that does not decode or a slot file that is missing.
    """
    folder = CheckpointFolder.open(path, create=True, disk=disk)
    try:
        folder.sweep()
        folders = tuple(dict.fromkeys([path, *ssd_folders]))
        manifests = {step: folder.load(step) for step in folder.commits()}
        live = {manifest.header.store_id for manifest in manifests.values()}
        for store_id in set(folder.store_ids()) - live:
            if remove_slot_files(store_id, folders, disk):
                folder.forget_store_id(store_id)  # else they are in a folder that the config does not name now
        reused = _reusable(manifests, plan)
        if reused is not None:
            store_id, counts = reused
        else:
            store_id, counts = uuid.uuid4().hex, (0,) * len(plan.ssd_slots_by_path)
            folder.add_store_id(store_id)
        names = tuple(slot_file_name(store_id, index) for index in range(len(plan.ssd_slots_by_path)))
        kept = {
            step: (manifest.header.store_id, slots_of(manifest) if manifest.header.store_id == store_id else [])
            for step, manifest in manifests.items()
        }
        claimed = [slot for _, slots in kept.values() for slot in slots]
    except BaseException:
        folder.close()
        raise
    return Durable(folder, disk, store_id, names, folders, kept), SlotFiles(names, counts, claimed)


def slots_of(manifest: Manifest) -> list[Slot]:
    """The slots that a commit holds."""
    pages = manifest.pages[manifest.pages["file"] != NONE]
    return list(zip(pages["file"].tolist(), pages["slot"].tolist()))


def _reusable(manifests: dict[int, Manifest], plan: Plan) -> tuple[str, tuple[int, ...]] | None:
    """The newest commit's set of slot files and the slots in each, if every file is where the plan wants one."""
    if not manifests:
        return None
    header = manifests[max(manifests)].header
    wanted = [Path(folder) for folder, _, _ in plan.ssd_slots_by_path]
    if header.page_bytes != plan.page_bytes or len(header.files) != len(wanted):
        return None
    counts = []
    for index, (folder, record) in enumerate(zip(wanted, header.files)):
        name = slot_file_name(header.store_id, index)
        path = folder / name
        if record.name != name or path not in slot_files_in(folder, header.store_id):
            return None
        counts.append(path.stat().st_size // plan.page_bytes)
    for manifest in manifests.values():
        if manifest.header.store_id != header.store_id:
            continue
        for file, slot in slots_of(manifest):
            if slot >= counts[file]:
                raise CheckpointError(
                    str(wanted[file] / manifest.header.files[file].name),
                    f"{counts[file]} whole slots",
                    f"slot {slot}, which the commit of step {manifest.header.step} names",
                    "The file was cut short: restore it, or move the commit away.",
                )
    return header.store_id, tuple(counts)


def remove_new_slot_files(durable: Durable) -> None:
    """Removes the slot files of a set that no commit names yet: of a run that could not begin."""
    if all(store_id != durable.store_id for store_id, _ in durable.kept.values()):
        remove_slot_files(durable.store_id, durable.folders, durable.disk)
        durable.folder.forget_store_id(durable.store_id)
