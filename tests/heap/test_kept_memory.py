"""What the heap keeps of freed memory, up to an allowance. Each case is a process, as there is one heap in each."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_BLOCK, _COUNT = 4 * 2**20, 64

_HOLES = f"""
import ctypes, json, os, sys
import angelptm_native as native

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

def allocate(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block

kept = native.KeptMemory(int(sys.argv[1]))
before, trims = resident(), kept.trims
# Small blocks between the large ones stay in use: what is freed is no end of the heap, which would shrink by itself.
blocks = [(allocate({_BLOCK}), allocate(4096)) for _ in range({_COUNT})]
held, looked_while_held = resident() - before, kept.look()
for large, _ in blocks:
    libc.free(large)
freed = resident() - before
looked = kept.look()
print(json.dumps([held, looked_while_held, freed, looked, resident() - before, kept.trims - trims, kept.look()]))
"""


@pytest.mark.parametrize(
    ("allowance", "stays", "given_back"),
    [(0, False, False), (_BLOCK, True, True), (2 * _BLOCK * _COUNT, True, False)],
    ids=["nothing", "less than was freed", "more than was freed"],
)
def test_freed_memory_stays_up_to_the_allowance(allowance: int, stays: bool, given_back: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HOLES, str(allowance)], capture_output=True, text=True, timeout=120, check=True
    )
    held, looked_while_held, freed, looked, left, trims, looked_again = json.loads(done.stdout)
    whole, little = 0.9 * _BLOCK * _COUNT, _BLOCK
    assert held > whole
    assert not looked_while_held, "what is in use is not what was freed"
    assert freed > whole if stays else freed < little
    assert looked == given_back
    assert left < little if given_back or not stays else left > whole
    assert trims == given_back
    assert not looked_again
