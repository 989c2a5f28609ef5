"""Runs that are broken on purpose: each breaks one rule that a commit lives by, and has to be caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from angelptm.checkpoint.disk import Disk
from angelptm.engine.commits import Commits
from angelptm.train.folder import RunFolder


def _manifest_before_data() -> None:
    """The manifest is published while the pages that it names are not flushed."""
    init = Commits.__init__

    class Saver:
        def __init__(self, saver: Any) -> None:
            self._saver = saver

        def __getattr__(self, name: str) -> Any:
            return getattr(self._saver, name)

        def flush(self) -> None:
            pass

    def broken(self: Any, *given: Any, **keys: Any) -> None:
        init(self, *given, **keys)
        self._saver = Saver(self._saver)

    Commits.__init__ = broken  # type: ignore[method-assign]


def _unsynced_manifest() -> None:
    """A small file is renamed into place before its content is flushed."""

    sync = Disk.sync

    def broken(self: Disk, descriptor: int, path: Path) -> None:
        if ".manifest" not in path.name:
            sync(self, descriptor, path)

    Disk.sync = broken  # type: ignore[method-assign]


def _unsynced_metrics() -> None:
    """A commit appears before the metrics of its steps are flushed."""

    def broken(self: RunFolder) -> None:
        del self

    RunFolder.sync = broken  # type: ignore[method-assign]


def _unsynced_names() -> None:
    """Nobody makes the names of slot files, and of folders, durable."""

    def broken(self: Disk, folder: Path) -> None:
        del self, folder

    Disk.sync_names = broken  # type: ignore[method-assign]


def _unsynced_retirement() -> None:
    """The slots of a retired commit are used again although a power cut may bring it back."""

    def broken(self: Disk, path: Path) -> None:
        self._unlink(path)

    Disk.remove = broken  # type: ignore[method-assign]


def _forgotten_generators() -> None:
    """The generators do not come back, as in a resume that forgets them."""
    from angelptm.engine import durability

    assert hasattr(durability, "set_generator_states"), "what is broken here has moved"
    durability.set_generator_states = lambda *_: None


BROKEN: dict[str, Callable[[], None]] = {
    "manifest-before-data": _manifest_before_data,
    "unsynced-manifest": _unsynced_manifest,
    "unsynced-metrics": _unsynced_metrics,
    "unsynced-names": _unsynced_names,
    "unsynced-retirement": _unsynced_retirement,
    "forgotten-generators": _forgotten_generators,
}
