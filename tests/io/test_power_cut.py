"""Killing the process at a chosen write, and what a power cut leaves of writes and names that were not flushed."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import angelptm_native as native
import pytest

from io_engine import AlignedBuffer, IoError
from io_engine.metadata_journal import MetadataCut
from io_engine.power_cut import SECTOR_BYTES, MetadataJournal, PowerCut, apply_power_cut

ROOT = Path(__file__).parents[2]
KIB = 1 << 10
BACKENDS = ("URING", "THREADS")

# Says what it is about to do and what it has done, one line each, so that the parent knows how far it came.
CHILD = """
import os, random, sys
import angelptm_native as native
from io_engine import AlignedBuffer

path, backend, seed, kill_at, journal, how = sys.argv[1:]
KIB, generator = 1 << 10, random.Random(int(seed))
file = native.File(path, create=True, allocate_bytes=64 * KIB)
crash = native.CrashPlan(seed=int(seed), kill_at=int(kill_at), journal=journal)
plan = native.FaultPlan(crash=crash)
engine = native.Engine([file], 8, backend=getattr(native.Backend, backend), faults=plan)
buffer = AlignedBuffer(64 * KIB)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

if how == "batch":
    buffer[:] = b"".join(bytes([i + 1]) * 4 * KIB for i in range(16))
    engine.submit([(i, True, 0, i * 4 * KIB, buffer.address + i * 4 * KIB, 4 * KIB) for i in range(8)])
    engine.reap(8, 20.0)
for value in range(1, 41):
    if how == "row" and value % 4 == 0 or how == "random" and generator.random() < 0.15:
        say("sync")
        engine.sync(20.0)
    else:
        first = value % 4 if how == "row" else generator.randrange(12)
        count = 4 if how == "row" else generator.randint(1, 4)
        say("write", first, count, value)
        buffer[: count * 4 * KIB] = bytes([value]) * count * 4 * KIB
        engine.submit([(value, True, 0, first * 4 * KIB, buffer.address, count * 4 * KIB)])
        (_, error), = engine.reap(1, 20.0)
        assert error is None
    say("done", crash.count)
"""


def run_child(folder: Path, backend: str, seed: int, kill_at: int, *, journal: str = "", how: str = "row") -> list[str]:
    """Its lines, after it was killed as planned."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, folder / "file", backend, str(seed), str(kill_at), journal, how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    return finished.stdout.splitlines()


@pytest.mark.parametrize("backend", BACKENDS)
def test_process_is_killed_at_exactly_the_planned_write(disk_folder: Path, backend: str) -> None:
    moments = set()
    for kill_at, seed in itertools.product((1, 2, 7), (0, 1, 2)):
        (disk_folder / "file").unlink(missing_ok=True)
        lines = run_child(disk_folder, backend, seed, kill_at)
        # What it began last is the write with that number, and it never heard of its end.
        assert lines[-1] == f"write {kill_at % 4} 4 {kill_at}"
        assert lines.count(f"done {kill_at - 1}") == (kill_at > 1)
        content = (disk_folder / "file").read_bytes()
        target = content[kill_at % 4 * 4 * KIB :][: 16 * KIB]
        new = target.count(kill_at)
        assert target[:new] == bytes([kill_at]) * new  # a first part, in whole sectors
        assert new % SECTOR_BYTES == 0
        assert not any(content.count(later) for later in range(kill_at + 1, 41))
        moments.add("before" if new == 0 else "after" if new == 16 * KIB else "in part")
    assert moments == {"before", "in part", "after"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_process_is_killed_at_a_sync(disk_folder: Path, backend: str) -> None:
    for seed in range(3):
        assert run_child(disk_folder, backend, seed, 8)[-2:] == ["done 7", "sync"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_behind_the_killing_write_in_its_batch_was_never_handed_over(disk_folder: Path, backend: str) -> None:
    for kill_at in (1, 3, 6):
        (disk_folder / "file").unlink(missing_ok=True)
        assert run_child(disk_folder, backend, 0, kill_at, how="batch") == []
        content = (disk_folder / "file").read_bytes()
        assert content[kill_at * 4 * KIB :] == bytes(64 * KIB - kill_at * 4 * KIB)


class Model:
    """What each sector may hold after a power cut: every version since the newest completed one that a sync covers."""

    def __init__(self, sectors: int) -> None:
        self.versions: list[list[tuple[int, int]]] = [[(0, 0)] for _ in range(sectors)]  # value, number of the write
        self.completed = {0}
        self.durable = {0}

    def write(self, number: int, sectors: range, value: int) -> None:
        for sector in sectors:
            self.versions[sector].append((value, number))

    def sync(self) -> None:
        self.durable |= self.completed

    def allowed(self, sector: int) -> set[int]:
        versions = self.versions[sector]
        last = max(index for index, (_, number) in enumerate(versions) if number in self.durable)
        return {value for value, _ in versions[last:]}

    def check(self, content: bytes) -> None:
        for sector, versions in enumerate(self.versions):
            (value, *others) = set(content[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES])
            assert not others, f"sector {sector} is torn in itself"
            assert value in self.allowed(sector), f"sector {sector}: {value} of {versions}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_process_and_power_cut_lose_nothing_that_was_synced(disk_folder: Path, backend: str) -> None:
    for seed in range(6):
        (disk_folder / "file").unlink(missing_ok=True)
        journal = disk_folder / "journal"
        lines = run_child(disk_folder, backend, seed, 10 + 5 * seed, journal=str(journal), how="random")
        model = Model(64 * KIB // SECTOR_BYTES)
        for number, (line, answer) in enumerate(itertools.zip_longest(lines[::2], lines[1::2])):
            verb, *numbers = line.split()
            if verb == "sync":
                # It may have finished although nobody heard of it, and its writes may be lost if it had not.
                if answer:
                    model.sync()
                continue
            first, count, value = map(int, numbers)
            model.write(number + 1, range(first * 8, (first + count) * 8), value)
            if answer:
                model.completed.add(number + 1)
        apply_power_cut(journal, seed, [disk_folder])
        assert not journal.exists()
        model.check((disk_folder / "file").read_bytes())


class Disk:
    """A small file, two engines that share one plan, and the model that knows what they did."""

    def __init__(self, folder: Path, backend: native.Backend, **faults: float) -> None:
        self.path, self.journal = folder / "file", folder / "journal"
        self.path.unlink(missing_ok=True)
        self.file = native.File(str(self.path), create=True, allocate_bytes=16 * KIB)
        self.crash = native.CrashPlan(journal=str(self.journal))
        plan = native.FaultPlan(crash=self.crash, **faults)  # type: ignore[arg-type]
        self.engines = [native.Engine([self.file], 4, backend=backend, faults=plan) for _ in range(2)]
        self.model = Model(16 * KIB // SECTOR_BYTES)
        self.buffers: list[AlignedBuffer] = []
        self.next = 1

    def submit(self, engine: int, first_sector: int, sectors: int) -> int:
        number, self.next = self.next, self.next + 1
        buffer = AlignedBuffer(sectors * SECTOR_BYTES)
        buffer[:] = bytes([number]) * len(buffer)
        self.buffers.append(buffer)
        self.model.write(number, range(first_sector, first_sector + sectors), number)
        self.engines[engine].submit([(number, True, 0, first_sector * SECTOR_BYTES, buffer.address, len(buffer))])
        return number

    def reap(self, engine: int) -> None:
        for number, error in self.engines[engine].reap(self.engines[engine].unfinished, 20.0):
            assert error is None
            self.model.completed.add(number)

    def write(self, engine: int, first_sector: int, sectors: int) -> None:
        self.submit(engine, first_sector, sectors)
        self.reap(engine)

    def sync(self, engine: int) -> None:
        self.engines[engine].sync(20.0)
        self.model.sync()

    def cut(self, seed: int) -> PowerCut:
        for engine in self.engines:
            engine.close()
        result = apply_power_cut(self.journal, seed, [self.path.parent])
        self.model.check(self.path.read_bytes())
        return result

    def values(self) -> list[int]:
        return list(self.path.read_bytes()[::SECTOR_BYTES])


def test_every_sector_holds_its_last_synced_content_or_a_later_one(disk_folder: Path) -> None:
    results, lost, torn = [], 0, 0
    for seed in range(240):
        generator = random.Random(seed)
        faults = {"short_transfer": 0.4, "eintr": 0.1, "seed": seed} if seed % 3 == 0 else {}
        disk = Disk(disk_folder, (native.Backend.URING, native.Backend.THREADS)[seed % 2], **faults)
        for _ in range(generator.randint(1, 14)):
            # The second engine's writes stay unreaped in the upper half, so no sync of the first covers them.
            act = generator.random()
            if act < 0.2:
                disk.sync(0)
            elif act < 0.35 and disk.engines[1].unfinished == 0:
                disk.submit(1, 16 + generator.randrange(8), generator.randint(1, 8))
            elif act < 0.45:
                disk.reap(1)
            else:
                first = generator.randrange(16)
                disk.write(0, first, generator.randint(1, 16 - first))
        before = [versions[-1][0] for versions in disk.model.versions]
        results.append(disk.cut(seed))
        lost += disk.values() != before
        torn += results[-1].torn_count > 0
    for name in ("kept_count", "dropped_count", "torn_count"):
        assert sum(getattr(result, name) for result in results) > 40
    assert lost > 60  # else the power cut cuts nothing
    assert torn > 40


def test_synced_writes_survive_every_power_cut(disk_folder: Path) -> None:
    for seed in range(20):
        disk = Disk(disk_folder, native.Backend.URING)
        disk.write(0, 0, 16)
        disk.write(1, 16, 16)
        disk.sync(0)  # of the file, so the other engine's writes are covered as well
        assert disk.cut(seed) == PowerCut()
        assert disk.values() == [1] * 16 + [2] * 16


def test_torn_write_is_neither_whole_nor_absent(disk_folder: Path) -> None:
    shapes = set()
    for seed in range(60):
        disk = Disk(disk_folder, native.Backend.THREADS)
        disk.write(0, 0, 8)
        result, values = disk.cut(seed), disk.values()
        new = [index for index in range(8) if values[index] == 1]
        if result.torn_count:
            assert 0 < len(new) < 8
            shapes.add("prefix" if new == list(range(len(new))) else "any")
        else:
            assert len(new) == (8 if result.kept_count else 0)
    assert shapes == {"prefix", "any"}


def test_slot_that_was_used_again_is_not_spoilt_by_its_former_use(disk_folder: Path) -> None:
    lost = 0
    for seed in range(40):
        disk = Disk(disk_folder, native.Backend.THREADS)
        disk.submit(1, 0, 16)  # never reaped, so no sync covers it
        while disk.path.read_bytes()[:8192] != bytes([1]) * 8192:
            pass
        disk.write(0, 8, 16)  # [8, 24): its second half is a slot of its own
        disk.sync(0)
        result = disk.cut(seed)
        assert disk.values()[8:24] == [2] * 16
        assert result.kept_count + result.dropped_count + result.torn_count == 1
        lost += disk.values()[:8] != [1] * 8
    assert lost > 10  # outside of the overlap the former write is undone


def test_write_that_is_kept_is_not_undone_with_the_one_before_it(disk_folder: Path) -> None:
    seen = set()
    for seed in range(60):
        disk = Disk(disk_folder, native.Backend.URING)
        disk.write(0, 0, 8)
        disk.write(0, 0, 8)
        result = disk.cut(seed)
        if (result.kept_count, result.dropped_count) == (1, 1):
            seen.add(disk.values()[0])
    assert seen == {1, 2}


@pytest.mark.parametrize("injected", [False, True])
def test_failed_sync_makes_nothing_durable(disk_folder: Path, injected: bool) -> None:
    lost = 0
    for seed in range(10):
        disk = Disk(disk_folder, (native.Backend.URING, native.Backend.THREADS)[seed % 2])
        disk.write(0, 0, 8)
        again = native.File(str(disk.path))
        if not injected:
            # The kernel refuses to flush through a descriptor that only names the file.
            only_a_name = os.open(disk.path, os.O_PATH)
            os.dup2(only_a_name, again.descriptor)
            os.close(only_a_name)
        failing = native.FaultPlan(eio=1.0 if injected else 0.0, crash=disk.crash)
        with pytest.raises(IoError, match="sync"):
            native.Engine([again], 1, faults=failing).sync(20.0)
        disk.cut(seed)
        lost += disk.values()[:8] != [1] * 8
    assert lost > 0


def test_journal_is_emptied_when_all_is_durable_and_holds_one_record_a_write(disk_folder: Path) -> None:
    disk = Disk(disk_folder, native.Backend.URING)
    sizes = set()
    for _ in range(5):
        disk.write(0, 0, 16)
        disk.write(1, 8, 16)
        sizes.add(disk.journal.stat().st_size)
        disk.sync(1)
        assert disk.journal.stat().st_size == 0
    assert sizes == {2 * (48 + len(str(disk.path)) + 8 * KIB)}
    assert disk.crash.count == 15  # writes and syncs


def test_record_cut_short_is_dropped_and_the_others_are_used(disk_folder: Path) -> None:
    for missing in (1, 100, 16 * SECTOR_BYTES, 16 * SECTOR_BYTES + 40):
        disk = Disk(disk_folder, native.Backend.URING)
        disk.write(0, 0, 16)
        disk.write(0, 16, 16)
        for engine in disk.engines:
            engine.close()
        os.truncate(disk.journal, disk.journal.stat().st_size - missing)
        result = apply_power_cut(disk.journal, 0, [disk_folder])
        assert result.kept_count + result.dropped_count + result.torn_count == 1
        assert disk.values()[16:] == [2] * 16


def test_nothing_outside_the_allowed_folders_is_changed(
    disk_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    disk = Disk(disk_folder, native.Backend.URING)
    disk.write(0, 0, 32)
    with pytest.raises(ValueError, match="outside"):
        apply_power_cut(disk.journal, 0, [tmp_path_factory.mktemp("other")])
    assert disk.values() == [1] * 32
    assert disk.journal.exists()


def test_unlinked_file_and_another_of_its_name_are_left_alone(disk_folder: Path) -> None:
    disk = Disk(disk_folder, native.Backend.URING)
    disk.write(0, 0, 32)
    disk.path.unlink()
    disk.path.write_bytes(b"another")
    assert apply_power_cut(disk.journal, 0, [disk_folder]) == PowerCut()
    assert disk.path.read_bytes() == b"another"


def test_foreign_file_is_not_taken_for_a_journal(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a crash journal"):
        apply_power_cut(tmp_path / "journal", 0, [tmp_path])


def test_journal_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(IoError) as caught:
        native.CrashPlan(journal=str(tmp_path / "absent" / "journal"))
    assert (caught.value.op, caught.value.path) == ("open", str(tmp_path / "absent" / "journal"))


# ---- names and small files ----


class Names:
    """Durable files written through the hooks, as little or as much of the protocol as a test asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder / "names", folder / "metadata"
        self.folder.mkdir()
        self.journal = MetadataJournal(self.path)

    def hooked(self, operation: str, path: Path, act: Callable[[], object]) -> None:
        self.journal.before(operation, path)  # type: ignore[arg-type]
        act()
        self.journal.after(operation, path)  # type: ignore[arg-type]

    def write(self, name: str, content: bytes, *, synced: bool = True) -> None:
        path, temporary = self.folder / name, self.folder / f"{name}.tmp"
        self.hooked("write", temporary, lambda: temporary.write_bytes(content))
        if synced:
            self.hooked("sync_file", temporary, lambda: None)
        self.hooked("rename", path, lambda: temporary.rename(path))

    def remove(self, name: str) -> None:
        self.hooked("remove", self.folder / name, (self.folder / name).unlink)

    def sync(self) -> None:
        self.hooked("sync_folder", self.folder, lambda: None)

    def cut(self, seed: int) -> PowerCut:
        self.journal.close()
        return apply_power_cut(self.folder / "none", seed, [self.folder], self.path)

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def make_names(tmp_path: Path) -> Callable[[], Names]:
    numbers = itertools.count()

    def make() -> Names:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return Names(folder)

    return make


def test_rename_is_kept_or_undone_until_its_folder_is_synced(make_names: Callable[[], Names]) -> None:
    seen = set()
    for seed in range(40):
        names = make_names()
        names.write("a", b"old")
        names.sync()
        assert names.path.stat().st_size == 0
        names.write("a", b"new")
        names.cut(seed)
        assert not names.path.exists()
        seen.add(tuple(sorted(names.content().items())))
    kept, back, gone = (("a", b"new"),), (("a", b"old"), ("a.tmp", b"new")), (("a", b"old"),)
    assert seen == {kept, back, gone}


def test_synced_names_and_contents_survive_every_power_cut(make_names: Callable[[], Names]) -> None:
    for seed in range(20):
        names = make_names()
        names.write("a", b"1")
        names.write("b", b"2")
        names.remove("a")
        names.write("b", b"3")
        names.sync()
        assert names.cut(seed) == PowerCut()
        assert names.content() == {"b": b"3"}


def test_names_of_a_folder_are_undone_from_the_last(make_names: Callable[[], Names]) -> None:
    states = []  # after each change
    names = make_names()
    acts: list[Callable[[Names], None]] = [
        lambda names: names.write("a", b"1"),
        lambda names: names.write("b", b"2"),
        lambda names: names.remove("a"),
        lambda names: names.write("a", b"3"),
        lambda names: names.write("b", b"4"),
        lambda names: names.remove("b"),
    ]
    for act in acts:
        act(names)
        states.append(names.content())
    seen = set()
    for seed in range(80):
        names = make_names()
        acts[0](names)
        names.sync()
        for act in acts[1:]:
            act(names)
        names.cut(seed)
        found = {name: content for name, content in names.content().items() if not name.endswith(".tmp")}
        assert found in states
        seen.add(states.index(found))
    assert seen == set(range(len(acts)))


def test_content_that_was_not_flushed_may_be_spoilt_and_only_that(make_names: Callable[[], Names]) -> None:
    spoilt, content = 0, bytes(range(1, 256)) * 8
    for seed in range(40):
        names = make_names()
        names.write("good", content)
        names.write("bad", content, synced=False)
        names.sync()
        result = names.cut(seed)
        found = names.content()
        assert found.keys() == {"good", "bad"}
        assert found["good"] == content
        assert (found["bad"] != content) == (result.garbled_count == 1)
        spoilt += found["bad"] != content
    assert 10 < spoilt < 40


def test_former_content_that_was_not_flushed_is_not_made_good_by_undoing(make_names: Callable[[], Names]) -> None:
    spoilt = 0
    for seed in range(60):
        names = make_names()
        names.write("a", b"former" * 100, synced=False)
        names.sync()
        names.write("a", b"new" * 100)
        names.cut(seed)
        content = names.content()["a"]
        spoilt += content not in (b"former" * 100, b"new" * 100)
    assert spoilt > 5


def interrupted(names: Names, operation: str, happened: bool) -> None:
    """A process killed between ``before`` and ``after``; the operation itself may have happened."""
    final, temporary = names.folder / "a", names.folder / "a.tmp"
    names.write("a", b"old")
    if operation == "rename":
        names.hooked("write", temporary, lambda: temporary.write_bytes(b"new"))
        names.hooked("sync_file", temporary, lambda: None)
    names.sync()
    names.journal.before(operation, temporary if operation == "write" else final)  # type: ignore[arg-type]
    acts: dict[str, Callable[[], object]] = {
        "write": lambda: temporary.write_bytes(b"new"),
        "rename": lambda: temporary.rename(final),
        "remove": final.unlink,
    }
    if happened:
        acts[operation]()


@pytest.mark.parametrize("operation", ["write", "rename", "remove"])
@pytest.mark.parametrize("happened", [False, True])
def test_kill_between_before_and_after_leaves_either_state(
    make_names: Callable[[], Names], operation: str, happened: bool
) -> None:
    seen = set()
    for seed in range(30):
        names = make_names()
        interrupted(names, operation, happened)
        result = names.cut(seed)
        assert happened or result == PowerCut()
        seen.add(tuple(sorted(names.content().items())))
    untouched = (("a", b"old"), ("a.tmp", b"new")) if operation == "rename" else (("a", b"old"),)
    assert untouched in seen
    if not happened:
        assert seen == {untouched}
    elif operation == "write":  # undone, whole, or spoilt
        assert {dict(files).get("a.tmp", b"absent") for files in seen} > {b"new", b"absent"}
    else:
        assert seen == {untouched, {"rename": (("a", b"new"),), "remove": ()}[operation]}


def test_line_cut_short_is_dropped(make_names: Callable[[], Names]) -> None:
    names = make_names()
    names.write("a", b"old")
    names.sync()
    names.journal.before("remove", names.folder / "a")
    os.truncate(names.path, names.path.stat().st_size - 5)
    assert MetadataCut(names.path).paths == []
    assert names.cut(0) == PowerCut()
    assert names.content() == {"a": b"old"}


def test_names_outside_the_allowed_folders_are_refused(make_names: Callable[[], Names], tmp_path: Path) -> None:
    names = make_names()
    names.write("a", b"1")
    with pytest.raises(ValueError, match="outside"):
        apply_power_cut(tmp_path / "none", 0, [tmp_path / "elsewhere"], names.path)
    assert names.content() == {"a": b"1"}
    assert names.path.exists()
    names.journal.close()
