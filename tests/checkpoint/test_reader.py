"""Pages are read where the manifest says, checked, and named when they are bad."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import io_engine
from angelptm.checkpoint import reader as reader_module
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import NONE, Kind, content_bytes, moment_kinds
from angelptm.errors import CheckpointError, CorruptPageError
from io_engine import FaultPlan, IoError
from tests.checkpoint.builder import PAGE_BYTES, Commit, make_commit

BUFFERS: dict[str, Any] = {
    "ids": ("int64", (3,)),
    "mask": ("bool", (100, 700)),
    "none": ("int8", (0,)),
    "x": ("int8", ()),
}
_ITEMSIZE = {Kind.PARAM: 2, Kind.BUFFER: 1}


@pytest.fixture
def commit() -> Commit:
    return make_commit(buffers=BUFFERS, unwritten=0.3)


@pytest.fixture
def reader(commit: Commit, tmp_path: Path) -> Iterator[CommitReader]:
    commit.write_files(tmp_path)
    with CommitReader(commit.manifest, [tmp_path], depth=3) as reader:
        yield reader


def contents(commit: Commit, record: int) -> bytes:
    size = int(content_bytes(commit.manifest.pages)[record])
    return commit.contents.get(record, bytes(size))[:size]


def expected_values(commit: Commit, unit: int, offset: int, numel: int, kind: Kind, itemsize: int) -> bytes:
    """The bytes of a parameter, from the records alone and without the code under test."""
    space = bytearray((offset + numel) * itemsize + PAGE_BYTES)
    for record, page in enumerate(commit.manifest.pages):
        if page["unit"] == unit and page["kind"] == kind:
            start = int(page["start"]) * itemsize
            space[start : start + int(page["count"]) * itemsize] = contents(commit, record)
    return bytes(space[offset * itemsize : (offset + numel) * itemsize])


def spoil(commit: Commit, folder: Path, record: int, offset: int = 0) -> Path:
    """Flips a bit of a page on disk."""
    page = commit.manifest.pages[record]
    path = folder / commit.manifest.header.files[int(page["file"])].name
    with path.open("r+b") as file:
        file.seek(int(page["slot"]) * PAGE_BYTES + offset)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    return path


def written(commit: Commit) -> list[int]:
    return np.flatnonzero(commit.manifest.pages["file"] != NONE).tolist()


def test_pages_come_in_the_order_asked_for(commit: Commit, reader: CommitReader) -> None:
    count = len(commit.manifest.pages)
    for order in (list(range(count)), list(range(count))[::-1], [5, 5, 5, 5, 5], [], [0]):
        seen = [(index, bytes(content)) for index, content in reader.pages(order)]
        assert seen == [(index, contents(commit, index)) for index in order]
    assert any(page["file"] == NONE for page in commit.manifest.pages), "unwritten pages take part"


def test_memory_of_a_stream_is_bounded_by_its_depth(
    commit: Commit, reader: CommitReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    class Counted(io_engine.AlignedBuffer):
        def __new__(cls, bytes: int) -> Counted:
            made.append(bytes)
            return super().__new__(cls, bytes)  # type: ignore[return-value]

    monkeypatch.setattr(reader_module, "AlignedBuffer", Counted)
    for _ in range(5):
        for _ in reader.pages(written(commit)):
            pass
        next(reader.pages(written(commit)))  # left in the middle
    assert made == [PAGE_BYTES] * 3
    outer, inner = reader.pages(written(commit)), reader.pages(written(commit)[::-1])
    for (a, first), (b, second) in zip(outer, inner):
        assert bytes(first) == contents(commit, a)
        assert bytes(second) == contents(commit, b)
    assert made == [PAGE_BYTES] * 6, "two streams at once have buffers of their own"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_parameters_are_read_whole_and_in_ranges(tmp_path: Path, precision: str, optimizer: str) -> None:
    commit = make_commit(precision=precision, optimizer=optimizer, unwritten=0.3)
    commit.write_files(tmp_path)
    with CommitReader(commit.manifest, [tmp_path]) as reader:
        for index, unit in enumerate(commit.manifest.header.units):
            for param in unit.params:
                kinds = (Kind.PARAM, Kind.MASTER, *moment_kinds(optimizer)) if param.trainable else (Kind.PARAM,)
                for kind in kinds:
                    itemsize = 2 if kind is Kind.PARAM and precision == "bf16" else 4
                    raw = expected_values(commit, index, param.offset, param.numel, kind, itemsize)
                    values = reader.read(param.name, kind)
                    assert values.dtype == (np.uint16 if itemsize == 2 else np.float32)
                    assert values.tobytes() == raw
                    for start, count in itertools.product((0, 1, 16383, 32768, 38699), (0, 1, 16384, 16386)):
                        if start + count <= param.numel:
                            part = reader.read(param.name, kind, start, count)
                            assert part.tobytes() == raw[start * itemsize : (start + count) * itemsize]


def test_buffers_are_read_with_dtype_and_shape(commit: Commit, reader: CommitReader) -> None:
    space = bytearray(commit.manifest.header.buffer_bytes)
    for record, page in enumerate(commit.manifest.pages):
        if page["kind"] == Kind.BUFFER:
            space[int(page["start"]) : int(page["start"]) + int(page["count"])] = contents(commit, record)
    found = reader.buffers()
    assert {name: (dtype, shape) for name, (dtype, shape, _) in found.items()} == BUFFERS
    for buffer in commit.manifest.header.buffers:
        assert found[buffer.name][2] == bytes(space[buffer.offset : buffer.offset + buffer.bytes])
    assert len(found["mask"][2]) == 70000, "more than a page"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    commit = make_commit(trainable_params=False)
    commit.write_files(tmp_path)
    with CommitReader(commit.manifest, [tmp_path]) as reader:
        for name, kind, start, count, expected in (
            ("absent", Kind.MASTER, 0, None, "no MASTER of absent"),
            ("h.0.bias", Kind.BUFFER, 0, None, "no BUFFER of h.0.bias"),
            ("h.0.bias", Kind.PARAM, 0, None, "for 0 of 129 elements.*MASTER has its values"),
            ("head.weight", Kind.MASTER, 0, None, "for 0 of 35 elements"),
            ("head.weight", Kind.PARAM, 30, 6, r"head.weight\[30:36\].*35 elements"),
            ("head.weight", Kind.PARAM, -1, 6, "a range in 35 elements"),
            ("head.weight", Kind.PARAM, 36, None, "a range in 35 elements"),
        ):
            with pytest.raises(CheckpointError, match=expected):
                reader.read(name, kind, start, count)


# --- bad pages -------------------------------------------------------------------------------------------------------


def test_corrupt_page_is_named(commit: Commit, reader: CommitReader, tmp_path: Path) -> None:
    piece = commit.manifest.find("h.0.weight", Kind.MASTER)[1]
    path = spoil(commit, tmp_path, piece.record, 5)
    page = commit.manifest.pages[piece.record]
    with pytest.raises(CorruptPageError) as caught:
        reader.read("h.0.weight", Kind.MASTER)
    error = caught.value
    assert (error.page, error.path, error.offset) == (piece.record, str(path), int(page["slot"]) * PAGE_BYTES)
    assert error.expected_crc == page["crc"] != error.found_crc
    assert "MASTER of h.0.weight[16384:32768]" in str(error)
    reader.read("h.0.weight", Kind.MASTER, 0, 16384)  # the pages beside it are good
    assert len(list(reader.pages(written(commit)[:1]))) == 1


def test_padding_of_a_page_is_checked_too(commit: Commit, reader: CommitReader, tmp_path: Path) -> None:
    record = next(i for i in written(commit) if len(contents(commit, i)) % 4096)
    spoil(commit, tmp_path, record, len(contents(commit, record)))
    assert [error.page for error in reader.verify()] == [record]  # type: ignore[union-attr]


def test_verify_lists_every_bad_page_and_only_those(commit: Commit, reader: CommitReader, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert reader.verify(lambda done, total: calls.append((done, total))) == []
    total = len(written(commit))
    assert calls == [(done, total) for done in range(1, total + 1)]
    bad = written(commit)[::3]
    for record in bad:
        spoil(commit, tmp_path, record, len(contents(commit, record)) // 2)
    errors = reader.verify()
    assert sorted(error.page for error in errors) == bad  # type: ignore[union-attr]
    assert all(isinstance(error, CorruptPageError) for error in errors)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a FaultPlan that stands in front of the drive."""
    options: dict[str, Any] = {}
    real = io_engine.open
    monkeypatch.setattr(io_engine, "open", lambda *a, **k: real(*a, **k, faults=FaultPlan(**options), close_seconds=5))
    return options


def test_unreadable_page_is_listed_and_does_not_end_a_verification(
    commit: Commit, tmp_path: Path, faulty: dict[str, Any]
) -> None:
    commit.write_files(tmp_path)
    faulty.update(seed=1, eio=0.4)
    with CommitReader(commit.manifest, [tmp_path]) as reader:
        errors = reader.verify()
        assert 0 < len(errors) < len(written(commit))
        assert all(isinstance(error, IoError) and error.errno == errno.EIO for error in errors)
        with pytest.raises(IoError):
            list(reader.pages(written(commit)))


def test_short_and_reordered_reads_do_no_harm(commit: Commit, tmp_path: Path, faulty: dict[str, Any]) -> None:
    commit.write_files(tmp_path)
    faulty.update(seed=1, short_transfer=0.4, eintr=0.2, reorder=True)
    with CommitReader(commit.manifest, [tmp_path]) as reader:
        seen = [(index, bytes(content)) for index, content in reader.pages(written(commit))]
    assert seen == [(index, contents(commit, index)) for index in written(commit)]


def test_deadline_is_an_error_and_the_late_buffer_is_not_used_again(
    commit: Commit, tmp_path: Path, faulty: dict[str, Any]
) -> None:
    commit.write_files(tmp_path)
    faulty.update(delay=1.0, delay_seconds=0.5)
    started = time.monotonic()
    with CommitReader(commit.manifest, [tmp_path], deadline_seconds=0.05) as reader:
        with pytest.raises(IoError) as caught:
            reader.verify()
        assert caught.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - started < 0.4, "it waits for one page, not for all that were asked for"
        assert not reader._buffers
    with CommitReader(commit.manifest, [tmp_path], deadline_seconds=20) as reader:
        assert reader.verify() == []


# --- files -----------------------------------------------------------------------------------------------------------


def refusal(manifest: Manifest, *folders: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        CommitReader(manifest, folders)
    return str(caught.value)


def test_files_are_found_in_any_of_the_folders(commit: Commit, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders[:2]:
        folder.mkdir()
    commit.write_files(folders[0])
    (folders[0] / "states-1.pages").rename(folders[1] / "states-1.pages")
    with CommitReader(commit.manifest, folders[::-1]) as reader:
        assert reader.verify() == []
        assert list(reader.paths.values()) == [folders[0] / "states-0.pages", folders[1] / "states-1.pages"]
    text = refusal(commit.manifest, folders[0], folders[2])
    assert "states-1.pages: found no slot file" in text
    assert f"{folders[0]}: missing; {folders[2]}: missing" in text
    assert "no folder to look in" in refusal(commit.manifest)


def test_file_cut_short_is_refused_at_its_last_used_slot(commit: Commit, tmp_path: Path) -> None:
    commit.write_files(tmp_path)
    pages = commit.manifest.pages
    last = int(pages["slot"][pages["file"] == 1].max())
    path = tmp_path / "states-1.pages"
    os.truncate(path, (last + 1) * PAGE_BYTES)
    CommitReader(commit.manifest, [tmp_path]).close()
    os.truncate(path, (last + 1) * PAGE_BYTES - 1)
    text = refusal(commit.manifest, tmp_path)
    assert f"cut short, {(last + 1) * PAGE_BYTES - 1} bytes" in text
    assert f"a regular file of {(last + 1) * PAGE_BYTES} bytes or more" in text


def test_file_that_no_page_uses_may_be_missing(tmp_path: Path) -> None:
    commit = make_commit({"a": {"a.w": ((9, 9), True)}}, optimizer="sgd", unwritten=1.0, trainable_params=False)
    (record,) = written(commit)
    commit.write_files(tmp_path)
    (tmp_path / f"states-{1 - int(commit.manifest.pages[record]['file'])}.pages").unlink()
    with CommitReader(commit.manifest, [tmp_path]) as reader:
        assert reader.verify() == []
        assert not reader.read("a.w", Kind.EXP_AVG).any()


def test_commit_without_any_written_page_needs_no_file() -> None:
    with CommitReader(make_commit({}).manifest, []) as reader:
        assert reader.verify() == []
        assert list(reader.pages([])) == []


def test_link_or_pipe_in_place_of_a_file_is_refused(commit: Commit, tmp_path: Path) -> None:
    real, folder = tmp_path / "real", tmp_path / "folder"
    real.mkdir()
    folder.mkdir()
    commit.write_files(real)
    commit.write_files(folder)
    (folder / "states-0.pages").unlink()
    (folder / "states-0.pages").symlink_to(real / "states-0.pages")
    assert "a symbolic link" in refusal(commit.manifest, folder)
    with CommitReader(commit.manifest, [folder, real]) as reader:
        assert reader.paths[0] == real / "states-0.pages"
    (folder / "states-0.pages").unlink()
    os.mkfifo(folder / "states-0.pages")
    assert "no regular file" in refusal(commit.manifest, folder)


def test_file_replaced_by_a_link_while_it_is_opened_is_refused(
    commit: Commit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit.write_files(tmp_path)
    target = tmp_path / "target"
    real = io_engine.open_file

    def swap(path: Path, **options: Any) -> Any:
        path.rename(target)
        path.symlink_to(target)
        return real(path, **options)

    monkeypatch.setattr(io_engine, "open_file", swap)
    assert "replaced while it was opened" in refusal(commit.manifest, tmp_path)
