"""The contract of every backend. Each test runs on all four."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import io_engine
from io_engine import AlignedBuffer, Engine, FaultPlan, File, IoError

from .conftest import DEADLINE_SECONDS, patterned

Maker = Callable[..., File]
Opener = Callable[..., Engine]

KIB, MIB = 1 << 10, 1 << 20

SURVIVABLE = {
    "none": None,
    "short": FaultPlan(seed=1, short_transfer=0.7),
    "eintr": FaultPlan(seed=2, eintr=0.3),
    "eagain": FaultPlan(seed=3, eagain=0.2),
    "delay": FaultPlan(seed=4, delay=0.5, delay_seconds=0.003),
    "reorder": FaultPlan(seed=5, reorder=True, delay=0.3, delay_seconds=0.001),
    "all": FaultPlan(seed=6, short_transfer=0.4, eintr=0.1, eagain=0.1, delay=0.2, delay_seconds=0.001, reorder=True),
}


@pytest.mark.parametrize("faults", SURVIVABLE.values(), ids=SURVIVABLE.keys())
def test_what_was_written_is_read_back_in_any_order_under_survivable_faults(
    make_file: Maker, open_engine: Opener, faults: FaultPlan | None
) -> None:
    blocks, block = 24, 64 * KIB
    engine = open_engine([make_file(blocks * block)], faults=faults)
    order = list(range(blocks))
    random.Random(7).shuffle(order)
    with patterned(blocks * block) as source, AlignedBuffer(blocks * block) as target:
        # 24 requests on a depth of 4: most wait in the engine.
        engine.submit([(True, 0, i * block, source.view(i * block, block)) for i in order])
        written = engine.reap(blocks, DEADLINE_SECONDS)
        assert [ticket.error for ticket in written] == [None] * blocks
        engine.submit([(False, 0, i * block, target.view(i * block, block)) for i in reversed(order)])
        read = engine.reap(blocks, DEADLINE_SECONDS)
        assert [ticket.error for ticket in read] == [None] * blocks
        assert target[:] == source[:]
        del written, read
    assert engine.unfinished == 0
    counters = engine.counters
    assert (counters.read_bytes, counters.written_bytes) == (blocks * block, blocks * block)
    assert (counters.read_count, counters.write_count, counters.failed_count) == (blocks, blocks, 0)
    if faults is None:
        assert (counters.resumed_count, counters.retried_count) == (0, 0)
    if faults and faults.short_transfer:
        assert counters.resumed_count > 0
    if faults and (faults.eintr or faults.eagain):
        assert counters.retried_count > 0


def test_requests_on_several_files_reach_their_own_file(disk_folder: Path, open_engine: Opener) -> None:
    files = [io_engine.open_file(disk_folder / f"f{i}", create=True, allocate_bytes=MIB) for i in range(3)]
    engine = open_engine(files)
    for index in range(3):
        with patterned(MIB, seed=index) as source:
            engine.write(0, source, file=index).wait(DEADLINE_SECONDS)
    for index in range(3):
        with patterned(MIB, seed=index) as source, AlignedBuffer(MIB) as target:
            engine.read(0, target, file=index).wait(DEADLINE_SECONDS)
            assert target[:] == source[:]


def test_registered_buffers_carry_the_same_data(make_file: Maker, open_engine: Opener) -> None:
    with patterned(2 * MIB) as source, AlignedBuffer(2 * MIB) as target:
        engine = open_engine([make_file(2 * MIB)], buffers=[source, target])
        assert engine.notes == ""
        engine.write(0, source.view(0, MIB)).wait(DEADLINE_SECONDS)
        engine.write(MIB, source.view(MIB, MIB)).wait(DEADLINE_SECONDS)
        engine.read(0, target).wait(DEADLINE_SECONDS)
        assert target[:] == source[:]
        engine.close()  # gives the registered memory back, so that it may be closed


@pytest.mark.parametrize(
    ("faults", "write", "expected"),
    [
        (FaultPlan(eio=1.0), False, errno.EIO),
        (FaultPlan(eio=1.0), True, errno.EIO),
        (FaultPlan(enospc=1.0), True, errno.ENOSPC),
        (FaultPlan(eintr=1.0), False, errno.EINTR),
        (FaultPlan(eagain=1.0), True, errno.EAGAIN),
    ],
)
def test_error_that_does_not_pass_travels_in_the_ticket_with_its_facts(
    make_file: Maker, open_engine: Opener, faults: FaultPlan, write: bool, expected: int
) -> None:
    file = make_file()
    engine = open_engine([file], faults=faults)
    with AlignedBuffer(8 * KIB) as buffer:
        ticket = engine.submit([(write, 0, 16 * KIB, buffer)])[0]
        with pytest.raises(IoError) as caught:
            ticket.wait(DEADLINE_SECONDS)
        error = caught.value
        assert ticket.done()
        assert ticket.error is error
        assert (error.op, error.path) == ("write" if write else "read", file.path)
        assert (error.offset, error.bytes, error.errno) == (16 * KIB, 8 * KIB, expected)
        assert file.path in str(error)
        assert str(16 * KIB) in str(error)
    assert engine.counters.failed_count == 1
    # Retries are bounded: 16 for what may pass, none for what does not.
    assert engine.counters.retried_count == (16 if expected in (errno.EINTR, errno.EAGAIN) else 0)


def test_failed_and_good_transfers_keep_apart(make_file: Maker, open_engine: Opener) -> None:
    blocks, block = 40, 4 * KIB
    engine = open_engine([make_file(blocks * block)], faults=FaultPlan(seed=11, eio=0.3, short_transfer=0.5))
    with patterned(blocks * block) as source, AlignedBuffer(blocks * block) as target:
        writes = engine.submit([(True, 0, i * block, source.view(i * block, block)) for i in range(blocks)])
        engine.reap(blocks, DEADLINE_SECONDS)
        failed = [i for i in range(blocks) if writes[i].error]
        assert 0 < len(failed) < blocks
        good = [i for i in range(blocks) if i not in failed]
        for i in good:
            ticket = engine.read(i * block, target.view(i * block, block))
            while True:
                engine.reap(1, DEADLINE_SECONDS)
                if ticket.error is None:
                    break
                ticket = engine.read(i * block, target.view(i * block, block))
            assert target[i * block : (i + 1) * block] == source[i * block : (i + 1) * block]


def test_reading_past_the_end_names_the_first_missing_byte(make_file: Maker, open_engine: Opener) -> None:
    file = make_file(64 * KIB)
    engine = open_engine([file])
    with AlignedBuffer(64 * KIB) as buffer:
        with pytest.raises(IoError) as caught:
            engine.read(32 * KIB, buffer).wait(DEADLINE_SECONDS)
        assert (caught.value.errno, caught.value.offset, caught.value.bytes) == (errno.ENODATA, 64 * KIB, 32 * KIB)
        with pytest.raises(IoError) as caught:
            engine.read(1 * MIB, buffer).wait(DEADLINE_SECONDS)
        assert (caught.value.errno, caught.value.offset) == (errno.ENODATA, 1 * MIB)


def test_end_of_file_off_the_alignment_is_found(disk_folder: Path, open_engine: Opener) -> None:
    (disk_folder / "odd").write_bytes(b"x" * 5000)
    file = io_engine.open_file(disk_folder / "odd")
    engine = open_engine([file])
    with AlignedBuffer(16 * KIB) as buffer:
        with pytest.raises(IoError) as caught:
            engine.read(0, buffer).wait(DEADLINE_SECONDS)
        assert (caught.value.errno, caught.value.offset) == (errno.ENODATA, 5000)
        assert buffer[:5000] == b"x" * 5000


def test_wait_and_reap_name_what_they_waited_for_when_the_deadline_passes(
    make_file: Maker, open_engine: Opener
) -> None:
    file = make_file()
    engine = open_engine([file], faults=FaultPlan(delay=1.0, delay_seconds=0.5))
    with AlignedBuffer(8 * KIB) as buffer:
        ticket = engine.read(4 * KIB, buffer.view(0, 4 * KIB))
        other = engine.read(0, buffer.view(4 * KIB, 4 * KIB))
        for act in (lambda: ticket.wait(0.05), lambda: engine.reap(2, 0.05)):
            begin = time.monotonic()
            with pytest.raises(IoError, match="offset 4096") as caught:
                act()
            assert time.monotonic() - begin < 0.4
            assert (caught.value.errno, caught.value.path) == (errno.ETIMEDOUT, file.path)
            assert not ticket.done()
        # A deadline is not an end: the transfers finish, and their tickets are still to be had.
        assert {id(t) for t in engine.reap(2, DEADLINE_SECONDS)} == {id(ticket), id(other)}
        assert ticket.error is None


def test_what_finished_before_a_missed_deadline_comes_with_the_next_reap(make_file: Maker, open_engine: Opener) -> None:
    engine = open_engine([make_file()], faults=FaultPlan(seed=3, delay=0.5, delay_seconds=0.4))
    with AlignedBuffer(64 * KIB) as buffer:
        engine.submit([(False, 0, i * 16 * KIB, buffer.view(i * 16 * KIB, 16 * KIB)) for i in range(4)])
        with pytest.raises(IoError):
            engine.reap(4, 0.1)
        early = engine.reap(0, 1.0)
        late = engine.reap(4 - len(early), DEADLINE_SECONDS)
        assert len(early) > 0
        assert len(late) > 0
        assert all(ticket.error is None for ticket in [*early, *late])


def test_misaligned_request_is_refused_and_queues_nothing(make_file: Maker, open_engine: Opener) -> None:
    file = make_file()
    engine = open_engine([file])
    grain = file.offset_alignment
    assert grain > 1
    buffer = AlignedBuffer(8 * KIB)
    good = (False, 0, 0, buffer.view(0, 4 * KIB))
    for bad in (
        (False, 0, 1, buffer.view(0, 4 * KIB)),
        (False, 0, 0, buffer.view(0, grain + 1)),
        (False, 0, 0, buffer.view(1, 4 * KIB)),
        (False, 0, 0, buffer.view(0, 0)),
        (False, 1, 0, buffer.view(0, 4 * KIB)),
        (False, 0, -4096, buffer.view(0, 4 * KIB)),
        (False, 0, 0, bytes(buffer.view(0, 4 * KIB))),
    ):
        with pytest.raises(ValueError, match=r"multiple|1 byte|file index|writable"):
            engine.submit([good, bad])
        assert engine.unfinished == 0


def test_buffered_file_takes_any_offset_length_and_address(make_file: Maker, open_engine: Opener) -> None:
    file = make_file(64 * KIB, direct=False)
    assert (file.direct, file.offset_alignment, file.memory_alignment) == (False, 1, 1)
    engine = open_engine([file], faults=FaultPlan(seed=9, short_transfer=0.8))
    source, target = random.Random(1).randbytes(9999), bytearray(9999)
    engine.write(777, source).wait(DEADLINE_SECONDS)
    engine.read(777, target).wait(DEADLINE_SECONDS)
    assert bytes(target) == source
    assert engine.counters.resumed_count > 0


def test_writing_a_read_only_file_is_an_error_in_the_ticket(
    make_file: Maker, open_engine: Opener, disk_folder: Path
) -> None:
    make_file()
    engine = open_engine([io_engine.open_file(disk_folder / "file", read_only=True)])
    with AlignedBuffer(4 * KIB) as buffer:
        engine.read(0, buffer).wait(DEADLINE_SECONDS)
        with pytest.raises(IoError) as caught:
            engine.write(0, buffer).wait(DEADLINE_SECONDS)
    assert caught.value.errno == errno.EBADF


def test_closed_engine_refuses_everything_and_closes_twice(make_file: Maker, open_engine: Opener) -> None:
    engine = open_engine([make_file()])
    with AlignedBuffer(4 * KIB) as buffer:
        ticket = engine.write(0, buffer)
        engine.close()
        engine.close()
        # close finishes what is under way.
        assert ticket.done()
        assert ticket.error is None
        ticket.wait(0.0)
        with pytest.raises(ValueError, match="closed"):
            engine.read(0, buffer)
    assert engine.counters.write_count == 1


def test_close_is_bounded_and_says_what_it_cut_off(
    make_file: Maker, open_engine: Opener, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = open_engine([make_file()], faults=FaultPlan(delay=1.0, delay_seconds=3.0), close_seconds=0.2)
    ticket = engine.read(0, AlignedBuffer(4 * KIB))
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < 2.0
    assert ticket.error is not None
    assert ticket.error.errno == errno.ECANCELED
    assert "their memory is kept" in capfd.readouterr().err


def test_threads_may_submit_while_another_waits(make_file: Maker, open_engine: Opener) -> None:
    threads, count, block = 4, 20, 8 * KIB
    engine = open_engine([make_file(threads * count * block)], faults=FaultPlan(seed=5, short_transfer=0.3, eintr=0.1))
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with patterned(block, seed=index) as source, AlignedBuffer(block) as target:
                for i in range(count):
                    offset = (index * count + i) * block
                    engine.write(offset, source).wait(DEADLINE_SECONDS)
                    engine.read(offset, target).wait(DEADLINE_SECONDS)
                    assert target[:] == source[:]
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert failures == []
    assert engine.unfinished == 0


def test_ticket_waited_for_is_not_reaped_again(make_file: Maker, open_engine: Opener) -> None:
    engine = open_engine([make_file()])
    with AlignedBuffer(8 * KIB) as buffer:
        first = engine.read(0, buffer.view(0, 4 * KIB))
        second = engine.read(0, buffer.view(4 * KIB, 4 * KIB))
        first.wait(DEADLINE_SECONDS)
        assert engine.reap(1, DEADLINE_SECONDS) == [second]
        with pytest.raises(ValueError, match="more tickets"):
            engine.reap(1, 1.0)


def test_same_seed_meets_the_same_faults(make_file: Maker, open_engine: Opener) -> None:
    plan = FaultPlan(seed=21, eio=0.2, short_transfer=0.3, eintr=0.1)
    file = make_file()
    outcomes = []
    for _ in range(2):
        engine = open_engine([file], depth=1, faults=plan)
        with AlignedBuffer(16 * KIB) as buffer:
            tickets = [engine.read(i * 16 * KIB, buffer) for i in range(20)]
            engine.reap(20, DEADLINE_SECONDS)
            outcomes.append([ticket.error.errno if ticket.error else 0 for ticket in tickets])
            counters = engine.counters
            outcomes[-1] += [counters.resumed_count, counters.retried_count]
    assert outcomes[0] == outcomes[1]
    assert errno.EIO in outcomes[0]


def test_finished_ticket_gives_its_buffer_back(make_file: Maker, open_engine: Opener) -> None:
    engine = open_engine([make_file()])
    buffer = AlignedBuffer(4 * KIB)
    ticket = engine.read(0, buffer)
    ticket.wait(DEADLINE_SECONDS)
    buffer.close()  # BufferError if anything still held a view
    assert ticket.done()


def test_sync_after_writes_flushes_every_file(disk_folder: Path, open_engine: Opener) -> None:
    files = [io_engine.open_file(disk_folder / f"f{i}", create=True, allocate_bytes=MIB) for i in range(3)]
    engine = open_engine(files, depth=2)  # fewer places than files
    with patterned(64 * KIB) as source:
        for index in range(3):
            engine.write(0, source, file=index).wait(DEADLINE_SECONDS)
        engine.sync(DEADLINE_SECONDS)
        engine.sync(DEADLINE_SECONDS)  # with nothing new
        for index in range(3):
            assert (disk_folder / f"f{index}").read_bytes()[: 64 * KIB] == source[:]
    counters = engine.counters
    assert (counters.sync_count, counters.write_count, counters.written_bytes) == (6, 3, 3 * 64 * KIB)
    assert (counters.failed_count, counters.retried_count, engine.unfinished) == (0, 0, 0)


@pytest.mark.parametrize(
    ("faults", "expected", "retried"),
    [
        (FaultPlan(eio=1.0), errno.EIO, 0),  # never again: the kernel tells of a lost write once
        (FaultPlan(eintr=1.0), errno.EINTR, 16),
        (FaultPlan(eagain=1.0), errno.EAGAIN, 16),
    ],
)
def test_failed_sync_names_the_file_and_is_retried_only_for_what_passes(
    make_file: Maker, open_engine: Opener, faults: FaultPlan, expected: int, retried: int
) -> None:
    file = make_file()
    engine = open_engine([file], faults=faults)
    with pytest.raises(IoError, match="sync") as caught:
        engine.sync(DEADLINE_SECONDS)
    error = caught.value
    assert (error.op, error.path, error.offset, error.bytes, error.errno) == ("sync", file.path, 0, 0, expected)
    counters = engine.counters
    assert (counters.failed_count, counters.retried_count, counters.sync_count) == (1, retried, 0)
    assert engine.unfinished == 0


def test_sync_survives_what_passes_and_is_never_short(make_file: Maker, open_engine: Opener) -> None:
    plan = FaultPlan(seed=8, short_transfer=1.0, enospc=1.0, eintr=0.3, eagain=0.2, delay=0.3, delay_seconds=0.001)
    engine = open_engine([make_file()], faults=plan)
    for _ in range(20):
        engine.sync(DEADLINE_SECONDS)
    assert engine.counters.sync_count == 20
    assert engine.counters.retried_count > 0


def test_syncs_leave_the_faults_of_transfers_where_they_were(make_file: Maker, open_engine: Opener) -> None:
    file, outcomes = make_file(), []
    for syncing in (False, True):
        engine = open_engine([file], depth=1, faults=FaultPlan(seed=4, enospc=0.4))
        outcomes.append([])
        with AlignedBuffer(4 * KIB) as buffer:
            for i in range(20):
                ticket = engine.write(i * 4 * KIB, buffer)
                engine.reap(1, DEADLINE_SECONDS)
                outcomes[-1].append(ticket.error is None)
                if syncing:
                    engine.sync(DEADLINE_SECONDS)
    assert outcomes[0] == outcomes[1]
    assert len(set(outcomes[0])) == 2


def test_sync_is_refused_while_something_is_unfinished_or_after_close(make_file: Maker, open_engine: Opener) -> None:
    engine = open_engine([make_file()])
    with AlignedBuffer(4 * KIB) as buffer:
        ticket = engine.write(0, buffer)
        with pytest.raises(RuntimeError, match="unfinished: 1"):
            engine.sync(DEADLINE_SECONDS)
        ticket.wait(DEADLINE_SECONDS)
    engine.sync(DEADLINE_SECONDS)
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.sync(DEADLINE_SECONDS)


def test_read_only_file_can_be_synced(make_file: Maker, open_engine: Opener, disk_folder: Path) -> None:
    # Linux flushes the file, whoever wrote it; the descriptor's access does not matter.
    make_file()
    engine = open_engine([io_engine.open_file(disk_folder / "file", read_only=True)])
    engine.sync(DEADLINE_SECONDS)
    assert engine.counters.sync_count == 1
