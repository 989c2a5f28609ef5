"""Commits whose states are records: read as docs/checkpoint-format.md says, and refused where they break its rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import Kind, moment_kinds
from angelptm.errors import CheckpointError
from angelptm.states.formats import StateFormats

from .builder import SMALL, Commit, assemble, header_json, make_commit

STATES = {
    "embed.weight": StateFormats("split", "int8", "int8"),
    "h.0.weight": StateFormats("split", "bf16", "int8"),
    "h.0.bias": StateFormats("fp32", "fp32", "fp32"),
    "h.0.none": StateFormats("split", "int8", "bf16"),
}


def sections_of(commit: Commit, record: int) -> Iterator[tuple[int, int, str, str, np.ndarray, np.ndarray]]:
    """(first element, count, kind, format, values, scales) of a record; made from the document alone."""
    page = commit.manifest.pages[record]
    header = commit.manifest.header
    unit = header.units[int(page["unit"])]
    raw = np.frombuffer(commit.contents[record], np.uint8)
    start, end = int(page["start"]), int(page["start"]) + int(page["count"])
    trained = [param for param in unit.params if param.trainable]
    runs: list[tuple[int, int, tuple[str, ...]]] = []
    for index, param in enumerate(trained):
        formats = ("fp32",) * 3 if param.states is None else tuple(dict(param.states).values())
        if header.optimizer.type != "adamw":
            formats = formats[:2]
        first = max(start, param.offset if index else 0)
        last = min(end, trained[index + 1].offset if index + 1 < len(trained) else unit.trainable_elements)
        if first >= last:
            continue
        if runs and runs[-1][2] == formats:
            runs[-1] = (runs[-1][0], last, formats)
        else:
            runs.append((first, last, formats))
    offset = 0

    def take(size: int) -> np.ndarray:
        nonlocal offset
        offset = -(-offset // 64) * 64
        part = raw[offset : offset + size]
        assert len(part) == size
        offset += size
        return part

    for first, last, formats in runs:
        count = last - first
        widths = {"fp32": 4, "split": 2, "bf16": 2, "int8": 1}
        values = [take(widths[form] * count) for form in formats]
        scales = [take(4 * -(-count // 128)) if form == "int8" else raw[:0] for form in formats]
        for kind, form, value, scale in zip(("MASTER", "EXP_AVG", "EXP_AVG_SQ"), formats, values, scales):
            yield first, count, kind, form, value, scale.view("<f4")
    assert offset == int(page["bytes"])


def decoded(kind: str, form: str, values: np.ndarray, scales: np.ndarray, params: np.ndarray) -> np.ndarray:
    """(count,) float32, or for split masters their bits as float32."""
    count = len(params)
    if form == "fp32":
        return values.view("<f4")
    if form == "bf16":
        return (values.view("<u2").astype("<u4") << 16).view("<f4")
    if form == "split":
        return ((params.astype("<i8") << 16) + values.view("<i2")).astype("<u4").view("<f4")
    scale = np.repeat(scales, 128)[:count]
    if kind == "EXP_AVG":
        q = values.view("i1").astype("f4")
        return q * np.abs(q) * np.float32(1 / 16129) * scale
    q = values.astype("f4")
    return (q * q) * (q * q) * np.float32(1 / 255**4) * scale


def trainable_params(commit: Commit, unit: int, first: int, count: int) -> np.ndarray:
    """(count,) uint16, the bits of the unit's bf16 parameters."""
    found = np.zeros(count, np.uint16)
    for record, page in enumerate(commit.manifest.pages):
        if page["kind"] == Kind.PARAM and page["unit"] == unit:
            low, high = max(first, int(page["start"])), min(first + count, int(page["start"] + page["count"]))
            if low < high:
                raw = np.frombuffer(commit.contents[record], "<u2")
                found[low - first : high - first] = raw[low - int(page["start"]) : high - int(page["start"])]
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_states_are_read_whole_and_in_ranges(optimizer: str, tmp_path: Path) -> None:
    commit = make_commit(optimizer=optimizer, states=STATES)
    assert commit.manifest.header.has_records
    Manifest.decode(commit.manifest.encode(), "x")
    commit.write_files(tmp_path)
    checked = 0
    with CommitReader(commit.manifest, [tmp_path]) as reader:
        for record in np.flatnonzero(commit.manifest.pages["kind"] == Kind.STATES).tolist():
            unit = int(commit.manifest.pages[record]["unit"])
            for first, count, kind, form, values, scales in sections_of(commit, record):
                params = trainable_params(commit, unit, first, count)
                expected = decoded(kind, form, values, scales, params)
                for param in commit.manifest.header.units[unit].params:
                    low, high = max(first, param.offset), min(first + count, param.offset + param.numel)
                    for cut in (0, 1, 129):
                        if not param.trainable or low + cut >= high:
                            continue
                        found = reader.read(param.name, Kind[kind], low + cut - param.offset, high - low - cut)
                        wanted = expected[low + cut - first : high - first]
                        number = ~np.isnan(wanted)
                        assert np.array_equal(np.isnan(found), ~number), (param.name, kind)
                        assert np.allclose(found[number], wanted[number], rtol=1e-6, atol=0), (param.name, kind)
                        checked += 1
        for unit_record in commit.manifest.header.units:
            for param in unit_record.params:
                for state in (Kind.MASTER, *moment_kinds(optimizer)) if param.trainable else ():
                    assert reader.read(param.name, state).shape == (param.numel,)
    assert checked > 10


def test_a_split_master_is_the_lower_half_of_an_fp32_number() -> None:
    """A master whose parameter is its neighbour upwards has a remainder below zero."""
    master = np.array([1.0, 1.00390625, 1.0039063, 1.003906, -2.5], np.float32)
    bits = master.view(np.uint32)
    param = ((bits + 0x8000) >> 16).astype(np.uint16)
    remainder = (bits & 0xFFFF).astype(np.uint16)
    assert np.array_equal(decoded("MASTER", "split", remainder.view(np.uint8), remainder[:0], param), master)


def refusal(commit: Commit, pages: np.ndarray) -> str:
    with pytest.raises(CheckpointError) as refused:
        Manifest.decode(assemble(header_json(commit.manifest), pages), "x")
    return str(refused.value)


def changed(commit: Commit, kind: Kind, /, **fields: int) -> tuple[int, np.ndarray]:
    """The longest page of a kind with other fields."""
    pages = commit.manifest.pages.copy()
    chosen = np.flatnonzero(pages["kind"] == kind)
    index = int(chosen[pages["count"][chosen].argmax()])
    for name, value in fields.items():
        pages[index][name] = value if value >= 0 else int(pages[index][name]) + value
    return index, pages


@pytest.fixture
def commit() -> Commit:
    return make_commit(states=STATES)


def test_records_of_another_length_are_refused(commit: Commit) -> None:
    index, pages = changed(commit, Kind.STATES, bytes=-64)
    assert f"page record {index} with bytes" in refusal(commit, pages)
    index, pages = changed(commit, Kind.STATES, bytes=2**31)
    assert f"page record {index} with bytes {2**31}, expected 65536 or less" in refusal(commit, pages)


def test_records_cut_inside_a_block_are_refused(commit: Commit) -> None:
    """One element less here and one more there: all of them are still covered."""
    pages = commit.manifest.pages.copy()
    own = np.flatnonzero((pages["kind"] == Kind.STATES) & (pages["unit"] == 1))
    first, second = own[np.argsort(pages["start"][own])][:2]
    pages[first]["count"] -= 1
    pages[second]["start"] -= 1
    pages[second]["count"] += 1
    assert "expected records cut at multiples of 128 elements" in refusal(commit, pages)


def test_elements_without_a_record_are_refused(commit: Commit) -> None:
    _, pages = changed(commit, Kind.STATES, count=-128)
    assert "without STATES pages" in refusal(commit, pages)


def test_states_of_their_own_beside_records_are_refused(commit: Commit) -> None:
    _, pages = changed(commit, Kind.STATES, kind=int(Kind.MASTER), dtype=0)
    assert "with kind 2, expected one of 0 (PARAM), 6 (STATES), 5 (BUFFER)" in refusal(commit, pages)


def test_records_of_a_model_whose_states_are_fp32_are_refused() -> None:
    plain = make_commit()
    _, pages = changed(plain, Kind.MASTER, kind=int(Kind.STATES), dtype=2)
    assert "with kind 6" in refusal(plain, pages)


def test_split_masters_without_their_parameters_are_refused() -> None:
    commit = make_commit(states=STATES, trainable_params=False)
    assert "without PARAM pages" in refusal(commit, commit.manifest.pages)
    whole = {name: StateFormats("fp32", one.exp_avg, one.exp_avg_sq) for name, one in STATES.items()}
    Manifest.decode(make_commit(states=whole, trainable_params=False).manifest.encode(), "x")


def test_split_masters_of_fp32_parameters_are_refused(commit: Commit) -> None:
    header = header_json(commit.manifest)
    header["precision"] = "fp32"
    with pytest.raises(CheckpointError, match="split master in fp32"):
        Manifest.decode(assemble(header, commit.manifest.pages), "x")


def test_formats_that_nobody_knows_are_refused(commit: Commit) -> None:
    header = header_json(commit.manifest)
    header["units"][0]["params"][0]["states"]["exp_avg"] = "fp8"
    with pytest.raises(CheckpointError, match="exp_avg"):
        Manifest.decode(assemble(header, commit.manifest.pages), "x")


def test_overlapping_records_are_refused(commit: Commit) -> None:
    pages = commit.manifest.pages.copy()
    own = np.flatnonzero((pages["kind"] == Kind.STATES) & (pages["unit"] == 1))
    assert len(own) > 1
    pages[own[0]]["start"] = pages[own[1]]["start"]
    assert "STATES page records" in refusal(commit, pages)


def test_fp32_states_are_written_as_before() -> None:
    header = header_json(make_commit().manifest)
    assert all("states" not in param for unit in header["units"] for param in unit["params"])
    assert set(SMALL) == {unit["name"] for unit in header["units"]}
