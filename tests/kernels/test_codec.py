"""Compact formats of states: split masters lose nothing, random rounding keeps expected values, and the SIMD codecs and
steps have the bits of the scalar ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import angelptm_native as native
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from angelptm import kernels

from .arrays import SPECIAL_BITS, aligned, floats, halves, of_dtype
from .test_parity import HYPERS

BLOCK = native.BLOCK8
MOMENTS = [native.Moment.EXP_AVG, native.Moment.EXP_AVG_SQ]
FORMATS = [native.MomentFormat.F32, native.MomentFormat.BF16, native.MomentFormat.INT8]
ONE_NAN = 0x7FC00000
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@dataclass
class Codes:
    """A moment in a format, with its memory."""

    moment: native.Moment
    format: native.MomentFormat
    count: int
    offset: int = 0
    values: np.ndarray = field(init=False)
    scales: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        small = np.int8 if self.moment == native.Moment.EXP_AVG else np.uint8
        dtypes = {
            native.MomentFormat.F32: np.float32,
            native.MomentFormat.BF16: np.uint16,
            native.MomentFormat.INT8: small,
        }
        self.values = aligned(self.count, np.dtype(dtypes[self.format]), self.offset)
        self.scales = np.zeros(-(-self.count // BLOCK), np.float32)

    def native(self, start: int = 0) -> native.MomentCodes:
        values = self.values.ctypes.data + start * self.values.itemsize
        return native.MomentCodes(self.format, values, self.scales.ctypes.data + start // BLOCK * 4)

    def encode(self, x: np.ndarray, key: int = 1, first_element: int = 0) -> Codes:
        native.encode(self.moment, x.ctypes.data, self.native(), x.size, key, first_element)
        return self

    def decode(self) -> np.ndarray:
        out = np.empty(self.count, np.float32)
        native.decode(self.moment, self.native(), out.ctypes.data, self.count)
        return out

    def bytes(self) -> bytes:
        return self.values.tobytes() + self.scales.tobytes()


def split(master: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    param, remainder = np.empty(master.size, np.uint16), np.empty(master.size, np.int16)
    native.split_master(master.ctypes.data, param.ctypes.data, remainder.ctypes.data, master.size)
    return param, remainder


def join(param: np.ndarray, remainder: np.ndarray) -> np.ndarray:
    master = np.empty(param.size, np.float32)
    native.join_master(param.ctypes.data, remainder.ctypes.data, master.ctypes.data, param.size)
    return master


# Split masters.


@pytest.mark.usefixtures("isa")
def test_split_masters_are_joined_bit_by_bit():
    """Every sign, exponent and bf16 mantissa, with lower halves at all edges of rounding and some between; and every
    lower half under some upper ones."""
    rng = np.random.default_rng(2)
    edges = np.array([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF, *rng.integers(0, 2**16, 6)])
    uppers = np.array([0x0000, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x3FFF, 0x7F7E, 0x7F7F, 0x8000, 0xFF7F])
    all_uppers = np.add.outer(np.arange(2**16, dtype=np.uint32) << 16, edges.astype(np.uint32)).ravel()
    all_lowers = np.add.outer(uppers.astype(np.uint32) << 16, np.arange(2**16, dtype=np.uint32)).ravel()
    bits = np.concatenate([all_uppers, all_lowers]).astype(np.uint32)
    master = bits.view(np.float32)
    param, remainder = split(master)
    expected = np.where(np.isnan(master), np.uint32(ONE_NAN), bits)
    assert np.array_equal(join(param, remainder).view(np.uint32), expected)
    away = ((expected.astype(np.uint64) + 0x8000) >> 16).astype(np.uint16)
    assert np.array_equal(param, away)


@pytest.mark.usefixtures("isa")
def test_the_parameter_of_a_split_master_is_the_nearest_bf16():
    rng = np.random.default_rng(3)
    master = floats(rng, 50_000, special=0)
    param, _ = split(master)
    ties = (master.view(np.uint32) & 0xFFFF) == 0x8000
    error = np.abs((param.astype(np.uint32) << 16).view(np.float32).astype(np.float64) - master)
    for neighbour in (param - np.uint16(1), param + np.uint16(1)):
        other = np.abs((neighbour.astype(np.uint32) << 16).view(np.float32).astype(np.float64) - master)
        assert (error[~ties] < other[~ties]).all()


# Random rounding.


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("form", FORMATS[1:], ids=str)
def test_the_expected_value_is_kept(moment, form):
    """The mean over many keys is the value, as near as so many throws can tell; each throw gives one of two numbers."""
    rng = np.random.default_rng(4)
    x = np.abs(rng.standard_normal(4 * BLOCK).astype(np.float32)) ** 3 * 1e-4
    x[::BLOCK] = 5e-2  # the scale
    if moment == native.Moment.EXP_AVG:
        x *= rng.choice(np.array([-1, 1], np.float32), x.size)
    throws = 4000
    seen = np.stack([Codes(moment, form, x.size).encode(x, key=rng.integers(2**32)).decode() for _ in range(throws)])
    low, high = seen.min(0).astype(np.float64), seen.max(0).astype(np.float64)
    assert np.logical_or(seen == seen.min(0), seen == seen.max(0)).all()
    step = steps(moment, form, x)
    assert (high - low <= step * (1 + 1e-5)).all()
    # A square below the first code is rounded up to it, always.
    least = 0.05 / 255**4 if (moment, form) == (native.Moment.EXP_AVG_SQ, FORMATS[2]) else 0
    always_up = np.abs(x) < least * (1 - 1e-5)
    assert (np.abs(seen - x.astype(np.float64)) <= step * (1 + 1e-5) + 1e-6 * np.abs(x))[:, ~always_up].all()
    off = np.abs(seen.mean(0, dtype=np.float64) - x)
    deviation = (high - low) / 2 / np.sqrt(throws)
    never = 20 * step / throws  # an end that is as rare as that may not have been thrown at all
    assert (off <= 6 * deviation + never + 1e-6 * np.abs(x))[~always_up].all()
    assert np.array_equal(low[always_up], high[always_up])


def steps(moment: native.Moment, form: native.MomentFormat, x: np.ndarray) -> np.ndarray:
    """From one number of the format to the next, at x. (count,), float64."""
    magnitude = np.abs(x).astype(np.float64)
    if form == native.MomentFormat.BF16:
        return 2.0 ** (np.floor(np.log2(magnitude)) - 7)
    power, most = (2, 127) if moment == native.Moment.EXP_AVG else (4, 255)
    scale = np.repeat(magnitude.reshape(-1, BLOCK).max(1), BLOCK)
    code = np.minimum(np.floor((magnitude / scale) ** (1 / power) * most), most - 1)
    return scale * ((code + 1) ** power - code**power) / most**power


def test_random_rounding_depends_on_key_and_element_alone():
    """Not on the cut into runs; and other keys, other elements and other moments are rounded independently."""
    rng = np.random.default_rng(5)
    x = np.abs(floats(rng, 40 * BLOCK, special=0))
    for moment in MOMENTS:
        for form in FORMATS:
            whole = Codes(moment, form, x.size).encode(x, key=7, first_element=1000)
            parts = Codes(moment, form, x.size)
            for start, end in ((0, 3 * BLOCK), (3 * BLOCK, 4 * BLOCK), (4 * BLOCK, x.size)):
                native.encode(moment, x[start:end].ctypes.data, parts.native(start), end - start, 7, 1000 + start)
            assert parts.bytes() == whole.bytes()
    half = np.full(100_000, 1.00390625, np.float32)  # halfway between two bf16
    up = {
        (moment, key, first): Codes(moment, FORMATS[1], half.size).encode(half, key, first).values == 0x3F81
        for moment in MOMENTS
        for key in (1, 2)
        for first in (0, 100_000)
    }
    for one in up.values():
        assert abs(one.mean() - 0.5) < 0.01
        assert abs(np.logical_and(one[1:], one[:-1]).mean() - 0.25) < 0.01
    names = list(up)
    for index, name in enumerate(names):
        for other in names[:index]:
            assert abs(np.logical_and(up[name], up[other]).mean() - 0.25) < 0.01, (name, other)


def test_rounding_keys_differ_by_each_part():
    keys = {native.rounding_key(seed, step, unit) for seed in range(20) for step in range(20) for unit in range(20)}
    assert len(keys) > 7990  # of 8000; some of 2^32 may meet


# int8.


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_the_greatest_of_a_block_stays_and_others_are_near(moment):
    rng = np.random.default_rng(6)
    x = np.abs(floats(rng, 64 * BLOCK + 37, special=0))
    if moment == native.Moment.EXP_AVG:
        x *= rng.choice(np.array([-1, 1], np.float32), x.size)
    back = Codes(moment, FORMATS[2], x.size).encode(x).decode()
    for start in range(0, x.size, BLOCK):
        block, found = np.abs(x[start : start + BLOCK]), np.abs(back[start : start + BLOCK])
        scale = block.max()
        assert found[block.argmax()] == pytest.approx(scale, rel=1e-6)
        power, most = (2, 127) if moment == native.Moment.EXP_AVG else (4, 255)
        root = (block / scale).astype(np.float64) ** (1 / power) * most
        codes = (found / scale).astype(np.float64) ** (1 / power) * most
        assert (np.abs(codes - root) < 1.001).all()
    assert ((back > 0) == (x > 0))[back != 0].all()


@pytest.mark.usefixtures("isa")
def test_a_square_above_zero_never_becomes_zero():
    x = np.full(BLOCK, 1e-30, np.float32)
    x[0], x[1] = 1.0, 0.0
    for key in range(50):
        back = Codes(native.Moment.EXP_AVG_SQ, FORMATS[2], BLOCK).encode(x, key).decode()
        assert back[1] == 0
        assert (back[2:] > 0).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_a_block_with_a_value_that_is_not_finite_is_nan_and_others_are_not(moment, special):
    x = np.ones(3 * BLOCK, np.float32)
    x[BLOCK + 5] = special
    back = Codes(moment, FORMATS[2], x.size).encode(x).decode()
    assert (back.view(np.uint32)[BLOCK : 2 * BLOCK] == ONE_NAN).all()
    assert (back[:BLOCK] == 1).all()
    assert (back[2 * BLOCK :] == 1).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_blocks_of_almost_nothing_become_zero(moment):
    x = np.full(2 * BLOCK, 2.0**-101, np.float32)
    x[BLOCK:] = 0
    codes = Codes(moment, FORMATS[2], x.size).encode(x)
    assert (codes.scales == 0).all()
    assert (codes.decode() == 0).all()


# All instruction sets, and the fused step.


@SETTINGS
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.one_of(st.integers(0, 70), st.sampled_from([BLOCK - 1, BLOCK, 3 * BLOCK + 19])),
    offset=st.integers(0, 31),
    moment=st.sampled_from(MOMENTS),
    form=st.sampled_from(FORMATS),
    special=st.sampled_from([0.0, 0.0, 0.02, 1.0]),
)
def test_simd_codecs_have_the_bits_of_the_scalar_ones(simd, seed, count, offset, moment, form, special):
    rng = np.random.default_rng(seed)
    x = floats(rng, count, offset, special)
    results = []
    for isa in (native.Isa.SCALAR, simd):
        native.use_isa(isa)
        codes = Codes(moment, form, count, offset).encode(x, key=seed, first_element=seed // 3)
        results.append((codes.bytes(), codes.decode().tobytes()))
    assert results[0] == results[1]


@dataclass
class States:
    """All states of a run, and its parameters."""

    master: np.ndarray
    exp_avg: Codes
    exp_avg_sq: Codes
    param: np.ndarray

    @property
    def is_split(self) -> bool:
        return self.master.dtype == np.int16

    def step(self, hyper: kernels.Hyper, grad: np.ndarray, key: int, first_element: int = 0) -> None:
        native.step_compact(
            hyper,
            native.MasterFormat.SPLIT if self.is_split else native.MasterFormat.F32,
            self.master.ctypes.data,
            self.exp_avg.native(),
            self.exp_avg_sq.native(),
            grad.ctypes.data,
            native.DType.F32 if grad.dtype == np.float32 else native.DType.BF16,
            self.param.ctypes.data if self.is_split else 0,
            self.param.ctypes.data,
            native.DType.F32 if self.param.dtype == np.float32 else native.DType.BF16,
            self.param.size,
            key,
            first_element,
        )

    def bytes(self) -> list[bytes]:
        return [self.master.tobytes(), self.exp_avg.bytes(), self.exp_avg_sq.bytes(), self.param.tobytes()]


def states_of(
    master: np.ndarray, moments: tuple[np.ndarray, np.ndarray], forms: tuple[object, object], *, is_split: bool
) -> States:
    exp_avg, exp_avg_sq = (
        Codes(moment, form, x.size).encode(x) for moment, form, x in zip(MOMENTS, forms, moments, strict=True)
    )
    param, remainder = split(master)
    return States(remainder if is_split else master.copy(), exp_avg, exp_avg_sq, param)


@pytest.mark.parametrize("name", ["adamw", "sgd", "sgd-momentum", "sgd-first", "lion"])
@SETTINGS
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.one_of(st.integers(0, 70), st.sampled_from([BLOCK, 4 * BLOCK, 9 * BLOCK + 19])),
    grad_dtype=st.sampled_from([native.DType.F32, native.DType.BF16]),
    is_split=st.booleans(),
    forms=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
    special=st.sampled_from([0.0, 0.0, 0.02]),
)
def test_simd_steps_on_compact_states_have_the_bits_of_the_scalar_one(
    simd, name, seed, count, grad_dtype, is_split, forms, special
):
    rng = np.random.default_rng(seed)
    master, exp_avg = floats(rng, count, 0, special), floats(rng, count, 0, special)
    exp_avg_sq, grad = np.abs(floats(rng, count, 0, special)), of_dtype(grad_dtype, rng, count, 3, special)
    results = []
    for isa in (native.Isa.SCALAR, simd):
        native.use_isa(isa)
        states = states_of(master, (exp_avg, exp_avg_sq), forms, is_split=is_split)
        for step in range(3):
            states.step(HYPERS[name], grad, key=(seed + step) % 2**32, first_element=seed // 7)
        results.append(states.bytes())
    assert results[0] == results[1]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", HYPERS)
def test_split_masters_take_the_steps_of_fp32_masters(name):
    """Bit by bit, and states in fp32 those of the plain kernel."""
    rng = np.random.default_rng(8)
    count = 5 * BLOCK + 11
    plain = [floats(rng, count, special=0), floats(rng, count, special=0), np.abs(floats(rng, count, special=0))]
    forms = (native.MomentFormat.F32, native.MomentFormat.F32)
    both = [states_of(plain[0], (plain[1], plain[2]), forms, is_split=is_split) for is_split in (False, True)]
    param = np.zeros(count, np.uint16)
    for step in range(20):
        grad = floats(rng, count, special=0)
        addresses = [array.ctypes.data for array in (*plain, grad)]
        native.step(HYPERS[name], *addresses, native.DType.F32, param.ctypes.data, native.DType.BF16, count)
        for states in both:
            states.step(HYPERS[name], grad, key=step)
    for states in both:
        assert states.exp_avg.values.tobytes() == plain[1].tobytes()
        assert states.exp_avg_sq.values.tobytes() == plain[2].tobytes()
    assert both[0].master.tobytes() == plain[0].tobytes()
    assert join(both[1].param, both[1].master).tobytes() == plain[0].tobytes()


@pytest.mark.usefixtures("isa")
def test_a_step_in_parts_has_the_bits_of_one_step():
    rng = np.random.default_rng(9)
    count = 12 * BLOCK
    master, exp_avg, exp_avg_sq = (floats(rng, count, special=0) for _ in range(3))
    forms = (native.MomentFormat.INT8, native.MomentFormat.INT8)
    grad = halves(rng, count, special=0)
    whole = states_of(master, (exp_avg, np.abs(exp_avg_sq)), forms, is_split=True)
    parts = states_of(master, (exp_avg, np.abs(exp_avg_sq)), forms, is_split=True)
    whole.step(HYPERS["adamw"], grad, key=3, first_element=50)
    for start, end in ((0, BLOCK), (BLOCK, 7 * BLOCK), (7 * BLOCK, count)):
        native.step_compact(
            HYPERS["adamw"],
            native.MasterFormat.SPLIT,
            parts.master[start:].ctypes.data,
            parts.exp_avg.native(start),
            parts.exp_avg_sq.native(start),
            grad[start:].ctypes.data,
            native.DType.BF16,
            parts.param[start:].ctypes.data,
            parts.param[start:].ctypes.data,
            native.DType.BF16,
            end - start,
            3,
            50 + start,
        )
    assert parts.bytes() == whole.bytes()


@pytest.mark.usefixtures("isa")
def test_special_values_pass_through_bf16_moments():
    x = SPECIAL_BITS.view(np.float32)
    back = Codes(native.Moment.EXP_AVG, FORMATS[1], x.size).encode(x).decode()
    assert (back.view(np.uint32)[np.isnan(x)] == ONE_NAN).all()
    assert np.array_equal(back[np.isinf(x)], x[np.isinf(x)])
    assert np.array_equal(np.signbit(back[~np.isnan(x)]), np.signbit(x[~np.isnan(x)]))
