"""``timeline.json.gz``: gzip, JSON, one array for each column of the events. docs/timeline-format.md describes it.

A timeline may come from somebody else, so nothing in a file is believed before it is checked: its size, also unpacked,
every type, every index and every time.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from angelptm.errors import DataError
from angelptm.foreign import read_whole
from angelptm.timeline.data import Counter, Event, Lane, LaneKind, Step, Timeline

FILE_NAME = "timeline.json.gz"
FORMAT_VERSION = 1
_PACKED_LIMIT_BYTES = 64 << 20
_LIMIT_BYTES = 256 << 20
_MOST_EVENTS = 2_000_000
_MOST_LANES = 4096
_LONGEST_NS = 10**18  # some thirty years, and exact in what JSON parsers make of it
_NS = 1_000_000_000
_EXPECTED = "a timeline as `angelptm train` writes it"
_REMEDY = "Record it again, or name another run folder."

Ns = Annotated[int, Field(ge=0, le=_LONGEST_NS)]
Index = Annotated[int, Field(ge=0, le=2**31)]
Bytes = Annotated[int, Field(ge=0, le=2**63 - 1)]
Name = Annotated[str, Field(min_length=1, max_length=4096)]
_COLUMN = Field(max_length=_MOST_EVENTS)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Step(_Part):
    number: Annotated[int, Field(ge=0, le=2**53)]
    start_ns: Ns
    end_ns: Ns


class _Lane(_Part):
    name: Name
    kind: LaneKind


class _Events(_Part):
    lane: Annotated[list[Index], _COLUMN]
    name: Annotated[list[Index], _COLUMN]
    start_ns: Annotated[list[Ns], _COLUMN]
    end_ns: Annotated[list[Ns], _COLUMN]
    bytes: Annotated[list[Bytes], _COLUMN]
    args: dict[str, dict[str, Any]]


class _Counter(_Part):
    name: Name
    unit: Annotated[str, Field(max_length=64)]
    at_ns: Annotated[list[Ns], _COLUMN]
    value: Annotated[list[float], _COLUMN]


class _File(_Part):
    format: Literal["angelptm timeline"]
    version: Literal[1]
    origin_unix_s: Annotated[float, Field(ge=0, le=1e12)]
    steps: Annotated[list[_Step], _COLUMN]
    lanes: Annotated[list[_Lane], Field(max_length=_MOST_LANES)]
    names: Annotated[list[Name], _COLUMN]
    events: _Events
    counters: Annotated[list[_Counter], Field(max_length=_MOST_LANES)]
    facts: dict[str, Any]
    dropped: dict[str, Annotated[int, Field(ge=0, le=2**63 - 1)]]


def save(timeline: Timeline, path: Path) -> None:
    """Writes the file whole or not at all. Raises OSError."""
    lanes = {lane.name: index for index, lane in enumerate(timeline.lanes)}
    names: dict[str, int] = {}
    events = timeline.events
    content = _File.model_construct(
        format="angelptm timeline",
        version=FORMAT_VERSION,
        origin_unix_s=timeline.origin_unix_s,
        steps=[
            _Step.model_construct(number=step.number, start_ns=_ns(step.start_s), end_ns=_ns(step.end_s))
            for step in timeline.steps
        ],
        lanes=[_Lane.model_construct(name=lane.name, kind=lane.kind) for lane in timeline.lanes],
        events=_Events.model_construct(
            lane=[lanes[event.lane] for event in events],
            name=[names.setdefault(event.name, len(names)) for event in events],
            start_ns=[_ns(event.start_s) for event in events],
            end_ns=[_ns(event.end_s) for event in events],
            bytes=[event.bytes for event in events],
            args={str(index): event.args for index, event in enumerate(events) if event.args},
        ),
        counters=[
            _Counter.model_construct(
                name=counter.name,
                unit=counter.unit,
                at_ns=[_ns(at) for at, _ in counter.samples],
                value=[float(value) for _, value in counter.samples],
            )
            for counter in timeline.counters
        ],
        names=list(names),
        facts=timeline.facts,
        dropped=timeline.dropped,
    )
    part = path.with_name(path.name + ".part")
    try:
        # mtime=0, so that equal timelines are equal files.
        part.write_bytes(gzip.compress(content.model_dump_json().encode(), compresslevel=6, mtime=0))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> Timeline:
    """Reads and checks a timeline. DataError says what is wrong with a file that is none."""
    text = _unpack(path, read_whole(path, _PACKED_LIMIT_BYTES, _EXPECTED))
    try:
        found = _File.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:120]
        _refuse(path, f"{where or 'its content'}: {first['msg']}")
    return _timeline(path, found)


def _unpack(path: Path, packed: bytes) -> bytes:
    """Plain JSON is accepted, too, so that a timeline can be looked at and changed by hand."""
    if packed[:2] != b"\x1f\x8b":
        return packed
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            text = file.read(_LIMIT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        _refuse(path, f"gzip that cannot be unpacked ({error})")
    if len(text) > _LIMIT_BYTES:
        _refuse(path, f"more than {_LIMIT_BYTES} bytes when unpacked")
    return text


def _timeline(path: Path, found: _File) -> Timeline:
    """What one field alone cannot say: lengths, indexes, order of times."""
    columns = found.events
    count = len(columns.lane)
    for name in ("name", "start_ns", "end_ns", "bytes"):
        if len(getattr(columns, name)) != count:
            _refuse(path, f"events.{name} with {len(getattr(columns, name))} values where events.lane has {count}")
    lanes = [Lane(lane.name, lane.kind) for lane in found.lanes]
    if len({lane.name for lane in lanes}) != len(lanes):
        _refuse(path, "two lanes of the same name")
    if max(columns.lane, default=-1) >= len(lanes) or max(columns.name, default=-1) >= len(found.names):
        _refuse(path, f"an event beyond the {len(lanes)} lanes or the {len(found.names)} names")
    args = columns.args
    if not all(key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < count for key in args):
        _refuse(path, "events.args of an event that there is not")
    for start, end in (*zip(columns.start_ns, columns.end_ns), *((s.start_ns, s.end_ns) for s in found.steps)):
        if end < start:
            _refuse(path, f"an event or step that ends at {end} ns, before it starts at {start} ns")
    if len({step.number for step in found.steps}) != len(found.steps):
        _refuse(path, "two steps of the same number")
    for counter in found.counters:
        if len(counter.at_ns) != len(counter.value):
            _refuse(path, f"counter {counter.name[:80]!r} with unequal numbers of times and values")
        if any(later < earlier for earlier, later in zip(counter.at_ns, counter.at_ns[1:])):
            _refuse(path, f"counter {counter.name[:80]!r} whose times go back")
    events = [
        Event(lanes[lane].name, found.names[name], start / _NS, end / _NS, size, args.get(str(index), {}))
        for index, (lane, name, start, end, size) in enumerate(
            zip(columns.lane, columns.name, columns.start_ns, columns.end_ns, columns.bytes)
        )
    ]
    return Timeline(
        origin_unix_s=found.origin_unix_s,
        steps=[Step(step.number, step.start_ns / _NS, step.end_ns / _NS) for step in found.steps],
        lanes=lanes,
        events=events,
        counters=[
            Counter(c.name, c.unit, tuple((at / _NS, value) for at, value in zip(c.at_ns, c.value)))
            for c in found.counters
        ],
        facts=found.facts,
        dropped=found.dropped,
    )


def _ns(seconds: float) -> int:
    return max(0, round(seconds * _NS))


def _refuse(path: Path, found: str) -> NoReturn:
    raise DataError(str(path), found, _EXPECTED, _REMEDY)
