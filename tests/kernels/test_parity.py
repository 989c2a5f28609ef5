"""The SIMD kernels give the bits of the scalar reference, whatever the values, lengths and alignments."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import angelptm_native as native
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from angelptm import kernels

from .arrays import SPECIAL_BITS, floats, of_dtype

DTYPES = [native.DType.F32, native.DType.BF16]
HYPERS = {
    "adamw": kernels.adamw_hyper(1e-3, (0.9, 0.999), 1e-8, 0.1, step=3, grad_scale=0.37),
    "adamw-plain": kernels.adamw_hyper(1e-2, (0.3, 0.9), 0.0, 0.0, step=1),
    "sgd": kernels.sgd_hyper(0.1, step=2),
    "sgd-decay": kernels.sgd_hyper(0.1, weight_decay=0.01, step=2, grad_scale=0.5),
    "sgd-momentum": kernels.sgd_hyper(0.1, 0.9, 0.3, 0.01, step=2),
    "sgd-nesterov": kernels.sgd_hyper(0.1, 0.9, nesterov=True, step=2),
    "sgd-first": kernels.sgd_hyper(0.1, 0.9, 0.3, step=1),
    "lion": kernels.lion_hyper(1e-3, (0.9, 0.99), 0.1, grad_scale=1.7),
}
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def step_bytes(
    isa: native.Isa, hyper: kernels.Hyper, arrays: list[np.ndarray], param_dtype: native.DType
) -> list[bytes]:
    """What `step` leaves in master, exp_avg, exp_avg_sq and param, starting from copies of the same offsets."""
    native.use_isa(isa)
    master, exp_avg, exp_avg_sq, grad, param = arrays
    before = [array.copy() for array in (master, exp_avg, exp_avg_sq, param)]
    native.step(
        hyper,
        master.ctypes.data,
        exp_avg.ctypes.data,
        exp_avg_sq.ctypes.data,
        grad.ctypes.data,
        native.DType.F32 if grad.dtype == np.float32 else native.DType.BF16,
        param.ctypes.data,
        param_dtype,
        master.size,
    )
    after = [array.tobytes() for array in (master, exp_avg, exp_avg_sq, param)]
    for array, old in zip((master, exp_avg, exp_avg_sq, param), before, strict=True):
        array.view(f"u{array.itemsize}")[:] = old.view(f"u{array.itemsize}")
    return after


@pytest.mark.parametrize("name", HYPERS)
@SETTINGS
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.one_of(st.integers(0, 70), st.sampled_from([255, 1023, 4097])),
    offsets=st.lists(st.integers(0, 31), min_size=5, max_size=5),
    grad_dtype=st.sampled_from(DTYPES),
    param_dtype=st.sampled_from(DTYPES),
    special=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_simd_step_has_the_bits_of_the_scalar_one(simd, name, seed, count, offsets, grad_dtype, param_dtype, special):
    rng = np.random.default_rng(seed)
    arrays = [floats(rng, count, offset, special) for offset in offsets[:3]]
    arrays.append(of_dtype(grad_dtype, rng, count, offsets[3], special))
    arrays.append(of_dtype(param_dtype, rng, count, offsets[4]))
    if seed % 2:
        np.abs(arrays[2], out=arrays[2])  # As in training; the other half takes roots of negative numbers.
    expected = step_bytes(native.Isa.SCALAR, HYPERS[name], arrays, param_dtype)
    assert step_bytes(simd, HYPERS[name], arrays, param_dtype) == expected


@pytest.mark.parametrize("name", ["adamw", "sgd-momentum", "lion"])
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_offset", [0, 16, 1])
def test_long_runs_that_store_past_the_cache_have_the_same_bits(simd, name, param_dtype, param_offset):
    rng = np.random.default_rng(5)
    count = 65536 + 77
    arrays = [floats(rng, count), floats(rng, count), np.abs(floats(rng, count)), floats(rng, count)]
    arrays.append(of_dtype(param_dtype, rng, count, param_offset))
    expected = step_bytes(native.Isa.SCALAR, HYPERS[name], arrays, param_dtype)
    assert step_bytes(simd, HYPERS[name], arrays, param_dtype) == expected


@pytest.mark.usefixtures("isa")
def test_every_nan_is_stored_as_the_one_nan():
    count = 40
    nan_bits = np.resize(SPECIAL_BITS[-4:], count)
    master, exp_avg, exp_avg_sq = (nan_bits.view(np.float32).copy() for _ in range(3))
    param = np.zeros(count, np.uint16)
    kernels.step(HYPERS["adamw"], master, exp_avg, exp_avg_sq, np.ones(count, np.float32), param)
    for array in (master, exp_avg, exp_avg_sq):
        assert (array.view(np.uint32) == 0x7FC00000).all()
    assert (param == 0x7FC0).all()


@pytest.mark.usefixtures("isa")
def test_a_step_leaves_the_elements_beside_its_run_alone():
    rng = np.random.default_rng(1)
    for count in range(40):
        arrays = [floats(rng, count + 2) for _ in range(4)]
        param = of_dtype(native.DType.BF16, rng, count + 2)
        edges = [(a[0].tobytes(), a[-1].tobytes()) for a in (*arrays, param)]
        kernels.step(HYPERS["adamw"], *(a[1:-1] for a in arrays), param[1:-1])
        assert [(a[0].tobytes(), a[-1].tobytes()) for a in (*arrays, param)] == edges


def test_a_step_in_parts_on_several_threads_has_the_bits_of_one_step():
    rng = np.random.default_rng(9)
    count = 200_000
    arrays = [floats(rng, count, special=0) for _ in range(4)]
    arrays.append(of_dtype(native.DType.BF16, rng, count))
    expected = step_bytes(native.isa_in_use(), HYPERS["adamw"], arrays, native.DType.BF16)
    cuts = [0, 1, 70_001, 70_032, 199_999, count]
    parts = [[array[begin:end] for array in arrays] for begin, end in itertools.pairwise(cuts)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: kernels.step(HYPERS["adamw"], *part), parts))
    assert [arrays[index].tobytes() for index in (0, 1, 2, 4)] == expected


@SETTINGS
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.one_of(st.integers(0, 70), st.sampled_from([kernels.GRAD_BLOCK - 1, 2 * kernels.GRAD_BLOCK + 19])),
    offsets=st.lists(st.integers(0, 31), min_size=2, max_size=2),
    first_element=st.one_of(st.just(0), st.integers(0, 2**40)),
    dst_dtype=st.sampled_from(DTYPES),
    src_dtype=st.sampled_from(DTYPES),
    add=st.booleans(),
    special=st.sampled_from([0.0, 0.0, 0.2, 1.0]),
)
def test_simd_accumulate_has_the_bits_of_the_scalar_one(
    simd, seed, count, offsets, first_element, dst_dtype, src_dtype, add, special
):
    rng = np.random.default_rng(seed)
    dst = of_dtype(dst_dtype, rng, count, offsets[0], special)
    src = of_dtype(src_dtype, rng, count, offsets[1], special)
    results = []
    before = dst.tobytes()
    for isa in (native.Isa.SCALAR, simd):
        native.use_isa(isa)
        dst.view(np.uint8)[:] = np.frombuffer(before, np.uint8)
        stats = kernels.accumulate(dst, src, add=add, first_element=first_element)
        results.append((dst.tobytes(), np.float64(stats.sum_squares).tobytes(), stats.finite))
    assert results[0] == results[1]


def test_an_unknown_choice_is_refused():
    for isa in (native.Isa.AVX2, native.Isa.AVX512):
        if native.isa_supported(isa):
            native.use_isa(isa)
            assert native.isa_in_use() == isa
        else:
            with pytest.raises(ValueError, match=native.isa_name(isa)):
                native.use_isa(isa)
