"""The benchmark runs, at a size that says nothing about speed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest
import torch

from .arrays import aligned

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "kernels.py"


def test_the_benchmark_reports_every_case_against_its_ceiling(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_kernels", BENCH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # Its dataclass looks itself up there.
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    try:
        assert module.main(["--small", "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(capsys.readouterr().out)
    rows = report["results"]
    cases = {(row["grad"], row["param"]) for row in rows if row["what"] == "step"}
    assert cases == {("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp32")}
    for row in rows:
        assert 0 < row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["median_seconds"])
    for threads, grad, param in {(row["threads"], row["grad"], row["param"]) for row in rows if row["what"] == "step"}:
        mine = [row for row in rows if (row["threads"], row["grad"], row["param"]) == (threads, grad, param)]
        # A ceiling of other bytes would be no ceiling.
        assert len({row["bytes"] for row in mine}) == 1
        assert max(row["ratio"] for row in mine if row["what"].startswith("ceiling")) == pytest.approx(1.0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("grad_dtype", [native.DType.F32, native.DType.BF16], ids=str)
@pytest.mark.parametrize("param_dtype", [native.DType.F32, native.DType.BF16], ids=str)
def test_the_ceiling_reads_and_writes_every_element_of_every_array(past_cache, grad_dtype, param_dtype):
    count = 1000
    states = [aligned(count, np.dtype(np.float32), 0) for _ in range(3)]
    for index, state in enumerate(states):
        state[:] = np.arange(count) + index
    grad = np.full(count, 0.5, np.float32) if grad_dtype == native.DType.F32 else np.full(count, 0x3F00, np.uint16)
    param = aligned(count, np.dtype(np.float32 if param_dtype == native.DType.F32 else np.uint16), 0)
    native.memory_ceiling(
        *(state.ctypes.data for state in states),
        grad.ctypes.data,
        grad_dtype,
        param.ctypes.data,
        param_dtype,
        count,
        past_cache,
    )
    for index, state in enumerate(states):
        assert np.array_equal(state, np.arange(count) + index + np.float32(0.5))
    bits = states[0].view(np.uint32)
    assert np.array_equal(param.view(np.uint32), bits) if param.itemsize == 4 else np.array_equal(param, bits >> 16)
