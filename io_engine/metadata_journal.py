"""What a power cut may undo of the names and contents of small files that are replaced by renaming.

The journal is a row of JSON lines, each appended by one write; a line that a kill cut short is the last one, and what
it announced had not begun. ``begin`` announces a write, rename or remove, with the former content of the path; ``done``
says that it happened; ``synced`` names an inode whose content was flushed; ``durable`` the operations that a flush of
their folder covers. Since the hooks are not told what a rename is from, its ``begin`` lists the temporary files that it
may be of, by inode.
"""

from __future__ import annotations

import base64
import json
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Operation = Literal["write", "sync_file", "rename", "sync_folder", "remove"]


class MetadataJournal:
    """Hooks for whoever writes durable files; safe to use from several threads.

    ``path``: emptied now, and again whenever nothing is left that a power cut could undo.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._lock = threading.Lock()
        self._next = 1
        self._begun: dict[tuple[str, Path], tuple[int, int | None]] = {}  # number and former inode
        self._covered: dict[Path, list[int]] = {}  # by the folder whose sync is under way
        self._undurable: dict[int, Path] = {}  # done and not covered by a sync: number, folder
        self._unsynced: set[int] = set()  # inodes whose content was not flushed
        self._temporaries: dict[int, Path] = {}  # written and not yet renamed, by inode

    def before(self, operation: Operation, path: Path) -> None:
        """``path``: of a write the new temporary file, of a rename the final name, of sync_folder the folder."""
        path = path.absolute()
        with self._lock:
            if operation == "sync_folder":
                self._covered[path] = [number for number, folder in self._undurable.items() if folder == path]
            elif operation != "sync_file":
                inode = _inode(path)
                former = None if inode is None else base64.b64encode(path.read_bytes()).decode()
                number, self._next = self._next, self._next + 1
                self._begun[operation, path] = (number, inode)
                synced = inode not in self._unsynced
                record: dict[str, Any] = {"begin": number, "operation": operation, "path": str(path)}
                record |= {"former": former, "former_inode": inode, "former_synced": synced}
                if operation == "rename":
                    temporaries = self._temporaries.items()
                    record["temporaries"] = [(i, str(p)) for i, p in temporaries if p.parent == path.parent]
                self._append(record)

    def after(self, operation: Operation, path: Path) -> None:
        """The same operation succeeded. One that failed has no ``after``."""
        path = path.absolute()
        with self._lock:
            if operation == "sync_folder":
                covered = self._covered.pop(path)
                for number in covered:
                    del self._undurable[number]
                self._append({"durable": covered})
            elif operation == "sync_file":
                inode = _inode(path)
                if inode is not None:
                    self._unsynced.discard(inode)
                    self._append({"synced": inode})
            else:
                number, former_inode = self._begun.pop((operation, path))
                inode = _inode(path)
                self._append({"done": number, "inode": inode})
                self._undurable[number] = path.parent
                if operation == "write" and inode is not None:
                    self._unsynced.add(inode)
                    self._temporaries[inode] = path
                else:
                    for gone in (inode, former_inode):
                        self._temporaries.pop(gone or 0, None)
                    self._unsynced.discard(former_inode or 0)  # that file is gone
            if not (self._begun or self._covered or self._undurable or self._unsynced):
                os.ftruncate(self._descriptor, 0)

    def close(self) -> None:
        os.close(self._descriptor)

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        if os.write(self._descriptor, line) != len(line):
            raise OSError("the metadata journal was written in part")


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


@dataclass
class _Change:
    """An operation on a name, from its ``begin`` and ``done`` records."""

    operation: str
    path: Path
    former: bytes | None
    former_inode: int | None
    former_synced: bool
    done: bool = False
    durable: bool = False
    inode: int | None = None  # of the file under the path when it was done
    temporaries: dict[int, Path] = field(default_factory=dict)  # of a rename: what it may have renamed, by inode

    def happened(self) -> bool:
        """Of one begun and not done, the kill in between leaves this to be seen from the folder."""
        if self.done:
            return True
        now = _inode(self.path)
        if self.operation == "remove":
            return now is None
        return now is not None and now != self.former_inode

    def can_be_undone(self) -> bool:
        """A file written in place of another of its name changed no name."""
        return self.operation != "write" or self.former_inode is None


class MetadataCut:
    """Reads a journal, and undoes a part of what it holds that no sync covers."""

    def __init__(self, journal: Path) -> None:
        self._changes: dict[int, _Change] = {}  # by number, in order
        unsynced: set[int] = set()
        lines = journal.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut short
        for record in map(json.loads, lines):
            self._replay(record, unsynced)
        for change in self._changes.values():
            if change.inode is None and change.operation != "remove" and change.happened():
                change.inode = _inode(change.path)
                if change.operation == "write" and change.inode is not None:
                    unsynced.add(change.inode)
        self.paths = sorted({change.path for change in self._changes.values()})
        # From here on by path: an inode that is freed below may come back with the next file.
        self._unsynced = {path for path in self.paths if _inode(path) in unsynced}

    def _replay(self, record: dict[str, Any], unsynced: set[int]) -> None:
        if "begin" in record:
            former = record["former"]
            self._changes[record["begin"]] = _Change(
                record["operation"],
                Path(record["path"]),
                None if former is None else base64.b64decode(former),
                record["former_inode"],
                record["former_synced"],
                temporaries={inode: Path(path) for inode, path in record.get("temporaries", [])},
            )
        elif "synced" in record:
            unsynced.discard(record["synced"])
        elif "durable" in record:
            for number in record["durable"]:
                self._changes[number].durable = True
        else:
            change = self._changes[record["done"]]
            change.done, change.inode = True, record["inode"]
            if change.operation == "write":
                unsynced.add(record["inode"])
            else:
                unsynced.discard(change.former_inode or 0)

    def undo(self, generator: random.Random) -> int:
        """Undoes, in each folder, the last so many changes of names, as a file system that journals them would."""
        by_folder: dict[Path, list[_Change]] = {}
        for change in self._changes.values():
            if not change.durable and change.can_be_undone() and change.happened():
                by_folder.setdefault(change.path.parent, []).append(change)
        undone = 0
        for _, changes in sorted(by_folder.items()):
            count = generator.randint(0, len(changes))
            for change in reversed(changes[len(changes) - count :]):
                self._undo_one(change)
            undone += count
        return undone

    def _undo_one(self, change: _Change) -> None:
        path, source = change.path, change.temporaries.get(change.inode or 0)
        if source is not None and not source.exists():
            path.rename(source)
            if path in self._unsynced:
                self._unsynced.add(source)
        else:
            path.unlink(missing_ok=True)
        self._unsynced.discard(path)
        if change.former is not None:
            path.write_bytes(change.former)
            if not change.former_synced:
                self._unsynced.add(path)

    def garble(self, generator: random.Random) -> int:
        """Spoils most of the files whose content was never flushed: cut short, zeros behind a point, or junk."""
        garbled = 0
        for path in sorted(self._unsynced):
            content = path.read_bytes()
            spoil = generator.choice((_cut_short, _zero_end, _junk_sector, None))
            if content and spoil is not None:
                path.write_bytes(spoil(content, generator))
                garbled += 1
        return garbled


_Spoil = Callable[[bytes, random.Random], bytes]


def _cut_short(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content))]


def _zero_end(content: bytes, generator: random.Random) -> bytes:
    kept = generator.randrange(len(content))
    return content[:kept] + bytes(len(content) - kept)


def _junk_sector(content: bytes, generator: random.Random) -> bytes:
    begin = generator.randrange(len(content)) // 512 * 512
    end = min(begin + 512, len(content))
    return content[:begin] + generator.randbytes(end - begin) + content[end:]
