"""The commits of a run's folder: which are its own, which may go, and whose slots they hold."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import angelptm_native as native

from angelptm.checkpoint.disk import Disk
from angelptm.checkpoint.folder import COMMITS_NAME, CheckpointFolder
from angelptm.checkpoint.format import Manifest, manifest_name
from angelptm.checkpoint.slot_files import remove_slot_files
from angelptm.errors import CheckpointError, RankError
from angelptm.ranks import Ranks

_log = logging.getLogger("angelptm")

Slot = tuple[int, int]  # file, index in it


@dataclass
class _Kept:
    """A commit on disk: the set of slot files it names, and its slots in them where they are this run's."""

    store_id: str
    slots: list[Slot]


@dataclass(frozen=True)
class Durable:
    """What a run needs to commit: the folder of the manifests, and the owner of its lock, None on any rank but the
    first; the id of the slot files; this rank's of them, from the one of index ``first_file`` on; the folders these are
    in; and what the commits that exist hold in them."""

    path: Path
    folder: CheckpointFolder | None
    disk: Disk
    store_id: str
    first_file: int
    files: tuple[str, ...]
    folders: tuple[Path, ...]
    kept: Mapping[int, tuple[str, list[Slot]]]
    ranks: Ranks  # that commit together

    @property
    def owned_folder(self) -> CheckpointFolder:
        assert self.folder is not None, "the first rank has it"
        return self.folder

    def close(self) -> None:
        if self.folder is not None:
            self.folder.close()


@dataclass(frozen=True)
class _Published:
    """What became of a publication: the commits that are ``gone`` for it, the manifest's ``path``; or an ``error``, and
    whether the manifest ``may_be_there`` all the same, or replaced one that is gone with it."""

    gone: list[int]
    path: Path | None = None
    error: BaseException | None = None
    may_be_there: bool = False
    removed: bool = False


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
                str(self._durable.path),
                f"a commit of step {max(self._kept)}, which this run does not come from",
                "a folder of this run's own commits",
                "Load that commit first, or choose another checkpoint.folder.",
            )

    def publish(self, manifest: Manifest, slots: list[Slot]) -> Path:
        """Makes a commit durable, in place of one of the same step. ``slots`` are its references, which are held from
        here on, or released when this raises an error and the manifest is not there. On all ranks, each with its own
        slots: the first one writes the manifest, with which the commit is there for all."""
        step, ranks = manifest.header.step, self._durable.ranks
        result = self._put(manifest) if ranks.is_first else None
        if not ranks.is_alone:
            sent = ranks.of_first(_to_send(result, ranks), "the end of a commit")
            result = result or sent
        assert result is not None, "of the first rank"
        former = self._kept.get(step)
        for one in result.gone:
            self._let_go(self._kept.pop(one))
        if result.path is not None:
            self._kept[step] = _Kept(self._durable.store_id, slots)
            self._lineage.add(step)
            self._replaces_left = True
            if former is not None:
                self._let_go(former)
            return result.path
        assert result.error is not None, "why it is not there"
        if result.may_be_there:
            # After a power cut either one may be there.
            both = former.slots if former is not None and former.store_id == self._durable.store_id else []
            self._kept[step] = _Kept(self._durable.store_id, slots + both)
        else:
            self._store.release_slots(slots)
            if result.removed and former is not None:
                self._let_go(self._kept.pop(step))
        raise result.error

    def _put(self, manifest: Manifest) -> _Published:
        """On the first rank."""
        step, folder, gone = manifest.header.step, self._durable.owned_folder, list[int]()
        try:
            # Commits that the run has left must not be the newest ones beside its own.
            for later in [one for one in self._kept if one > step and one not in self._lineage]:
                if folder.retire(later):
                    gone.append(later)
            return _Published(gone, folder.publish(manifest))
        except BaseException as error:
            if not self._is_there(manifest):
                return _Published(gone, error=error)
            # A manifest that is there, and perhaps not durable, is removed. Where that fails too it keeps its slots, as
            # does the one that it replaced.
            try:
                removed = folder.retire(step)
            except Exception:  # the first error is the one to tell; this one says that the manifest may be there still
                removed = False
            return _Published(gone, error=error, may_be_there=not removed, removed=removed)

    def _is_there(self, manifest: Manifest) -> bool:
        """Whether a publication that ended in an error got as far as giving the manifest its name."""
        try:
            return self._durable.owned_folder.manifest_path(manifest.header.step).read_bytes() == manifest.encode()
        except (FileNotFoundError, CheckpointError):
            return False
        except OSError:
            return True  # it may be

    def retire(self) -> int | None:
        """Drops the commits of histories that this run has left, once it has one of its own, and of these the oldest
        beyond ``keep``. One that another process reads stays, until a later call; returns the step of such a one. On
        all ranks."""
        own = sorted(self._kept.keys() & self._lineage)
        left = sorted(self._kept.keys() - self._lineage) if self._replaces_left else []
        asked = [*left, *own[: max(0, len(own) - self._keep)]]
        if not asked:
            return None
        ranks, gone, held, error = self._durable.ranks, list[int](), None, None
        if ranks.is_first:
            try:
                for one in asked:
                    if self._durable.owned_folder.retire(one):
                        gone.append(one)
                    else:
                        held = one
            except BaseException as caught:
                error = caught
        if not ranks.is_alone:
            gone, held = ranks.of_first((gone, held), "the retirement of commits")
        for one in gone:
            self._let_go(self._kept.pop(one))
        if error is not None:
            raise error
        return held

    def make_room(self, needed: int) -> None:
        """Returns when so many slots are free, or no commit is kept that could be retired for them. Raises
        CheckpointError for one that readers hold longer than the deadline."""
        deadline = time.monotonic() + self._deadline_seconds
        while len(self._kept) > self._keep and self._store.slot_free_count < needed:
            self._replaces_left = True  # a later commit that the run has left keeps slots that it needs now
            if not self._durable.ranks.is_alone:
                # To retire takes all ranks, and others may have room: they do it with the next commit.
                raise CheckpointError(
                    str(self._durable.path),
                    f"{self._store.slot_free_count} free slots, as commits are kept that could not be retired",
                    f"{needed} slots for what is written now",
                    "End what reads these commits, or raise checkpoint.keep, and go on from the last one.",
                )
            held = self.retire()
            if held is not None and time.monotonic() > deadline:
                raise CheckpointError(
                    str(self._durable.path / COMMITS_NAME / manifest_name(held)),
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
        durable = self._durable
        shared = not durable.ranks.is_alone
        removed = remove_slot_files(kept.store_id, durable.folders, durable.disk, beside_others=shared)
        if not durable.ranks.is_first:
            return
        if removed:
            durable.owned_folder.forget_store_id(kept.store_id)
        else:  # The id stays known.
            _log.warning(
                "the slot files of retired commits (angelptm-%s-*) are in no folder that tiers.ssd names now: "
                "`angelptm checkpoint gc %s --ssd FOLDER` removes them",
                kept.store_id,
                durable.path,
            )


def _to_send(result: _Published | None, ranks: Ranks) -> _Published | None:
    """To other ranks: an error's text is all of it that surely pickles. The first rank raises its own."""
    if result is None or result.error is None:
        return result
    text = f"rank {ranks.index}: {result.error}"
    return replace(result, error=RankError(ranks.index, "the end of a commit", text))
