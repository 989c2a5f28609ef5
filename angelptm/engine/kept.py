"""The commits of a run's folder: which are its own, which may go, and whose slots they hold."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import angelptm_native as native

from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.slot_files import remove_slot_files
from angelptm.errors import CheckpointError

_log = logging.getLogger("angelptm")

Slot = tuple[int, int]  # file, index in it


@dataclass
class _Kept:
    """A commit on disk: the set of slot files it names, and its slots in them where they are this run's."""

    store_id: str
    slots: list[Slot]


@dataclass(frozen=True)
class Durable:
    """What a run needs to commit: the folder of the manifests, locked; the id and the names of its slot files; the
    folders these are in; and what the commits that exist hold."""

    folder: CheckpointFolder
    disk: Disk
    store_id: str
    files: tuple[str, ...]
    folders: tuple[Path, ...]
    kept: Mapping[int, tuple[str, list[Slot]]]


class KeptCommits:
    """The commits on disk. A slot that one of them names is released when its manifest is gone for good."""

    def __init__(self, durable: Durable, store: native.Store, keep: int, deadline_seconds: float) -> None:
        self._durable = durable
        self._store = store
        self._keep = keep
        self._deadline_seconds = deadline_seconds
        self._kept = {step: _Kept(*one) for step, one in durable.kept.items()}
        self._lineage: set[int] = set()
        """Steps of the commits that this run made or comes from; the others are of a history it left."""
        self._replaces_left = False

    def newest(self) -> int | None:
        """The step of the newest commit of this run's own history."""
        return max(self._lineage & self._kept.keys(), default=None)

    def come_from(self, step: int) -> None:
        """The run goes on from the commit of ``step``; later ones are of a history that it leaves."""
        self._lineage = {one for one in self._kept if one <= step}
        self._replaces_left = False

    def require_own(self, step: int) -> None:
        """Refuses a commit of ``step`` in a folder of another history."""
        newest = self.newest()
        if self._kept and (newest is None or newest > step):
            raise CheckpointError(
                str(self._durable.folder.path),
                f"a commit of step {max(self._kept)}, which this run does not come from",
                "a folder of this run's own commits",
                "Load that commit first, or choose another checkpoint.folder.",
            )

    def publish(self, manifest: Manifest, slots: list[Slot]) -> Path:
        """Makes a commit durable, in place of one of the same step. ``slots`` are its references, which are held from
        here on, or released when this raises an error and the manifest is not there."""
        step, folder = manifest.header.step, self._durable.folder
        former = self._kept.get(step)
        try:
            # Commits that the run has left must not be the newest ones beside its own.
            for later in [one for one in self._kept if one > step and one not in self._lineage]:
                if folder.retire(later):
                    self._let_go(self._kept.pop(later))
            path = folder.publish(manifest)
        except BaseException:
            if self._is_there(manifest):
                self._take_back(step, slots, former)
            else:
                self._store.release_slots(slots)
            raise
        self._kept[step] = _Kept(self._durable.store_id, slots)
        self._lineage.add(step)
        self._replaces_left = True
        if former is not None:
            self._let_go(former)
        return path

    def _is_there(self, manifest: Manifest) -> bool:
        """Whether a publication that ended in an error got as far as giving the manifest its name."""
        try:
            return self._durable.folder.manifest_path(manifest.header.step).read_bytes() == manifest.encode()
        except (FileNotFoundError, CheckpointError):
            return False
        except OSError:
            return True  # it may be

    def _take_back(self, step: int, slots: list[Slot], former: _Kept | None) -> None:
        """Removes a manifest that is there, and perhaps not durable. Where that fails too it keeps its slots, as does
        the one that it replaced: after a power cut either one may be there."""
        try:
            removed = self._durable.folder.retire(step)
        except Exception:  # the first error is the one to tell; this one says that the manifest may be there still
            removed = False
        if removed:
            self._store.release_slots(slots)
            if former is not None:
                self._let_go(self._kept.pop(step))
            return
        both = former.slots if former is not None and former.store_id == self._durable.store_id else []
        self._kept[step] = _Kept(self._durable.store_id, slots + both)

    def retire(self) -> int | None:
        """Drops the commits of histories that this run has left, once it has one of its own, and of these the oldest
        beyond ``keep``. One that another process reads stays, until a later call; returns the step of such a one."""
        own = sorted(self._kept.keys() & self._lineage)
        left = sorted(self._kept.keys() - self._lineage) if self._replaces_left else []
        held = None
        for one in [*left, *own[: max(0, len(own) - self._keep)]]:
            if self._durable.folder.retire(one):
                self._let_go(self._kept.pop(one))
            else:
                held = one
        return held

    def make_room(self, needed: int) -> None:
        """Returns when so many slots are free, or no commit is kept that could be retired for them. Raises
        CheckpointError for one that readers hold longer than the deadline."""
        deadline = time.monotonic() + self._deadline_seconds
        while len(self._kept) > self._keep and self._store.slot_free_count < needed:
            self._replaces_left = True  # a later commit that the run has left keeps slots that it needs now
            held = self.retire()
            if held is not None and time.monotonic() > deadline:
                raise CheckpointError(
                    str(self._durable.folder.manifest_path(held)),
                    f"a commit that a reader has held for {self._deadline_seconds} s",
                    "one that can be retired, as its slots are needed",
                    "End what reads it, or raise checkpoint.keep.",
                )
            time.sleep(0.01)

    def _let_go(self, kept: _Kept) -> None:
        if kept.store_id == self._durable.store_id:
            self._store.release_slots(kept.slots)
            return
        last = all(other.store_id != kept.store_id for other in self._kept.values())
        if not last:
            return
        if remove_slot_files(kept.store_id, self._durable.folders, self._durable.disk):
            self._durable.folder.forget_store_id(kept.store_id)
        else:  # The id stays known.
            _log.warning(
                "the slot files of retired commits (angelptm-%s-*) are in no folder that tiers.ssd names now: "
                "`angelptm checkpoint gc %s --ssd FOLDER` removes them",
                kept.store_id,
                self._durable.folder.path,
            )
