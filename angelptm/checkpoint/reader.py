"""Reads the pages of a commit, each against its CRC, from wherever its slot files lie."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

import io_engine
from angelptm.checkpoint.checksum import crc32c
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.format import Piece as FoundPiece
from angelptm.checkpoint.header import layouts_from_units
from angelptm.checkpoint.records import (
    EXTENT_BYTES,
    NONE,
    Dtype,
    Kind,
    content_bytes,
    extent_bytes,
    kind_dtype,
    moment_kinds,
)
from angelptm.errors import CheckpointError, CorruptPageError
from angelptm.states.codec import decode
from angelptm.states.formats import BLOCK8
from angelptm.states.layout import Piece as StatePiece
from angelptm.states.layout import UnitFormats, record_pieces
from io_engine import AlignedBuffer, IoError, Ticket

DEPTH = 8
"""Pages read at once."""

Bytes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float32]
_NUMPY: dict[Dtype, np.dtype[Any]] = {
    Dtype.FP32: np.dtype("<f4"),
    Dtype.BF16: np.dtype("<u2"),
    Dtype.BYTES: np.dtype("u1"),
}


@dataclass
class _Flight:
    """A page on its way. ``buffer`` is the stream's; both are None for a page that was never written."""

    index: int
    buffer: AlignedBuffer | None
    ticket: Ticket | None


class CommitReader:
    """Reads the pages of ``manifest`` out of slot files found by name in ``folders``, in that order.

    The caller holds the commit (``CheckpointFolder.hold``, or the lock) as long as this is open. A context manager. Not
    for several threads. Memory: ``depth`` pages for each stream that is under way; buffers are kept for the next one.

    Raises CheckpointError when a file that holds pages is missing, cut short, or no regular file (a symbolic link is
    none), unless it is not to need all of them: then when a page of it is read. IoError when one cannot be opened.
    """

    def __init__(
        self,
        manifest: Manifest,
        folders: Sequence[Path],
        *,
        deadline_seconds: float = 120.0,
        depth: int = DEPTH,
        needs_all_files: bool = True,
    ) -> None:
        self.manifest, self._deadline_seconds, self._depth = manifest, deadline_seconds, depth
        self._contents = content_bytes(manifest.pages)
        self._buffers: list[AlignedBuffer] = []
        self._zeros: Bytes | None = None
        self.paths, self._missing = _find_files(manifest, folders)
        """Path of each slot file by its index in the header; files that hold no page of this commit are left out."""
        if needs_all_files and self._missing:
            raise self._missing[min(self._missing)]
        self._slots = {file: index for index, file in enumerate(self.paths)}  # file of the header → file of the engine
        files = [_open(path) for path in self.paths.values()]
        self._engine = io_engine.open(files, depth=depth)

    def close(self) -> None:
        """Waits for what is under way and closes the files; a second call does nothing."""
        self._engine.close()

    def __enter__(self) -> CommitReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def pages(self, indices: Sequence[int]) -> Generator[tuple[int, Bytes], None, None]:
        """(record index, content) of each page, in the order given, several being read ahead.

        The content is (count × itemsize,) uint8 and valid until the next page is asked for; it is not to be written
        to. A page that was never written is zeros. Raises CorruptPageError, or IoError, when its turn comes.
        """
        return self._stream(indices, self._finish)

    def read(self, name: str, kind: Kind, start: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """(count,) elements of a parameter from ``start`` on; all of them by default. For BUFFER they are bytes.

        The dtype is float32, whatever the format that a state is stored in; uint16 for PARAM in bf16, whose bits it
        holds; uint8 for BUFFER. Raises CheckpointError for an unknown name, a range that is not the parameter's, or
        elements without a page; CorruptPageError; IoError.
        """
        parts = list(self.parts(name, kind, start, count, copy=True))
        return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty(0, self._dtype(kind))

    def parts(
        self, name: str, kind: Kind, start: int = 0, count: int | None = None, *, copy: bool = False
    ) -> Iterator[npt.NDArray[Any]]:
        """The same in order, page by page. Without ``copy`` a part is valid until the next one is asked for."""
        label = f"{kind.name} of {name}"
        try:
            numel = self.manifest.size(name, kind)
        except KeyError:
            raise CheckpointError(self._where, f"no {label}", "a name that it has") from None
        count = numel - start if count is None else count
        if start < 0 or count < 0 or start + count > numel:
            raise CheckpointError(self._where, f"{label}[{start}:{start + count}]", f"a range in {numel} elements")
        end, in_records = start + count, kind in self._in_records
        pieces = self.manifest.find(name, Kind.STATES if in_records else kind)
        pieces = [piece for piece in pieces if piece.start < end and piece.start + piece.count > start]
        held = sum(min(p.start + p.count, end) - max(p.start, start) for p in pieces)
        if held != count:
            raise CheckpointError(
                self._where, f"{label} with pages for {held} of {count} elements", "all of them", _no_pages(kind)
            )
        dtype = self._dtype(kind)
        for piece, (_, content) in zip(pieces, self.pages([piece.record for piece in pieces])):
            low, high = max(piece.start, start), min(piece.start + piece.count, end)
            if in_records:
                yield self._decode(name, kind, piece, content, low, high - low)
            else:
                first = piece.offset + (low - piece.start) * dtype.itemsize
                part = content[first : first + (high - low) * dtype.itemsize].view(dtype)
                yield part.copy() if copy else part

    def _dtype(self, kind: Kind) -> np.dtype[Any]:
        return _NUMPY[kind_dtype(kind, self.manifest.header.precision)]

    def blocks8(self, name: str, kind: Kind, start: int, count: int) -> tuple[npt.NDArray[np.uint8], Scales]:
        """A moment that is stored in int8, as it is: (count,) codes, and a scale for each block of them. ``start`` is
        a multiple of a block, and ``count`` too unless it is what the parameter has left."""
        codes, scales = [], []
        for piece, (_, content) in self._records_of(name, start, start + count):
            low, high = max(piece.start, start), min(piece.start + piece.count, start + count)
            found, begin = self._place(kind, piece, low)
            assert found.format == "int8", found.format
            assert begin % BLOCK8 == 0, "whole blocks"
            codes.append(content[found.offset + begin :][: high - low].copy())
            first = found.scales + begin // BLOCK8 * 4
            scales.append(content[first:][: 4 * -(-(high - low) // BLOCK8)].view("<f4").copy())
        return np.concatenate(codes), np.concatenate(scales)

    def _records_of(self, name: str, start: int, end: int) -> Iterator[tuple[FoundPiece, tuple[int, Bytes]]]:
        pieces = [
            piece
            for piece in self.manifest.find(name, Kind.STATES)
            if piece.start < end and piece.start + piece.count > start
        ]
        return zip(pieces, self.pages([piece.record for piece in pieces]))

    def _place(self, kind: Kind, piece: FoundPiece, element: int) -> tuple[StatePiece, int]:
        """Where a record that has a part of a parameter has a state of it, and where in there its ``element`` is."""
        record = self.manifest.pages[piece.record]
        begin = piece.offset + element - piece.start  # in the record
        formats = self._unit_formats[int(record["unit"])]
        for one in record_pieces(formats, int(record["start"]), int(record["count"])):
            if one.kind == kind.name and one.start <= begin < one.start + one.count:
                return one, begin - one.start
        raise AssertionError(f"a record without {kind.name}")

    def _decode(
        self, name: str, kind: Kind, piece: FoundPiece, content: Bytes, low: int, count: int
    ) -> npt.NDArray[np.float32]:
        """(count,) elements of a parameter's state from ``low`` on, out of a record that has them."""
        found, begin = self._place(kind, piece, low)
        first = begin // BLOCK8 * BLOCK8  # whole blocks are decoded
        ahead = begin - first
        values = np.empty(ahead + count, np.float32)
        params = None
        if kind is Kind.MASTER and found.format == "split":
            first, values, ahead = begin, values[ahead:], 0
            params = self.read(name, Kind.PARAM, low, count)
        decode(
            content.ctypes.data,
            found,
            first,
            len(values),
            values.ctypes.data,
            params=params.ctypes.data if params is not None else 0,
        )
        return values[ahead:]

    @functools.cached_property
    def _in_records(self) -> frozenset[Kind]:
        """The kinds that this commit has in records."""
        header = self.manifest.header
        return frozenset((Kind.MASTER, *moment_kinds(header.optimizer.type)) if header.has_records else ())

    @functools.cached_property
    def _unit_formats(self) -> list[UnitFormats]:
        header = self.manifest.header
        moments = len(moment_kinds(header.optimizer.type))
        return [UnitFormats(layout, moments) for layout in layouts_from_units(header.units)]

    def buffers(self) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        """(dtype as torch names it, shape, content) of each buffer by name. They are small, and held all at once."""
        return {
            buffer.name: (buffer.dtype, buffer.shape, self.read(buffer.name, Kind.BUFFER).tobytes())
            for buffer in self.manifest.header.buffers
        }

    def stored(self) -> list[int]:
        """Records of the pages that were written, in the order of the files, which is kindest to the drive."""
        pages = self.manifest.pages
        written = np.flatnonzero(pages["file"] != NONE)
        order: list[int] = written[np.lexsort((pages["slot"][written], pages["file"][written]))].tolist()
        return order

    def checked(self, indices: Sequence[int]) -> Generator[tuple[int, CorruptPageError | IoError | None], None, None]:
        """(record index, what is wrong with the page or None), in the order given, several being read ahead. Raises
        IoError as ``verify`` does."""
        return self._stream(indices, self._problem)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[CorruptPageError | IoError]:
        """Reads every written page and lists the bad ones: other content than was written, or unreadable (EIO).

        ``progress`` is called with (pages done, pages) after each page. Raises IoError for what is no page's fault,
        such as a deadline.
        """
        order = self.stored()
        bad: list[CorruptPageError | IoError] = []
        for done, (_, error) in enumerate(self.checked(order), 1):
            if error is not None:
                bad.append(error)
            if progress is not None:
                progress(done, len(order))
        return bad

    @property
    def _where(self) -> str:
        return f"commit of step {self.manifest.header.step}"

    def _stream(
        self, indices: Sequence[int], finish: Callable[[_Flight], Any]
    ) -> Generator[tuple[int, Any], None, None]:
        flights: deque[_Flight] = deque()
        spare: list[AlignedBuffer] = []
        taken = 0  # buffers of this stream
        ahead: Iterator[int] = iter(indices)
        patience_seconds = 0.0  # an error is told at once
        try:
            while True:
                while len(flights) < self._depth and (index := next(ahead, None)) is not None:
                    buffer = None
                    if self.manifest.pages["file"][index] != NONE:
                        if not spare:
                            spare.append(self._take_buffer())
                            taken += 1
                        buffer = spare.pop()
                    flights.append(self._start(index, buffer))
                if not flights:
                    return
                assert taken <= self._depth
                flight = flights.popleft()
                try:
                    yield flight.index, finish(flight)
                finally:
                    self._give_back(flight, spare, 0)
        except GeneratorExit:  # the consumer has enough: what was read ahead arrives within the deadline
            patience_seconds = self._deadline_seconds
            raise
        finally:
            deadline = time.monotonic() + patience_seconds
            for flight in flights:
                self._give_back(flight, spare, deadline - time.monotonic())
            self._buffers += spare

    def _take_buffer(self) -> AlignedBuffer:
        return self._buffers.pop() if self._buffers else AlignedBuffer(self.manifest.header.page_bytes)

    @staticmethod
    def _give_back(flight: _Flight, spare: list[AlignedBuffer], patience_seconds: float) -> None:
        """Returns the buffer to its stream; one that the kernel may still write to is left to the engine instead."""
        if flight.buffer is None or flight.ticket is None:
            return
        with contextlib.suppress(IoError, ValueError):  # ValueError: the reader was closed meanwhile
            flight.ticket.wait(max(patience_seconds, 0))
        if flight.ticket.done():
            spare.append(flight.buffer)

    def _start(self, index: int, buffer: AlignedBuffer | None) -> _Flight:
        if buffer is None:
            return _Flight(index, None, None)
        page = self.manifest.pages[index]
        if (error := self._missing.get(int(page["file"]))) is not None:
            raise error
        extent = extent_bytes(int(self._contents[index]))
        offset = int(page["slot"]) * self.manifest.header.page_bytes
        ticket = self._engine.read(offset, buffer.view(0, extent), self._slots[int(page["file"])])
        return _Flight(index, buffer, ticket)

    def _finish(self, flight: _Flight) -> Bytes:
        """The content of a page that has arrived. Raises CorruptPageError or IoError."""
        content = int(self._contents[flight.index])
        if flight.buffer is None or flight.ticket is None:
            if self._zeros is None:
                self._zeros = np.zeros(self.manifest.header.page_bytes, np.uint8)
                self._zeros.setflags(write=False)
            return self._zeros[:content]
        flight.ticket.wait(self._deadline_seconds)
        page = self.manifest.pages[flight.index]
        extent = flight.buffer.view(0, extent_bytes(content))
        if (found := crc32c(extent)) != page["crc"]:
            raise CorruptPageError(
                flight.index,
                self.manifest.describe(flight.index),
                str(self.paths[int(page["file"])]),
                int(page["slot"]) * self.manifest.header.page_bytes,
                int(page["crc"]),
                found,
            )
        array = np.frombuffer(extent, np.uint8, content)
        array.setflags(write=False)
        return array

    def _problem(self, flight: _Flight) -> CorruptPageError | IoError | None:
        try:
            self._finish(flight)
        except CorruptPageError as error:
            return error
        except IoError as error:
            if error.errno not in (errno.EIO, errno.ENODATA):
                raise
            return error
        return None


def _no_pages(kind: Kind) -> str:
    return "MASTER has its values in full precision." if kind is Kind.PARAM else ""


def _find_files(manifest: Manifest, folders: Sequence[Path]) -> tuple[dict[int, Path], dict[int, CheckpointError]]:
    """The files that have pages, by index, and why others of them cannot be used."""
    pages, page_bytes = manifest.pages, manifest.header.page_bytes
    found, missing = {}, {}
    for index in np.unique(pages["file"][pages["file"] != NONE]).tolist():
        name = manifest.header.files[index].name
        needed = (int(pages["slot"][pages["file"] == index].max()) + 1) * page_bytes
        refusals = []
        for folder in folders:
            refusal = _refusal(Path(folder) / name, needed)
            if not refusal:
                found[index] = Path(folder) / name
                break
            refusals.append(f"{folder}: {refusal}")
        else:
            missing[index] = CheckpointError(
                name,
                "no slot file that can be used (" + ("; ".join(refusals) or "no folder to look in") + ")",
                f"a regular file of {needed} bytes or more",
                "Name the folder that has it.",
            )
    return found, missing


def _refusal(path: Path, needed_bytes: int) -> str:
    """Why a slot file cannot be used, or nothing."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return error.strerror or "not readable"
    if stat.S_ISLNK(status.st_mode):
        return "a symbolic link"
    if not stat.S_ISREG(status.st_mode):
        return "no regular file"
    return "" if status.st_size >= needed_bytes else f"cut short, {status.st_size} bytes"


def _open(path: Path) -> io_engine.File:
    """Opens what was looked at, and not what a link put in its place since then leads to."""
    file = io_engine.open_file(path, read_only=True)
    if file.offset_alignment > EXTENT_BYTES or file.memory_alignment > EXTENT_BYTES:
        file = io_engine.open_file(path, read_only=True, direct=False)  # pages end at multiples of 4096 only
    if not os.path.samestat(os.lstat(path), os.fstat(file.descriptor)):
        raise CheckpointError(str(path), "a file that was replaced while it was opened", "the slot file")
    return file
