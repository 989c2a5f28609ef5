"""CRC32C is the published function, by every implementation, and takes any bytes in a row."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
import threading
from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "checksum.py"
KINDS = native.crc32c_kinds()
# RFC 3720, B.4: the bytes of a SCSI read (10) command.
ISCSI_READ = bytes.fromhex(
    "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018 28000000 00000000 02000000 00000000"
)
VECTORS = [
    (b"", 0),
    (b"a", 0xC1D04330),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (ISCSI_READ, 0xD9963A56),
]


def bit_by_bit(data: bytes) -> int:
    """The definition: one bit at a time, by the unreflected polynomial on bits turned round."""
    register = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            carry = (register >> 31) ^ (byte >> bit & 1)
            register = (register << 1 & 0xFFFFFFFF) ^ (0x1EDC6F41 if carry else 0)
    return int(f"{register ^ 0xFFFFFFFF:032b}"[::-1], 2)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_table_is_always_there_and_the_last_kind_is_used():
    assert KINDS[0] == "table"
    assert native.crc32c_implementation() == KINDS[-1]


def test_this_cpu_uses_what_it_has():
    with open("/proc/cpuinfo") as file:
        match = re.search(r"^(?:flags|Features)\s*:(.*)$", file.read(), re.MULTILINE)
    flags = set(match.group(1).split()) if match else set()
    assert ("sse4.2" in KINDS) == ({"sse4_2", "pclmulqdq"} <= flags)
    assert ("avx512" in KINDS) == ({"sse4_2", "pclmulqdq", "avx512f", "vpclmulqdq"} <= flags)
    assert ("armv8" in KINDS) == ("crc32" in flags)


@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_published_vectors(kind, data, expected):
    assert native.crc32c_with(kind, data) == expected
    assert native.crc32c(data) == expected


def test_long_input_follows_the_definition(kind):
    data = random.Random(1).randbytes(3 * 4160 + 3 * 256 + 13)
    assert native.crc32c_with(kind, data) == bit_by_bit(data)


def test_every_length_and_alignment_gives_what_the_table_gives(kind):
    data = memoryview(random.Random(2).randbytes(2048 + 16 + 64))
    start = -np.frombuffer(data, np.uint8).ctypes.data % 64
    for offset in range(start, start + 16):
        for length in range(2049):
            part = data[offset : offset + length]
            assert native.crc32c_with(kind, part) == native.crc32c_with("table", part), (offset - start, length)


# The loops take 8 bytes, 256, 3 * 256 and 3 * 4160 at once.
@pytest.mark.parametrize("border", [8, 64, 256, 512, 3 * 256, 3 * 4160, 3 * 4160 + 3 * 256, 6 * 4160])
def test_lengths_around_the_borders_of_the_loops(kind, border):
    data = memoryview(random.Random(border).randbytes(border + 40))
    for length in range(max(border - 20, 0), border + 21):
        for offset in (0, 1, 7, 16):
            part = data[offset : offset + length]
            assert native.crc32c_with(kind, part, 0x12345678) == native.crc32c_with("table", part, 0x12345678)


def test_large_buffers_give_what_the_table_gives(kind):
    rng = random.Random(3)
    data = memoryview(rng.randbytes(5 << 20))
    for _ in range(8):
        part = data[rng.randrange(4096) : rng.randrange(2 << 20, len(data))]
        assert native.crc32c_with(kind, part) == native.crc32c_with("table", part)


def test_parts_in_a_row_give_the_checksum_of_the_whole(kind):
    rng = random.Random(4)
    data = memoryview(rng.randbytes(50_000))
    whole = native.crc32c_with(kind, data)
    for _ in range(200):
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 6)))
        seed = 0
        for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            seed = native.crc32c_with(kind, data[begin:end], seed)
        assert seed == whole, cuts


def test_a_flipped_bit_never_goes_unseen(kind):
    rng = random.Random(5)
    data = bytearray(rng.randbytes(20_000))
    before = native.crc32c_with(kind, data)
    for position in [0, 8 * len(data) - 1, *(rng.randrange(8 * len(data)) for _ in range(1000))]:
        data[position // 8] ^= 1 << position % 8
        assert native.crc32c_with(kind, data) != before, position
        data[position // 8] ^= 1 << position % 8
    assert native.crc32c_with(kind, data) == before


def test_every_contiguous_buffer_is_taken_as_its_bytes():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = native.crc32c(array.tobytes())
    array.flags.writeable = False
    for same in (
        array,
        array.view(np.uint16),
        memoryview(array),
        bytearray(array.tobytes()),
        array.view("datetime64[s]"),
    ):
        assert native.crc32c(same) == expected
    assert native.crc32c_at(array.ctypes.data, array.nbytes) == expected
    assert native.crc32c_at(array.ctypes.data + 40, 56, native.crc32c(array.tobytes()[:40])) == expected
    assert native.crc32c_at(0, 0, 7) == native.crc32c(b"", 7) == 7
    assert native.crc32c(np.empty((0, 3))) == 0


@pytest.mark.parametrize("call", [native.crc32c, lambda data: native.crc32c_with("table", data)])
def test_a_buffer_with_gaps_is_refused(call):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for gaps in (array[:, ::2], array.T, memoryview(b"abcdef")[::2], memoryview(b"abcdef")[::-1]):
        with pytest.raises(BufferError, match="contiguous"):
            call(gaps)
    held = bytearray(8)
    with memoryview(held)[::2] as gaps, pytest.raises(BufferError, match="contiguous"):
        call(gaps)
    held.append(0)  # Python would refuse while the buffer is in use.


@pytest.mark.parametrize("wrong", ["text", 5, None, [1, 2]])
def test_what_is_not_bytes_is_a_type_error(wrong):
    with pytest.raises(TypeError):
        native.crc32c(wrong)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError):
        native.crc32c(b"", 1 << 32)
    with pytest.raises(TypeError):
        native.crc32c_at(0, -1)
    with pytest.raises(ValueError, match="no crc32c kind 'abacus'"):
        native.crc32c_with("abacus", b"")


def test_the_object_is_held_while_it_is_read_and_let_go_after():
    data = bytearray(64 << 20)
    refused = []

    def grow():
        try:
            while thread_is_reading.wait(10) and not done.is_set():
                data.append(0)
                data.pop()
        except BufferError as error:
            refused.append(error)

    thread_is_reading, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=grow)
    thread.start()
    thread_is_reading.set()
    for _ in range(50):
        native.crc32c_with("table", data)
        if refused:
            break
    done.set()
    thread.join()
    assert refused, "no other Python thread ran during a checksum"
    data.append(1)


def test_the_benchmark_reports_every_kind_against_reading(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_checksum", BENCH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # Its dataclass looks itself up there.
    spec.loader.exec_module(module)
    assert module.main(["--small", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert {(row["size"], row["what"]) for row in rows} == {
        (size, what) for size in ("page", "cold") for what in ["read", *KINDS]
    }
    for row in rows:
        assert 0 < row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["median_seconds"])
        (read,) = (other for other in rows if other["size"] == row["size"] and other["what"] == "read")
        assert row["ratio"] == pytest.approx(row["bytes_per_s"] / read["bytes_per_s"])
