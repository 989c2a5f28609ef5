"""Loading a commit into an engine: which one, from where, and what it says besides values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from angelptm.checkpoint.folder import CheckpointFolder, locate
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.header import GroupRecord, Header
from angelptm.checkpoint.opened import choose_step
from angelptm.checkpoint.reader import CommitReader
from angelptm.engine.commits import Commits
from angelptm.engine.restore import Restored
from angelptm.engine.setup import persistent_buffers
from angelptm.engine.snapshot import from_json
from angelptm.errors import CheckpointError
from angelptm.ranks import Ranks


@dataclass(frozen=True)
class Resumed:
    """What a loaded commit says: ``step`` optimizer steps were done; ``data``, ``scheduler`` and ``client_state`` as
    they were given to the commit; ``pages`` how the values came back; ``notes`` what differs from then."""

    path: Path
    step: int
    data: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    groups: Sequence[GroupRecord] | None
    client_state: dict[str, Any]
    config_hash: str
    pages: Restored
    notes: tuple[str, ...]


@contextmanager
def open_commit(
    path: Path, step: int | None, own: Commits | None, ssd_folders: Sequence[Path], ranks: Ranks
) -> Iterator[tuple[Path, Manifest, CommitReader, range]]:
    """The folder, the manifest, a reader of its pages, and which of its files are the slot files of ``own``.

    A folder of another run is only read, and its commit held meanwhile, so that the run it belongs to does not retire
    it. On all ranks: the first one has the folder, and the others learn from it what the manifest says.
    """
    with ExitStack() as last:

        def find() -> tuple[Path, bool, Manifest] | None:
            if not ranks.is_first:
                return None
            folder_path = locate(path)
            mine = own is not None and folder_path.resolve() == own.folder.resolve()
            if mine and own is not None:
                folder = own.durable.owned_folder
            else:
                folder = last.enter_context(CheckpointFolder.read(folder_path))
            return folder_path, mine, last.enter_context(folder.hold(choose_step(folder, step)))

        # Ranks of one run trust each other: what the first one has checked is sent as it is.
        found = ranks.of_first(ranks.together(find, "finding a commit"), "the commit to go on from")
        assert found is not None, "of the first rank"
        folder_path, mine, manifest = found
        own_files = range(0)
        if mine and own is not None and manifest.header.store_id == own.durable.store_id:
            first = own.durable.first_file
            own_files = range(first, first + len(own.durable.files))
        with CommitReader(manifest, [folder_path, *ssd_folders], needs_all_files=ranks.is_alone) as reader:
            yield folder_path, _with_states(manifest), reader, own_files
            ranks.barrier("the end of reading a commit")  # till then it is held


def _with_states(manifest: Manifest) -> Manifest:
    """The manifest with what the caller gave to the commit as it was, not as JSON holds it."""
    header = manifest.header
    states = {name: from_json(getattr(header, name)) for name in ("scheduler", "data", "client")}
    return replace(manifest, header=header.model_copy(update=states))


def check_buffers(module: nn.Module, header: Header, path: str) -> list[str]:
    """Refuses buffers of another shape or type than the model's; returns sentences about those without counterpart."""
    mine = persistent_buffers(module)
    notes = []
    for record in header.buffers:
        target = mine.pop(record.name, None)
        if target is None:
            notes.append(f"the commit's buffer {record.name} is not in the model")
        elif tuple(target.shape) != record.shape or str(target.dtype) != f"torch.{record.dtype}":
            raise CheckpointError(
                path,
                f"buffer {record.name} {record.dtype}{record.shape}",
                f"{target.dtype}{tuple(target.shape)}, as the model has it",
            )
    return [*notes, *(f"the model's buffer {name} is not in the commit, and keeps its value" for name in mine)]


def restore_buffers(module: nn.Module, saved: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Copies a commit's buffers, as CommitReader.buffers gives them, into the model's."""
    mine = persistent_buffers(module)
    for name, (_, _, content) in saved.items():
        if name in mine and content:
            target = mine[name]
            target.copy_(torch.frombuffer(bytearray(content), dtype=target.dtype).reshape(target.shape))
