"""Simulates a power cut after the process was killed: of what was written and not flushed, chance decides what stays.

The operating system outlives a killed process, so everything that was handed to it is in the files. What a power cut
would have lost is put back from the journal of a native ``CrashPlan`` (csrc/io/crash_plan.h describes the format), and
what it would have done to names from a ``MetadataJournal``.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from io_engine.metadata_journal import MetadataCut, MetadataJournal

__all__ = ["MetadataJournal", "PowerCut", "apply_power_cut"]

# What a disk writes as a whole or not at all.
SECTOR_BYTES = 512

_HEADER = struct.Struct("<4sIQQQQQ")  # magic, kind, bytes of the record, number, inode, offset, length
_WRITE, _DURABLE, _WITHDRAWN = 1, 2, 3


@dataclass(frozen=True)
class PowerCut:
    """What became of the writes that no sync covers (kept + dropped + torn are all of them, those to files that are
    gone aside), and of names and small files."""

    kept_count: int = 0
    dropped_count: int = 0
    torn_count: int = 0
    undone_count: int = 0  # renames, removals and creations
    garbled_count: int = 0  # files whose content was not flushed


def apply_power_cut(journal: Path, seed: int, allowed: Sequence[Path], metadata: Path | None = None) -> PowerCut:
    """To be called when the process that wrote the journals is dead; removes them.

    journal: of the native CrashPlan; metadata: of the MetadataJournal. One that does not exist holds nothing. allowed:
    folders outside of which nothing may be changed; ValueError, with nothing changed, when a journal asks for that.
    """
    generator = random.Random(seed)
    writes = _read_journal(journal) if journal.exists() else []
    cut = MetadataCut(metadata) if metadata is not None and metadata.exists() else None
    folders = [folder.resolve() for folder in allowed]
    for path in [*(write.path for write in writes), *(cut.paths if cut else [])]:
        if not any(path.resolve().is_relative_to(folder) for folder in folders):
            raise ValueError(f"{path} is outside of {', '.join(map(str, folders))}")
    kept, dropped, torn = _undo_writes(writes, journal, generator)
    undone = cut.undo(generator) if cut else 0
    garbled = cut.garble(generator) if cut else 0
    journal.unlink(missing_ok=True)
    if metadata is not None:
        metadata.unlink(missing_ok=True)
    return PowerCut(kept, dropped, torn, undone, garbled)


@dataclass
class _Write:
    """One record; its former content lies in the journal."""

    path: Path
    inode: int
    offset: int
    bytes: int
    former_at: int  # offset in the journal
    durable: bool = False

    def sectors(self) -> range:
        return range(self.offset // SECTOR_BYTES, -(-(self.offset + self.bytes) // SECTOR_BYTES))


def _read_journal(journal: Path) -> list[_Write]:
    """Writes in the order in which they began, those that were handed over."""
    writes: dict[int, _Write] = {}
    with journal.open("rb") as file:
        for at, fields, size in _records(journal, file.fileno()):
            _, kind, _, number, inode, offset, length = fields
            variable = at + _HEADER.size
            if kind == _WRITE:
                path = Path(os.fsdecode(os.pread(file.fileno(), length, variable)))
                content_at = variable + length
                writes[number] = _Write(path, inode, offset, at + size - content_at, content_at)
            elif kind == _DURABLE:
                for covered in struct.unpack(f"<{length}Q", os.pread(file.fileno(), 8 * length, variable)):
                    writes[covered].durable = True
            elif kind == _WITHDRAWN:
                del writes[number]
    return list(writes.values())


def _records(journal: Path, descriptor: int) -> Iterator[tuple[int, tuple[bytes, int, int, int, int, int, int], int]]:
    """(offset, header, bytes) of each whole record: one cut short by the kill was never acted on."""
    at, end = 0, os.fstat(descriptor).st_size
    while end - at >= _HEADER.size:
        fields = _HEADER.unpack(os.pread(descriptor, _HEADER.size, at))
        magic, kind, size = fields[:3]
        if magic != b"APTJ" or kind not in (_WRITE, _DURABLE, _WITHDRAWN) or size < _HEADER.size:
            raise ValueError(f"{journal} is not a crash journal at offset {at}")
        if size > end - at:
            return
        yield at, fields, size
        at += size


def _undo_writes(writes: Sequence[_Write], journal: Path, generator: random.Random) -> tuple[int, int, int]:
    """(kept, dropped, torn). From the last write to the first: a sector that some write is found to have reached the
    disk in keeps what it has, so a slot that was used again is not spoilt by its former use."""
    counts = [0, 0, 0]
    weights = [generator.random() for _ in range(3)]  # some power cuts lose nearly all, others nearly nothing
    settled: dict[int, set[int]] = {}  # sectors by inode
    for write in reversed(writes):
        if _inode(write.path) != write.inode:
            continue  # an unlinked file is gone with the process
        done = settled.setdefault(write.inode, set())
        sectors = write.sectors()
        if write.durable:
            done.update(sectors)
            continue
        fate = generator.choices((0, 1, 2), weights)[0]
        if fate == 2 and len(sectors) == 1:
            fate = generator.randrange(2)
        counts[fate] += 1
        reached = _torn(sectors, generator) if fate == 2 else set(sectors) if fate == 0 else set()
        _put_back(write, journal, [sector for sector in sectors if sector not in reached and sector not in done])
        done |= reached
    return counts[0], counts[1], counts[2]


def _torn(sectors: range, generator: random.Random) -> set[int]:
    """The sectors that reached the disk, neither none nor all: a prefix, or any."""
    if generator.random() < 0.5:
        return set(sectors[: generator.randint(1, len(sectors) - 1)])
    return set(generator.sample(sectors, generator.randint(1, len(sectors) - 1)))


def _put_back(write: _Write, journal: Path, sectors: Sequence[int]) -> None:
    if not sectors:
        return
    with journal.open("rb") as file:
        former = os.pread(file.fileno(), write.bytes, write.former_at)
    with write.path.open("r+b", buffering=0) as file:
        content = bytearray(os.pread(file.fileno(), write.bytes, write.offset))
        for sector in sectors:
            # A buffered write may begin and end inside a sector.
            begin = max(sector * SECTOR_BYTES - write.offset, 0)
            end = min((sector + 1) * SECTOR_BYTES - write.offset, len(content))
            content[begin:end] = former[begin:end]
        os.pwrite(file.fileno(), content, write.offset)
        os.fsync(file.fileno())


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
