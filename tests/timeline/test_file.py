"""A timeline file gives back what was saved, and says what is wrong with anything else."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelptm.errors import DataError
from angelptm.timeline import Counter, Event, Lane, Step, Timeline, load, save

from .runs import timeline

TIMES = st.integers(0, 10**12).map(lambda ns: ns / 1e9)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    lanes = draw(st.lists(NAMES, max_size=4, unique=True))
    found = Timeline(origin_unix_s=draw(st.floats(0, 2e9)))
    found.lanes = [Lane(name, draw(st.sampled_from(["compute", "channel", "updater", "stall"]))) for name in lanes]
    for _ in range(draw(st.integers(0, 6)) if lanes else 0):
        start, end = sorted((draw(TIMES), draw(TIMES)))
        args = draw(st.dictionaries(NAMES, st.one_of(st.integers(-(2**53), 2**53), NAMES, st.none()), max_size=2))
        event = Event(draw(st.sampled_from(lanes)), draw(NAMES), start, end, draw(st.integers(0, 2**53)), args)
        found.events.append(event)
    for number in draw(st.lists(st.integers(0, 2**40), max_size=3, unique=True)):
        start, end = sorted((draw(TIMES), draw(TIMES)))
        found.steps.append(Step(number, start, end))
    samples = sorted(draw(st.lists(st.tuples(TIMES, st.floats(-1e12, 1e12)), max_size=4)))
    found.counters = [Counter(draw(NAMES), "bytes", tuple(samples))]
    found.facts = draw(st.dictionaries(NAMES, st.one_of(NAMES, st.booleans()), max_size=3))
    found.dropped = draw(st.dictionaries(NAMES, st.integers(0, 2**40), max_size=2))
    return found


@given(timelines())
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, saved: Timeline) -> None:
    path = tmp_path_factory.mktemp("timeline") / "timeline.json.gz"
    save(saved, path)
    assert load(path) == saved
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_equal_timelines_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.json.gz"):
        save(timeline(), tmp_path / name)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_plain_json_is_accepted(tmp_path: Path) -> None:
    save(timeline(), tmp_path / "timeline.json.gz")
    plain = tmp_path / "plain.json"
    plain.write_bytes(gzip.decompress((tmp_path / "timeline.json.gz").read_bytes()))
    assert load(plain) == load(tmp_path / "timeline.json.gz")


def set_at(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (set_at("format", value="something"), "format"),
        (set_at("version", value=2), "version"),
        (set_at("more", value=1), "more: Extra inputs"),
        (set_at("events", "lane", value=[0]), "values where events.lane has 1"),
        (set_at("events", "lane", 0, value=99), "an event beyond the 7 lanes"),
        (set_at("events", "name", 0, value=10**6), "an event beyond"),
        (set_at("events", "lane", 0, value=-1), "events.lane.0"),
        (set_at("events", "end_ns", 5, value=0), "ends at 0 ns, before it starts"),
        (set_at("events", "start_ns", 0, value=1.5), "events.start_ns.0"),
        (set_at("events", "start_ns", 0, value=10**30), "events.start_ns.0"),
        (set_at("events", "args", value={"x": {}}), "events.args of an event that there is not"),
        (set_at("events", "args", value={"99999999": {}}), "events.args of an event that there is not"),
        (set_at("events", "args", value={"²": {}}), "events.args of an event that there is not"),
        (set_at("steps", 1, "end_ns", value=0), "ends at 0 ns"),
        (set_at("steps", 1, "number", value=1), "two steps of the same number"),
        (set_at("lanes", 1, "name", value="engine"), "two lanes of the same name"),
        (set_at("lanes", 1, "kind", value="other"), "lanes.1.kind"),
        (set_at("counters", 0, "value", value=[1.0]), "unequal numbers of times and values"),
        (set_at("counters", 0, "at_ns", 3, value=0), "whose times go back"),
        (set_at("counters", 0, "value", 0, value=None), "counters.0.value.0"),
        (set_at("dropped", value={"x": -1}), "dropped.x"),
    ],
)
def test_malformed_content_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], found: str) -> None:
    save(timeline(), tmp_path / "timeline.json.gz")
    content = json.loads(gzip.decompress((tmp_path / "timeline.json.gz").read_bytes()))
    change(content)
    path = tmp_path / "bad.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    with pytest.raises(DataError, match="Record it again") as error:
        load(path)
    assert found in error.value.found
    assert error.value.path == str(path)


# The time in the gzip header is fixed, and every case has a name: parallel workers must collect the same tests.
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{}", id="object"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"\x1f\x8b", id="only the magic number"),
        pytest.param(gzip.compress(b"{}", mtime=0)[:-6], id="end missing"),
        pytest.param(b"\xff\xfe", id="no UTF-8"),
        pytest.param(b"[" * 100_000, id="nested too deep"),
        pytest.param(b'{"steps": NaN}', id="NaN"),
    ],
)
def test_what_is_no_timeline_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "timeline.json.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="expected a timeline"):
        load(path)


def test_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("angelptm.timeline.file._LIMIT_BYTES", 1000)
    path = tmp_path / "timeline.json.gz"
    path.write_bytes(gzip.compress(b" " * 100_000))
    with pytest.raises(DataError, match="more than 1000 bytes when unpacked"):
        load(path)
