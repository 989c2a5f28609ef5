"""Opens the folder of a run's commits and decides which slot files its store uses."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.records import NONE
from angelptm.checkpoint.slot_files import remove_slot_files, slot_file_name, slot_files_in
from angelptm.engine.kept import Durable, Slot
from angelptm.errors import CheckpointError
from angelptm.pages import SlotFiles
from angelptm.plan import Plan
from angelptm.ranks import Ranks


def open_durable(
    path: Path, ssd_folders: Sequence[Path], plan: Plan, disk: Disk, ranks: Ranks
) -> tuple[Durable, SlotFiles]:
    """Locks the folder, removes what an interrupted run has left, and says where the slots are. On all ``ranks`` that
    commit; the first one has the folder, and the others learn from it what is in there.

    The slot files of the newest commit are used again where they fit the plan (page size, folders); otherwise there
    will be new ones, and the old ones go when the last commit in them does. Raises StoreLockedError while another
    process uses the folder, CheckpointError for a manifest that does not decode or a slot file that is missing.
    """
    folder: CheckpointFolder | None = None

    def look() -> _Found:
        nonlocal folder
        if not ranks.is_first:
            return _Found({}, [])
        folder = CheckpointFolder.open(path, create=True, disk=disk)
        folder.sweep()
        manifests = {step: folder.load(step) for step in folder.commits()}
        live = {manifest.header.store_id for manifest in manifests.values()}
        return _Found(
            {step: _Commit.of(manifest) for step, manifest in manifests.items()}, sorted({*folder.store_ids()} - live)
        )

    try:
        found = ranks.of_first(ranks.together(look, "opening the checkpoint folder"), "the commits that are there")
        folders = tuple(dict.fromkeys([path, *ssd_folders]))
        shared = not ranks.is_alone
        removed = ranks.every(
            [bool(remove_slot_files(one, folders, disk, beside_others=shared)) for one in found.dead],
            "removing what a run has left",
        )
        for index, store_id in enumerate(found.dead):
            if folder is not None and any(of_rank[index] for of_rank in removed):
                folder.forget_store_id(store_id)  # else they are in a folder that the config does not name now
        counts_of_ranks = ranks.every(len(plan.ssd_slots_by_path), "the slot files of each rank")
        first_file, total = sum(counts_of_ranks[: ranks.index]), sum(counts_of_ranks)
        reused = ranks.together(lambda: _reusable(found.commits, plan, first_file, total), "opening the slot files")
        if ranks.any(reused is None, "whether slot files are used again") or reused is None:
            store_id = ranks.of_first(uuid.uuid4().hex, "the name of the slot files")
            counts = (0,) * len(plan.ssd_slots_by_path)
            if folder is not None:
                folder.add_store_id(store_id)
            ranks.barrier("the name of the slot files")  # known before there are any
        else:
            store_id, counts = reused
        own = range(first_file, first_file + len(plan.ssd_slots_by_path))
        names = tuple(slot_file_name(store_id, index) for index in own)
        kept = {
            step: (commit.store_id, commit.slots_in(own) if commit.store_id == store_id else [])
            for step, commit in found.commits.items()
        }
        claimed = [slot for _, slots in kept.values() for slot in slots]
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    durable = Durable(path.resolve(), folder, disk, store_id, first_file, names, folders, kept, ranks)
    return durable, SlotFiles(names, counts, claimed)


@dataclass(frozen=True)
class _Commit:
    """Of a manifest: what decides about the slot files. ``slots`` (n, 2): file and index in it of each page."""

    step: int
    store_id: str
    page_bytes: int
    files: tuple[str, ...]
    slots: np.ndarray

    @staticmethod
    def of(manifest: Manifest) -> _Commit:
        header, pages = manifest.header, manifest.pages[manifest.pages["file"] != NONE]
        slots = np.stack([pages["file"], pages["slot"]], axis=1).astype(np.int64)
        names = tuple(file.name for file in header.files)
        return _Commit(header.step, header.store_id, header.page_bytes, names, slots)

    def slots_in(self, own: range) -> list[Slot]:
        """The slots that it holds in files of a rank, whose first one counts as 0."""
        mine = self.slots[(self.slots[:, 0] >= own.start) & (self.slots[:, 0] < own.stop)]
        return [(file - own.start, slot) for file, slot in mine.tolist()]


@dataclass(frozen=True)
class _Found:
    """Commits by step, and ids of slot files that none of them names."""

    commits: dict[int, _Commit]
    dead: list[str]


def _reusable(
    commits: dict[int, _Commit], plan: Plan, first_file: int, total: int
) -> tuple[str, tuple[int, ...]] | None:
    """The newest commit's set of slot files and the slots in each of this rank's, if every file is where the plan wants
    one."""
    if not commits:
        return None
    newest = commits[max(commits)]
    wanted = [Path(folder) for folder, _, _ in plan.ssd_slots_by_path]
    if newest.page_bytes != plan.page_bytes or len(newest.files) != total:
        return None
    counts = []
    for index, folder in enumerate(wanted, first_file):
        name = slot_file_name(newest.store_id, index)
        path = folder / name
        if newest.files[index] != name or path not in slot_files_in(folder, newest.store_id):
            return None
        counts.append(path.stat().st_size // plan.page_bytes)
    for commit in commits.values():
        if commit.store_id != newest.store_id:
            continue
        for file, slot in commit.slots_in(range(first_file, first_file + len(wanted))):
            if slot >= counts[file]:
                raise CheckpointError(
                    str(wanted[file] / commit.files[first_file + file]),
                    f"{counts[file]} whole slots",
                    f"slot {slot}, which the commit of step {commit.step} names",
                    "The file was cut short: restore it, or move the commit away.",
                )
    return newest.store_id, tuple(counts)


def remove_new_slot_files(durable: Durable) -> None:
    """Removes the slot files of a set that no commit names yet: of a run that could not begin."""
    if all(store_id != durable.store_id for store_id, _ in durable.kept.values()):
        remove_slot_files(durable.store_id, durable.folders, durable.disk, beside_others=not durable.ranks.is_alone)
        if durable.folder is not None:
            durable.folder.forget_store_id(durable.store_id)
