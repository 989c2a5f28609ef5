"""The manifest file: what is written is read back, and what is not valid is refused by name."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from angelptm.checkpoint.checksum import crc32c
from angelptm.checkpoint.format import MAX_BYTES, Manifest
from angelptm.checkpoint.header import Header, layouts_from_units
from angelptm.checkpoint.records import NONE, PAGE_RECORD, Kind
from angelptm.errors import CheckpointError
from tests.checkpoint.builder import (
    PAGE_BYTES,
    SMALL,
    Commit,
    assemble,
    header_json,
    make_commit,
    make_layouts,
)
from tests.checkpoint.mutations import check_mutations, use_all
from tests.checkpoint.strategies import commits

BUFFERS: dict[str, Any] = {"h.0.ids": ("int64", (3,)), "h.0.mask": ("bool", (70000,)), "none": ("int8", (0,))}


@pytest.fixture
def commit() -> Commit:
    return make_commit(buffers=BUFFERS)


def refusal(content: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        Manifest.decode(content, "the/path")
    assert caught.value.path == "the/path"
    return str(caught.value)


def test_crc32c_of_known_texts() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"6789", crc32c(b"12345")) == crc32c(b"123456789")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(commits())
def test_encoded_manifest_decodes_to_the_same(commit: Commit) -> None:
    content = commit.manifest.encode()
    again = Manifest.decode(content, "x")
    assert again.header == commit.manifest.header
    assert again.pages.tobytes() == commit.manifest.pages.tobytes()
    assert again.encode() == content
    use_all(again)


def test_file_is_laid_out_as_documented(commit: Commit) -> None:
    """Parsed by hand, from the documentation."""
    content = commit.manifest.encode()
    assert content[:8] == b"APTMCKPT"
    version, record_bytes, json_bytes, page_count = struct.unpack_from("<IIQQ", content, 8)
    assert (version, record_bytes, page_count) == (1, 48, len(commit.manifest.pages))
    assert json.loads(content[32 : 32 + json_bytes])["step"] == 7
    start = -(-(32 + json_bytes) // 8) * 8
    assert content[32 + json_bytes : start] == bytes(start - 32 - json_bytes)
    for index, page in enumerate(commit.manifest.pages):
        fields = struct.unpack_from("<IBBHQQIIIIQ", content, start + 48 * index)
        assert fields == tuple(page.item())
    end = start + 48 * page_count
    assert struct.unpack("<I", content[end:]) == (crc32c(content[:end]),)
    assert assemble(header_json(commit.manifest), commit.manifest.pages)[-4:] != bytes(4)


def test_decoded_pages_are_read_only(commit: Commit) -> None:
    pages = Manifest.decode(commit.manifest.encode(), "x").pages
    with pytest.raises(ValueError, match="read-only"):
        pages["slot"][0] = 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layouts_survive(precision: str) -> None:
    layouts = make_layouts(SMALL, PAGE_BYTES // (2 if precision == "bf16" else 4))
    decoded = Manifest.decode(make_commit(precision=precision).manifest.encode(), "x")
    assert layouts_from_units(decoded.header.units) == layouts


def test_find_says_where_elements_lie(commit: Commit) -> None:
    """Against the page's range, element by element."""
    manifest = commit.manifest
    for unit_index, unit in enumerate(manifest.header.units):
        for param in unit.params:
            for kind in (Kind.PARAM, Kind.MASTER, Kind.EXP_AVG, Kind.EXP_AVG_SQ):
                itemsize = 2 if kind is Kind.PARAM else 4
                place = {
                    int(page["start"]) + element: (record, element * itemsize)
                    for record, page in enumerate(manifest.pages)
                    if page["unit"] == unit_index and page["kind"] == kind
                    for element in range(int(page["count"]))
                }
                found = {
                    param.offset + piece.start + element: (piece.record, piece.offset + element * itemsize)
                    for piece in manifest.find(param.name, kind)
                    for element in range(piece.count)
                }
                span = range(param.offset, param.offset + param.numel)
                assert found == {element: place[element] for element in span if element in place}
    with pytest.raises(KeyError):
        manifest.find("absent", Kind.MASTER)
    with pytest.raises(KeyError):
        manifest.find("h.0.weight", Kind.BUFFER)


def test_pages_are_described_by_what_they_hold(commit: Commit) -> None:
    piece = commit.manifest.find("h.0.weight", Kind.EXP_AVG)[1]
    assert commit.manifest.describe(piece.record) == "EXP_AVG of h.0.weight[16384:32768]"
    piece = commit.manifest.find("h.0.bias", Kind.MASTER)[0]
    assert commit.manifest.describe(piece.record) == "MASTER of h.0.weight[32768:38700] and 1 more"
    piece = commit.manifest.find("h.0.mask", Kind.BUFFER)[1]
    assert commit.manifest.describe(piece.record) == "BUFFER of h.0.mask[65472:70000]"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_detected() -> None:
    content = make_commit({"a": {"a.w": ((9, 9), True)}}, rng=None).manifest.encode()
    rng = random.Random(0)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= rng.randrange(1, 256)
        refusal(bytes(changed))


def test_every_truncation_and_extension_is_detected(commit: Commit) -> None:
    content = commit.manifest.encode()
    for length in range(len(content)):
        refusal(content[:length])
    assert "bytes, expected" in refusal(content + b"\0")


def test_newer_version_has_its_own_message(commit: Commit) -> None:
    header, pages = header_json(commit.manifest), commit.manifest.pages
    assert "A newer AngelPTM wrote this" in refusal(assemble(header, pages, version=2))
    assert "format_version 0" in refusal(assemble(header, pages, version=0))
    assert "newer" not in refusal(assemble(header, pages, version=0))


def test_prefix_is_checked(commit: Commit) -> None:
    header, pages = header_json(commit.manifest), commit.manifest.pages
    assert "record_bytes 56" in refusal(assemble(header, pages, record_bytes=56))
    for number in (0, 1, 2**32, 2**63, 2**64 - 1):  # sums that 64 bits could not hold
        assert f"json_bytes {number}" in refusal(assemble(header, pages, json_bytes=number))
        assert f"page_count {number}" in refusal(assemble(header, pages, page_count=number))
    # Wraps around to the right length in 64 bits: (page_count + 2**60) * 48 = page_count * 48 + 3 * 2**64.
    assert "page_count" in refusal(assemble(header, pages, page_count=len(pages) + 2**60))
    text = json.dumps(header).encode()
    text += b" " * ((5 - len(text)) % 8)  # so that there is padding
    assert "after the JSON" in refusal(assemble(text, pages, padding=b"\0\1\0"))
    Manifest.decode(assemble(text, pages, padding=b"\0\0\0"), "x")
    assert "CRC32C" in refusal(assemble(header, pages)[:-4] + b"abcd")
    assert "magic" in refusal(b"not one")


def test_manifest_of_more_than_a_gibibyte_is_refused_before_it_is_looked_at() -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return MAX_BYTES + 1

    assert "1073741824 bytes or less" in refusal(Long(b"APTMCKPT"))


def _deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "header"),
        (b"[]", "valid dictionary"),
        (b"{", "JSON"),
        (b"\xff", "utf-8"),
        (b"[" * 200_000, "nested too deeply"),
        (_deep(100_000), "nested too deeply"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "a": 1}', "'a' comes twice"),
        (b'{"step": ' + b"9" * 10_000 + b"}", "limit"),
    ],
    ids=["empty", "list", "open", "utf8", "lists", "objects", "nan", "infinity", "twice", "digits"],
)
def test_bad_json_is_refused(text: bytes, expected: str) -> None:
    assert expected in refusal(assemble(text, b""))


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def edit(header: dict[str, Any]) -> None:
        for key in keys:
            header = header[key]
        header[last] = value

    return edit


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


BAD_NAMES = ["../x", "a/b", "/etc/passwd", ".hidden", "..", "", "a\0", "a\n", "a b", "é", "a" * 201, "-x"]

BAD_HEADERS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("unknown key", _set("surplus", 1), "header.surplus"),
    ("missing key", lambda h: h.pop("units"), "header.units"),
    ("format_version", _set("format_version", 2), "header.format_version"),
    ("format_version true", _set("format_version", True), "header.format_version"),
    ("package_version", _set("package_version", 1), "header.package_version"),
    ("store_id", _set("store_id", "AB" * 16), "header.store_id"),
    ("store_id short", _set("store_id", "ab"), "header.store_id"),
    ("step negative", _set("step", -1), "header.step"),
    ("step long", _set("step", 10**12), "header.step"),
    ("step text", _set("step", "1"), "header.step"),
    ("step float", _set("step", 1.0), "header.step"),
    ("created", _set("created", "yesterday"), "header.created"),
    ("created local", _set("created", "2025-01-01T00:00:00"), "not a time in UTC"),
    ("created elsewhere", _set("created", "2025-01-01T00:00:00+01:00"), "not a time in UTC"),
    ("config_hash", _set("config_hash", "ab"), "header.config_hash"),
    ("page_bytes odd", _set("page_bytes", 65537), "not a power of two"),
    ("page_bytes small", _set("page_bytes", 2**15), "header.page_bytes"),
    ("page_bytes large", _set("page_bytes", 2**31), "header.page_bytes"),
    ("precision", _set("precision", "fp16"), "header.precision"),
    *((f"file name {name[:20]!r}", _set("files", 0, "name", name), "header.files.0.name") for name in BAD_NAMES),
    ("file twice", _set("files", 0, "name", "states-1.pages"), "file 'states-1.pages' appears twice"),
    ("slot_count", _set("files", 0, "slot_count", 2**32), "header.files.0.slot_count"),
    ("unit twice", _set("units", 0, "name", "h.0"), "unit 'h.0' appears twice"),
    ("parameter twice", _set("units", 0, "params", 0, "name", "h.0.bias"), "parameter 'h.0.bias' appears twice"),
    ("parameter unnamed", _set("units", 0, "params", 0, "name", ""), "header.units.0.params.0.name"),
    ("shape negative", _set("units", 0, "params", 0, "shape", [-1]), "header.units.0.params.0.shape.0"),
    ("shape float", _set("units", 0, "params", 0, "shape", [2.0]), "header.units.0.params.0.shape.0"),
    ("shape long", _set("units", 0, "params", 0, "shape", [1] * 17), "header.units.0.params.0.shape"),
    ("shape huge", _set("units", 0, "params", 0, "shape", [0, 2**40, 2**40]), "more elements than 2**56"),
    ("shape larger", _set("units", 0, "params", 0, "shape", [60, 33]), "the trainable section ends at 1664"),
    ("shape smaller", _set("units", 0, "params", 0, "shape", [40, 33]), "the trainable section ends at 1664"),
    ("overlap", _set("units", 1, "params", 1, "offset", 128), "parameter 'h.0.bias' at offset 128"),
    ("gap", _set("units", 1, "params", 1, "offset", 2**50), "parameter 'h.0.bias' at offset"),
    ("section", _set("units", 1, "params", 1, "trainable", False), "parameter 'h.0.bias' at offset"),
    ("order", lambda h: h["units"][1]["params"].insert(2, h["units"][1]["params"].pop(3)), "comes after a frozen one"),
    ("trainable_elements", _set("units", 0, "trainable_elements", 2**50), "frozen_offset"),
    ("frozen_offset near", _set("units", 1, "frozen_offset", 1), "frozen_offset 1 lies in the trainable section"),
    ("frozen_offset far", _set("units", 0, "frozen_offset", 2**40), "frozen_offset 1099511627776 is a page away"),
    ("frozen_elements", _set("units", 2, "frozen_elements", 2**40), "the frozen section ends at"),
    ("owners", _set("units", 0, "params", 0, "owners", [["a"]]), "header.units.0.params.0.owners.0"),
    ("buffer dtype", _set("buffers", 0, "dtype", "object"), "header.buffers.0.dtype"),
    ("buffer overlap", _set("buffers", 1, "offset", 8), "buffer 'h.0.mask' at offset 8"),
    ("buffer gap", _set("buffers", 1, "offset", 2**40), "buffer 'h.0.mask' at offset"),
    ("buffer twice", _set("buffers", 1, "name", "h.0.ids"), "buffer 'h.0.ids' appears twice"),
    ("buffer_bytes", _set("buffer_bytes", 2**40), "buffer_bytes 1099511627776"),
    ("buffer_bytes less", _set("buffer_bytes", 8), "buffer_bytes 8"),
    ("optimizer", _set("optimizer", "type", "adam"), "header.optimizer.type"),
    ("steps negative", _set("optimizer", "steps", "h.0.bias", -1), "header.optimizer.steps.h.0.bias"),
    ("steps unknown", _set("optimizer", "steps", "absent", 1), "'absent' is not a trainable parameter"),
    ("steps frozen", _set("optimizer", "steps", "h.0.mask", 1), "'h.0.mask' is not a trainable parameter"),
    ("group unknown", _set("optimizer", "groups", 0, "params", ["absent"]), "'absent' is not a parameter"),
    ("group twice", lambda h: h["optimizer"]["groups"].append(h["optimizer"]["groups"][0]), "appears twice"),
    ("option", _set("optimizer", "groups", 0, "options", "lr", {"a": 1}), "header.optimizer.groups.0.options.lr"),
    ("option list", _set("optimizer", "groups", 0, "options", "betas", ["a"]), "options.betas"),
    ("scheduler", _set("scheduler", []), "header.scheduler"),
    ("client deep", _set("client", {"a": _nested(100)}), "nested deeper than 64 levels"),
    ("client surrogate", _set("client", {"a": "\ud800"}), "JSON cannot hold"),
    ("client key", _set("client", {"\ud800": 1}), "is not Unicode text"),
    ("client huge", _set("client", {"a": 10**3000}), "JSON cannot hold"),
    *(
        (f"surrogate in {'.'.join(map(str, path))}", _set(*path, "\ud800"), "lone surrogate")
        for path in (
            ("package_version",),
            ("units", 0, "name"),
            ("units", 0, "params", 0, "name"),
            ("units", 0, "params", 0, "owners", 0, 1),
            ("buffers", 0, "name"),
            ("optimizer", "groups", 0, "params", 0),
        )
    ),
    ("surrogate in steps", _set("optimizer", "steps", "\ud800", 1), "lone surrogate"),
    ("surrogate in an option", _set("optimizer", "groups", 0, "options", "\ud800", 1), "is not Unicode text"),
    ("rng python", lambda h: h["rng"]["python"][1].pop(), "header.rng.python.1"),
    ("rng python word", _set("rng", "python", 1, 0, 2**32), "header.rng.python.1.0"),
    ("rng python position", _set("rng", "python", 1, 624, 625), "position 625"),
    ("rng python version", _set("rng", "python", 0, 2), "header.rng.python.0"),
    ("rng numpy", lambda h: h["rng"]["numpy"]["keys"].pop(), "header.rng.numpy.keys"),
    ("rng numpy pos", _set("rng", "numpy", "pos", 625), "header.rng.numpy.pos"),
    ("rng numpy gauss", _set("rng", "numpy", "has_gauss", 2), "header.rng.numpy.has_gauss"),
    ("rng torch", _set("rng", "torch", "###"), "header.rng.torch"),
    ("rng torch text", _set("rng", "torch", "é"), "not base64"),
]


@pytest.mark.parametrize(
    ("edit", "expected"), [case[1:] for case in BAD_HEADERS], ids=[case[0] for case in BAD_HEADERS]
)
def test_bad_header_is_refused_by_name(commit: Commit, edit: Callable[[dict[str, Any]], Any], expected: str) -> None:
    header = header_json(commit.manifest)
    Manifest.decode(assemble(header, commit.manifest.pages), "x")  # good before the edit
    edit(header)
    assert expected in refusal(assemble(header, commit.manifest.pages))


def test_infinity_spelt_as_a_number_is_refused(commit: Commit) -> None:
    for place, where in (("12345", "header.data"), ("-0.25", "header.rng.numpy.cached_gaussian")):
        text = json.dumps(header_json(commit.manifest)).replace(place, "1e999", 1).encode()
        assert b"1e999" in text
        assert where in refusal(assemble(text, commit.manifest.pages))


def _first(pages: np.ndarray, kind: Kind, *, written: bool = True) -> int:
    return int(np.flatnonzero((pages["kind"] == kind) & ((pages["file"] != NONE) == written))[0])


BAD_RECORDS: list[tuple[str, Kind, bool, dict[str, int], str]] = [
    ("reserved", Kind.MASTER, True, {"reserved": 1}, "with reserved 1"),
    ("bytes", Kind.MASTER, True, {"bytes": 1}, "with bytes 1"),
    ("kind unknown", Kind.MASTER, True, {"kind": 6}, "with kind 6"),
    ("kind grad", Kind.MASTER, True, {"kind": 1}, "with kind 1"),
    ("kind high", Kind.MASTER, True, {"kind": 255}, "with kind 255"),
    ("dtype unknown", Kind.MASTER, True, {"dtype": 3}, "with dtype 3"),
    ("dtype of master", Kind.MASTER, True, {"dtype": 1}, "with dtype 1"),
    ("dtype of param", Kind.PARAM, True, {"dtype": 0}, "with dtype 0"),
    ("dtype of buffer", Kind.BUFFER, True, {"dtype": 0}, "with dtype 0"),
    ("unit", Kind.MASTER, True, {"unit": 3}, "with unit 3"),
    ("unit none", Kind.MASTER, True, {"unit": NONE}, f"with unit {NONE}"),
    ("unit of buffer", Kind.BUFFER, True, {"unit": 0}, "with unit 0"),
    ("count 0", Kind.MASTER, True, {"count": 0}, "with count 0"),
    ("count large", Kind.MASTER, True, {"count": PAGE_BYTES // 4 + 1}, f"with count {PAGE_BYTES // 4 + 1}"),
    ("count huge", Kind.MASTER, True, {"count": 2**62}, f"with count {2**62}"),
    ("start", Kind.MASTER, True, {"start": 2**40}, f"with start {2**40}"),
    ("start wraps", Kind.MASTER, True, {"start": 2**64 - 1}, f"with start {2**64 - 1}"),
    ("start of buffer", Kind.BUFFER, True, {"start": 2**64 - 8, "count": 16}, f"with start {2**64 - 8}"),
    ("file", Kind.MASTER, True, {"file": 2}, "with file 2"),
    ("slot", Kind.MASTER, True, {"slot": 2**31}, f"with slot {2**31}"),
    ("absent with slot", Kind.EXP_AVG, False, {"slot": 1}, "with slot 1"),
    ("absent with crc", Kind.EXP_AVG, False, {"crc": 1}, "with crc 1"),
]


@pytest.mark.parametrize(
    ("kind", "written", "change", "expected"), [case[1:] for case in BAD_RECORDS], ids=[case[0] for case in BAD_RECORDS]
)
def test_bad_record_is_refused_by_name(kind: Kind, written: bool, change: dict[str, int], expected: str) -> None:
    commit = make_commit(buffers=BUFFERS, unwritten=0.5)
    pages = commit.manifest.pages.copy()
    index = _first(pages, kind, written=written)
    for field, value in change.items():
        pages[index][field] = value
    text = refusal(assemble(header_json(commit.manifest), pages))
    assert f"page record {index} {expected}" in text
    with pytest.raises(CheckpointError, match="page record"):  # neither is it written
        Manifest(commit.manifest.header, pages).encode()


def test_slot_beyond_the_end_of_its_file_is_refused(commit: Commit) -> None:
    header, pages = header_json(commit.manifest), commit.manifest.pages
    last = int(pages["slot"][pages["file"] == 0].max())
    header["files"][0]["slot_count"] = last + 1
    Manifest.decode(assemble(header, pages), "x")
    header["files"][0]["slot_count"] = last
    assert f"with slot {last}, expected less than the slot_count" in refusal(assemble(header, pages))


def test_states_in_a_frozen_section_are_refused(commit: Commit) -> None:
    frozen = commit.manifest.header.units[1].frozen_offset
    extra = np.append(commit.manifest.pages, np.zeros(1, PAGE_RECORD))
    extra[-1] = (1, Kind.MASTER, 0, 0, frozen, 10, NONE, 0, 0, 0, 0)
    text = refusal(assemble(header_json(commit.manifest), extra))
    assert f"page record {len(extra) - 1} with start {frozen}" in text


@pytest.mark.parametrize("kind", [Kind.MASTER, Kind.EXP_AVG, Kind.EXP_AVG_SQ, Kind.BUFFER])
def test_missing_page_is_refused(commit: Commit, kind: Kind) -> None:
    pages = commit.manifest.pages
    for index in np.flatnonzero(pages["kind"] == kind):
        text = refusal(assemble(header_json(commit.manifest), np.delete(pages, index)))
        assert "elements of" in text or "bytes of the buffer" in text


def test_missing_page_of_a_frozen_parameter_is_refused_and_of_a_trainable_one_is_not(commit: Commit) -> None:
    pages = commit.manifest.pages
    (frozen,) = {piece.record for piece in commit.manifest.find("head.weight", Kind.PARAM)}
    text = refusal(assemble(header_json(commit.manifest), np.delete(pages, frozen)))
    assert "35 elements of 'head.weight' without PARAM pages" in text
    (trainable,) = {piece.record for piece in commit.manifest.find("embed.weight", Kind.PARAM)}
    Manifest.decode(assemble(header_json(commit.manifest), np.delete(pages, trainable)), "x")


def test_page_one_element_short_is_refused(commit: Commit) -> None:
    pages = commit.manifest.pages.copy()
    piece = commit.manifest.find("h.0.weight", Kind.MASTER)[0]
    pages[piece.record]["count"] -= 1
    text = refusal(assemble(header_json(commit.manifest), pages))
    assert "1 elements of 'h.0.weight' without MASTER pages" in text


def test_moments_follow_the_optimizer() -> None:
    for optimizer in ("sgd", "lion"):
        manifest = make_commit(optimizer=optimizer).manifest
        assert not manifest.find("h.0.weight", Kind.EXP_AVG_SQ)
        header = header_json(manifest)
        header["optimizer"]["type"] = "adamw"
        assert "without EXP_AVG_SQ pages" in refusal(assemble(header, manifest.pages))
        header = header_json(make_commit().manifest)
        header["optimizer"]["type"] = optimizer
        assert "with kind 4" in refusal(assemble(header, make_commit().manifest.pages))


def test_overlapping_pages_are_refused(commit: Commit) -> None:
    pages = commit.manifest.pages
    piece = commit.manifest.find("h.0.weight", Kind.EXP_AVG)[1]
    moved = pages.copy()
    moved[piece.record]["start"] -= 1
    assert "EXP_AVG page records" in refusal(assemble(header_json(commit.manifest), moved))
    extra = np.append(pages, pages[piece.record])
    extra[-1]["file"], extra[-1]["slot"], extra[-1]["crc"] = NONE, 0, 0
    assert "that overlap" in refusal(assemble(header_json(commit.manifest), extra))


def test_slot_used_twice_is_refused(commit: Commit) -> None:
    pages = commit.manifest.pages.copy()
    first, second = _first(pages, Kind.MASTER), _first(pages, Kind.PARAM)
    pages[second]["file"], pages[second]["slot"] = pages[first]["file"], pages[first]["slot"]
    low, high = sorted((first, second))
    text = refusal(assemble(header_json(commit.manifest), pages))
    assert f"page records {low} and {high} in the same slot" in text


def test_page_across_two_sections_is_refused() -> None:
    """In fp32 a frozen section starts on a page of its own; the gap before it belongs to nobody."""
    commit = make_commit({"u": {"u.w": ((100,), True), "u.f": ((100,), False)}})
    pages = commit.manifest.pages.copy()
    index = next(i for i, page in enumerate(pages) if page["kind"] == Kind.PARAM and page["start"] == 0)
    pages[index]["count"] = 129
    assert f"page record {index} with start 0" in refusal(assemble(header_json(commit.manifest), pages))


def test_small_file_cannot_ask_for_much_memory(commit: Commit) -> None:
    """Sections, gaps and buffers are bounded by what pages hold; see also the cases of test_bad_header."""
    header = header_json(commit.manifest)
    header["units"] = [
        {
            "name": "u",
            "params": [{"name": "p", "shape": [2**40], "offset": 0, "trainable": True, "owners": []}],
            "trainable_elements": 2**40,
            "frozen_offset": 2**40,
            "frozen_elements": 0,
        }
    ]
    header["optimizer"]["steps"], header["optimizer"]["groups"], header["buffers"] = {}, [], []
    header["buffer_bytes"] = 0
    assert "1099511627776 elements of 'p' without MASTER pages" in refusal(assemble(header, b""))


def test_empty_model_is_valid() -> None:
    manifest = make_commit({}).manifest
    assert len(Manifest.decode(manifest.encode(), "x").pages) == 0


def test_mutants_decode_or_are_refused() -> None:
    valid, refused = check_mutations(2000)
    assert valid > 50, "mutants are too coarse to reach the checks"
    assert refused > 500


def test_half_a_million_pages_decode_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectorised, that is; the bound is generous, but loops over records in Python would take longer."""
    import time

    per_unit, elements = 1000, PAGE_BYTES // 4
    unit_count = 125
    layouts = make_layouts(
        {f"u{u}": {f"u{u}.p{p}": ((per_unit * elements // 10,), True) for p in range(10)} for u in range(unit_count)},
        PAGE_BYTES // 2,
    )
    header = header_json(make_commit({}).manifest)
    from angelptm.checkpoint.header import units_from_layouts

    header["units"] = [unit.model_dump() for unit in units_from_layouts(layouts)]
    count = per_unit * unit_count
    header["files"] = [{"name": "a", "slot_count": 4 * count}]
    pages = np.zeros(4 * count, PAGE_RECORD)
    pages["kind"] = np.repeat([0, 2, 3, 4], count)
    pages["dtype"][:count] = 1
    pages["unit"] = np.tile(np.repeat(np.arange(unit_count), per_unit), 4)
    pages["start"] = np.tile(np.arange(per_unit) * elements, 4 * unit_count)
    pages["count"] = elements
    pages["slot"] = np.random.default_rng(0).permutation(4 * count)
    monkeypatch.setattr("angelptm.checkpoint.format.crc32c", lambda *_: 0)
    content = Manifest(Header.model_validate(header), pages).encode()
    started = time.process_time()
    manifest = Manifest.decode(content, "x")
    assert time.process_time() - started < 3
    assert len(manifest.find("u3.p3", Kind.MASTER)) == 100
