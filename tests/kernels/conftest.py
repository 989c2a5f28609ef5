"""Fixtures of the kernel tests: every instruction set of this CPU in turn."""

from __future__ import annotations

from collections.abc import Iterator

import angelptm_native as native
import pytest

SIMD = [native.Isa.AVX2, native.Isa.AVX512]


@pytest.fixture(autouse=True)
def _restore_isa() -> Iterator[None]:
    before = native.isa_in_use()
    yield
    native.use_isa(before)


def _select(isa: native.Isa) -> native.Isa:
    if not native.isa_supported(isa):
        pytest.skip(f"this CPU has no {native.isa_name(isa)}")
    native.use_isa(isa)
    return isa


@pytest.fixture(params=SIMD, ids=native.isa_name)
def simd(request: pytest.FixtureRequest) -> native.Isa:
    """Each SIMD instruction set, to be compared with Isa.SCALAR."""
    return _select(request.param)


@pytest.fixture(params=[native.Isa.SCALAR, *SIMD], ids=native.isa_name)
def isa(request: pytest.FixtureRequest) -> native.Isa:
    """Each instruction set, in use."""
    return _select(request.param)
