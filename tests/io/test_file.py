"""Opening files: alignment, allocation, and failures that leave nothing behind. Both openers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import angelptm_native
import pytest

from io_engine import IoError
from io_engine.file import File, PlainFile

Opener = Callable[..., File]


@pytest.fixture(params=[angelptm_native.File, PlainFile], ids=["native", "plain"])
def opener(request: pytest.FixtureRequest) -> Opener:
    chosen: Opener = request.param
    return chosen


def test_direct_file_tells_a_power_of_two_alignment(disk_folder: Path, opener: Opener) -> None:
    file = opener(str(disk_folder / "file"), create=True, allocate_bytes=1 << 20)
    assert file.direct
    assert file.buffered_reason == file.allocation_note == ""
    for alignment in (file.memory_alignment, file.offset_alignment):
        assert 1 < alignment <= 4096
        assert alignment & (alignment - 1) == 0
    assert file.size_bytes == 1 << 20
    assert os.stat(disk_folder / "file").st_blocks * 512 >= 1 << 20  # blocks, not a hole


def test_unlinked_file_is_gone_at_once_and_still_works(disk_folder: Path, opener: Opener) -> None:
    file = opener(str(disk_folder / "file"), create=True, unlink=True, allocate_bytes=4096)
    assert os.listdir(disk_folder) == [] or not (disk_folder / "file").exists()
    assert file.size_bytes == 4096
    assert os.pread(os.open(f"/proc/self/fd/{file.descriptor}", os.O_RDONLY), 4, 0) == bytes(4)


@pytest.mark.parametrize("bytes", [1 << 43, 1 << 60])
def test_file_too_large_for_the_disk_is_refused_and_not_left_behind(
    disk_folder: Path, opener: Opener, bytes: int
) -> None:
    path = disk_folder / "new"
    with pytest.raises(IoError) as caught:
        opener(str(path), create=True, allocate_bytes=bytes)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert (caught.value.op, caught.value.path, caught.value.bytes) == ("allocate", str(path), bytes)
    assert not path.exists()


def test_failed_allocation_gives_an_old_file_its_size_back(disk_folder: Path) -> None:
    path = disk_folder / "old"
    path.write_bytes(b"x" * 1000)
    space = os.statvfs(disk_folder)
    with pytest.raises(IoError):
        angelptm_native.File(str(path), allocate_bytes=max(space.f_blocks * space.f_frsize * 2, 1 << 43))
    assert path.read_bytes() == b"x" * 1000


@pytest.mark.parametrize(
    ("name", "expected"), [("missing/file", errno.ENOENT), (".", errno.EISDIR), ("fifo", errno.EINVAL)]
)
def test_path_that_cannot_be_a_page_file_is_refused(
    disk_folder: Path, opener: Opener, name: str, expected: int
) -> None:
    os.mkfifo(disk_folder / "fifo")  # opening one would wait for its other end
    with pytest.raises(IoError) as caught:
        opener(str(disk_folder / name), create=True)
    assert (caught.value.op, caught.value.errno) == ("open", expected)
    assert str(disk_folder) in str(caught.value)


def test_absent_file_is_not_created_unless_asked(disk_folder: Path, opener: Opener) -> None:
    with pytest.raises(IoError) as caught:
        opener(str(disk_folder / "absent"))
    assert caught.value.errno == errno.ENOENT


def test_tmpfs_is_buffered_and_says_so(opener: Opener) -> None:
    if not os.path.ismount("/dev/shm") or not os.access("/dev/shm", os.W_OK):
        pytest.skip("no writable tmpfs at /dev/shm")
    file = opener(f"/dev/shm/angelptm-test-{os.getpid()}", create=True, unlink=True)
    assert not file.direct
    assert "tmpfs" in file.buffered_reason
    assert file.offset_alignment == 1


def test_file_that_exists_keeps_its_content(disk_folder: Path, opener: Opener) -> None:
    path = disk_folder / "kept"
    path.write_bytes(b"y" * 10000)
    opener(str(path), create=True, allocate_bytes=4096)
    assert path.read_bytes() == b"y" * 10000


def test_descriptor_is_closed_with_the_last_reference(disk_folder: Path, opener: Opener) -> None:
    file = opener(str(disk_folder / "file"), create=True)
    descriptor = file.descriptor
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
