"""What `make sanitize` relies on: the tests run with the module that a sanitizer watches, and it says what it sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import angelptm_native as native
import pytest

SANITIZER = os.environ.get("ANGELPTM_SANITIZED")
EXIT_CODE = 66

RACE = """
import ctypes, threading
import angelptm_native as native

F32, count = native.DType.F32, 1 << 20
to, grad = (ctypes.create_string_buffer(4 * count) for _ in range(2))
addresses = ctypes.addressof(to), F32, ctypes.addressof(grad), F32

def add():
    for _ in range(20):
        native.accumulate(*addresses, count, True, 0)

threads = [threading.Thread(target=add) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
OVERFLOW = """
import ctypes
import angelptm_native as native

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
count = 1000
to, grad = libc.malloc(4 * count), libc.malloc(4 * count)
ctypes.memset(grad, 0, 4 * count)
native.accumulate(to, native.DType.F32, grad, native.DType.F32, count + 1, False, 0)
"""
FAULTS = {"thread": (RACE, "ThreadSanitizer: data race"), "address": (OVERFLOW, "heap-buffer-overflow")}

pytestmark = pytest.mark.skipif(SANITIZER is None, reason="no sanitizer watches; `make sanitize` runs this")


def test_module_is_the_one_that_is_watched() -> None:
    assert SANITIZER is not None
    assert Path(native.__file__).parent.name == f"sanitize-{SANITIZER}"


def test_deliberate_fault_is_reported(tmp_path: Path) -> None:
    assert SANITIZER is not None
    code, what = FAULTS[SANITIZER]
    options = f"exitcode={EXIT_CODE}:halt_on_error=1:detect_leaks=0"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,  # the module in the repository's root is another one
        env={**os.environ, "TSAN_OPTIONS": options, "ASAN_OPTIONS": options},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert what in done.stderr
    assert done.returncode == EXIT_CODE
