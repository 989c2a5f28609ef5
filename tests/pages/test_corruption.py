"""Bytes that changed on the disk are met as CorruptPageError by whoever reads them; nothing is written after that."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import angelptm_native as native
import numpy as np
import pytest
import torch

from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import NONE, Kind, content_bytes, extent_bytes
from angelptm.engine import Engine
from angelptm.errors import AngelPTMError, CheckpointError, CorruptPageError

from ..engine.models import GPT2
from ..engine.training import batches_of, tight_config, train, train_step
from ..update.harness import DEADLINE, SSD, Spans, hypers_of
from .pool import PAGE, content, flip, load, make_store, slot_of, view, write


@contextmanager
def flipped(path: Path, offset: int, mask: int) -> Iterator[None]:
    """One byte of a file is another inside the block."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        former = os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes([former[0] ^ mask]), offset)
        yield
        os.pwrite(descriptor, former, offset)
    finally:
        os.close(descriptor)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("**/*.pages"))}


def expect_facts(error: CorruptPageError, page: int, path: Path, offset: int, crc: int) -> None:
    assert (error.page, error.path, error.offset, error.expected_crc) == (page, str(path), offset, crc)
    with path.open("rb", buffering=0) as file:
        assert any(
            error.found_crc == native.crc32c(os.pread(file.fileno(), size, offset)) != crc
            for size in range(4096, PAGE + 1, 4096)
        )
    assert f"{error.found_crc:08x}" in str(error)
    assert f"{crc:08x}" in str(error)


def test_every_flip_is_met_by_a_load(tmp_path: Path, backend: native.Backend) -> None:
    """300 flips of each kind of byte: in the content and in the rest of its last sector, which travels with it."""
    sizes = [1, 100, 4096, 5000, 33333, PAGE - 1, PAGE]
    store = make_store(tmp_path, slots=(5, 4), backend=backend, keep_files=True)
    pages = [store.add_page(native.Home.SSD, size) for size in sizes]
    for page, size in zip(pages, sizes, strict=True):
        write(store, page, content(page, size))
    store.mover.drain()
    rng = random.Random(1)
    in_padding = 0
    for _ in range(300):
        page = rng.choice(pages)
        file, start, crc = slot_of(store, page)
        at = rng.randrange(-(-sizes[page] // 4096) * 4096)
        in_padding += at >= sizes[page]
        path = tmp_path / f"{file}.pages"
        with flipped(path, start + at, rng.randrange(1, 256)):
            with pytest.raises(CorruptPageError) as caught:
                load(store, [page])
            expect_facts(caught.value, page, path, start, crc)
    assert in_padding > 30
    for page, size in zip(pages, sizes, strict=True):
        assert np.array_equal(load(store, [page])[0], content(page, size))
    assert store.host_used_count == 0
    assert store.slot_used_count == len(pages)


def test_bytes_that_do_not_travel_do_not_matter(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_files=True)
    page = store.add_page(native.Home.SSD, 5000)
    write(store, page, content(1, 5000))
    store.mover.drain()
    file, start, _ = slot_of(store, page)
    flip(tmp_path / f"{file}.pages", start + 8192)
    assert np.array_equal(load(store, [page])[0], content(1, 5000))
    write(store, page, content(2, 5000))
    store.mover.drain()


def test_nothing_is_written_after_a_corrupt_page(tmp_path: Path, backend: native.Backend) -> None:
    store = make_store(tmp_path, frames=12, backend=backend, keep_files=True)
    saver = store.make_saver()
    pages = [store.add_page(native.Home.SSD, PAGE) for _ in range(4)]
    host = store.add_page(native.Home.HOST, PAGE)
    for page in pages:
        write(store, page, content(page, PAGE))
    view(store.home_address(host), PAGE)[:] = content(9, PAGE)
    store.publish_in_place(host)
    store.mover.drain()
    file, start, crc = slot_of(store, pages[2])
    flip(tmp_path / "0.pages", start + 12345)
    frames, slots, before = store.host_used_count, store.slot_used_count, hashes(tmp_path)
    for _ in range(3):
        with pytest.raises(CorruptPageError) as caught:
            load(store, pages)  # the others are under way with it
        expect_facts(caught.value, pages[2], tmp_path / f"{file}.pages", start, crc)
        data = content(1, PAGE)
        for attempt in (
            lambda: write(store, pages[0], content(5, PAGE)),
            lambda: write(store, pages[2], content(5, PAGE)),
            lambda: saver.save([host]),
            lambda data=data: saver.save_bytes(data.ctypes.data, PAGE),
            saver.flush,  # it is what a commit waits for before it appears
        ):
            with pytest.raises(native.StoppedError, match=rf"page {pages[2]} in {tmp_path}/0.pages at offset {start}"):
                attempt()
        store.mover.drain()
        assert (store.host_used_count, store.slot_used_count) == (frames, slots)
    assert hashes(tmp_path) == before
    for page in (0, 1, 3):
        assert np.array_equal(load(store, [pages[page]])[0], content(pages[page], PAGE))


def test_write_that_meets_the_corrupt_page_of_a_load_is_refused(tmp_path: Path) -> None:
    """A write waits for the reads of its page under way: what they find stops it too."""
    slow = native.FaultPlan(delay=1.0, delay_seconds=0.02)
    store = make_store(tmp_path, keep_files=True, faults=slow)
    page = store.add_page(native.Home.SSD, PAGE)
    write(store, page, content(1, PAGE))
    store.mover.drain()
    _, start, _ = slot_of(store, page)
    flip(tmp_path / "0.pages", start)
    store.mover.begin_load([page])
    with pytest.raises(native.StoppedError):
        write(store, page, content(2, PAGE))
    with pytest.raises(CorruptPageError):
        store.mover.next_loaded()
    assert (store.host_used_count, store.slot_used_count) == (0, 1)


KINDS = ["MASTER", "EXP_AVG", "EXP_AVG_SQ", "GRAD", "PARAM"]


def pages_of(spans: Spans, index: int, kind: str) -> list[int]:
    span = spans.spans[index]
    return {"GRAD": span.grad, "PARAM": [span.param]}.get(kind) or span.states[KINDS.index(kind)]  # type: ignore[return-value]


def put_grad(spans: Spans, index: int) -> None:
    spans.put(spans.spans[index].grad, np.ones(spans.spans[index].elements, np.float32))


def update(spans: Spans, index: int) -> native.Ticket:
    assert spans.updater is not None
    done, _ = spans.updater.submit(
        "x", [(index, spans.spans[index].segments)], hypers_of(native.Rule.ADAMW, spans.step_count + 1)
    )
    return done


@pytest.mark.parametrize("kind", KINDS)
def test_update_and_load_meet_the_corrupt_page_of_each_kind(tmp_path: Path, backend: native.Backend, kind: str) -> None:
    spans = Spans(tmp_path, [(SSD, SSD, SSD)] * 3, threads=2, backend=backend, keep_files=True)
    spans.submit([0, 1, 2]).wait(DEADLINE)
    for index in range(3):
        put_grad(spans, index)
    spans.store.mover.drain()
    page = pages_of(spans, 1, kind)[0]
    file, start, crc = slot_of(spans.store, page)
    path = tmp_path / f"{file}.pages"
    flip(path, start + 777)
    before, used = hashes(tmp_path), spans.store.slot_used_count
    # An update does not read PARAM.
    meet = (lambda: load(spans.store, [page])) if kind == "PARAM" else (lambda: update(spans, 1).wait(DEADLINE))
    with pytest.raises(CorruptPageError) as caught:
        meet()
    expect_facts(caught.value, page, path, start, crc)
    for index in (0, 1, 2):
        with pytest.raises((CorruptPageError, native.StoppedError), match=f"page {page} "):
            update(spans, index).wait(DEADLINE)
    with pytest.raises(native.StoppedError, match=f"page {page} "):
        put_grad(spans, 0)
    with pytest.raises(CorruptPageError):
        load(spans.store, [page])
    assert hashes(tmp_path) == before
    assert spans.store.slot_used_count == used
    spans.close()


# Through an engine.

MIXED = {"param": "ssd", "grad": "ssd", "states": "ssd"}


def committing_engine(folder: Path, **keys: Any) -> Engine:
    model = GPT2.model()
    config = tight_config(model, folder, checkpoint={"folder": str(folder / "commits")}, **keys)
    return Engine(model, config)


def file_of(engine: Engine, file: int) -> Path:
    assert engine._commits is not None
    return Path(engine.config.tiers.ssd[0].path) / engine._commits.durable.files[file]


def corrupt(engine: Engine, kind: str) -> tuple[int, str]:
    """Flips a byte of some page of a kind; the page, and what it holds."""
    engine._store.mover.drain()
    for unit in engine._catalogue.by_unit:
        for one in unit:
            if one.kind == kind and one.page is not None and engine._store.page_written(one.page):
                file, start, _ = slot_of(engine._store, one.page)
                flip(file_of(engine, file), start + 5)
                return one.page, engine._catalogue.name(one.page)
    raise AssertionError(f"no {kind} page is written")


@pytest.mark.unsanitized
@pytest.mark.parametrize("kind", KINDS)
def test_training_stops_with_the_name_of_what_is_corrupt(tmp_path: Path, kind: str) -> None:
    engine = committing_engine(tmp_path, gradient_accumulation_steps=2)

    def train_through(batches: list[dict[str, torch.Tensor]]) -> None:
        train_step(engine, batches)
        engine.drain()

    train(engine, GPT2, 1)
    engine.save_checkpoint(wait=True)
    first, second = batches_of(GPT2, engine.config, 1)
    train_through([first])
    page, name = corrupt(engine, kind)
    with pytest.raises(CorruptPageError) as caught:
        train_through([second])
    assert (caught.value.page, caught.value.parameter) == (page, name)
    assert re.fullmatch(rf"{kind} of \S+\[\d+:\d+\]( and \d+ more)?", name)
    assert "angelptm checkpoint verify" in str(caught.value)
    before = hashes(tmp_path)
    for _ in range(2):
        with pytest.raises((AngelPTMError, native.StoppedError)):
            train_through(batches_of(GPT2, engine.config, 3))
    assert hashes(tmp_path) == before
    with contextlib.suppress(AngelPTMError, native.StoppedError):
        engine.close()


@pytest.mark.unsanitized
def test_no_commit_is_made_of_a_store_with_a_corrupt_page(tmp_path: Path) -> None:
    """With ``keep: 1`` it would take the place of the last good one."""
    engine = committing_engine(tmp_path, placement={"param": "host", "grad": "host", "states": "ssd"})
    train(engine, GPT2, 1)
    engine.save_checkpoint(wait=True)
    train(engine, GPT2, 1, first=1)
    engine.drain()
    page, name = corrupt(engine, "MASTER")
    with pytest.raises(CorruptPageError, match=re.escape(name)):
        dict(engine.state_dict(master=True))
    with pytest.raises(native.StoppedError, match=f"page {page} "):
        engine.save_checkpoint(wait=True)
    with CheckpointFolder.read(tmp_path / "commits") as folder:
        assert folder.commits() == [1]
    used = engine._store.slot_used_count
    with pytest.raises(native.StoppedError):
        engine.save_checkpoint(wait=True)
    assert engine._store.slot_used_count == used
    engine.close()


@pytest.fixture(scope="module")
def commit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A commit of a real run: its checkpoint folder and the folder of its slot files."""
    folder = tmp_path_factory.mktemp("run")
    engine = committing_engine(folder, placement={"param": "host", "grad": "host", "states": "ssd"})
    train(engine, GPT2, 2)
    engine.save_checkpoint(wait=True)
    engine.close()
    return folder / "commits", folder / "pages"


@pytest.mark.unsanitized
def test_every_flip_in_a_commit_is_met(commit: tuple[Path, Path]) -> None:
    rng = random.Random(2)
    with CheckpointFolder.read(commit[0]) as folder:
        manifest = folder.load()
    written = np.flatnonzero(manifest.pages["file"] != NONE).tolist()
    contents = content_bytes(manifest.pages)
    kinds = set()
    with CommitReader(manifest, list(commit)) as reader:
        assert reader.verify() == []
        for trial in range(500):
            record = written[trial % len(written)]
            page = manifest.pages[record]
            kinds.add(Kind(int(page["kind"])))
            start = int(page["slot"]) * manifest.header.page_bytes
            at = rng.randrange(extent_bytes(int(contents[record])))
            with flipped(reader.paths[int(page["file"])], start + at, rng.randrange(1, 256)):
                with pytest.raises(CorruptPageError) as caught:
                    for _ in reader.pages([record]):
                        pass
                assert (caught.value.page, caught.value.offset) == (record, start)
                assert caught.value.parameter == manifest.describe(record)
                if trial % 50 == 0:
                    (error,) = reader.verify()
                    assert isinstance(error, CorruptPageError)
                    assert error.page == record
        assert reader.verify() == []
    assert {Kind.MASTER, Kind.EXP_AVG, Kind.EXP_AVG_SQ} <= kinds


@pytest.mark.unsanitized
def test_every_flip_in_the_manifest_of_a_run_is_met(commit: tuple[Path, Path]) -> None:
    rng = random.Random(3)
    with CheckpointFolder.read(commit[0]) as folder:
        path = folder.manifest_path(folder.commits()[-1])
    whole = path.read_bytes()
    Manifest.decode(whole, str(path))
    for _ in range(500):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            Manifest.decode(bytes(changed), str(path))
