"""The sum of squares depends on the unit's elements alone: not on page size, nor on how many pages are handed over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from angelptm import kernels

BLOCK = kernels.GRAD_BLOCK


def plain_leaf(values: np.ndarray) -> float:
    """The leaf of csrc/kernels/gradient.h, in numpy, one lane at a time."""
    lanes = [0.0] * 16
    for lane in range(16):
        for value in values[lane::16].astype(np.float64).tolist():
            lanes[lane] += value * value
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
    return lanes[0]


def plain_tree(leaves: list[float]) -> float:
    """A binary tree over leaves padded with zeros to a power of two, one level at a time."""
    while len(leaves) > 1:
        leaves = leaves + [0.0] * (len(leaves) % 2)
        leaves = [leaves[i] + leaves[i + 1] for i in range(0, len(leaves), 2)]
    return leaves[0] if leaves else 0.0


def values_of(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * np.exp2(rng.integers(-20, 20, count))).astype(np.float32)


@pytest.mark.usefixtures("isa")
def test_accumulate_is_the_documented_tree():
    values = values_of(0, 5 * BLOCK + 37)
    leaves = [plain_leaf(values[i : i + BLOCK]) for i in range(0, values.size, BLOCK)]
    assert kernels.accumulate(np.empty_like(values), values, add=False).sum_squares == plain_tree(leaves)


@pytest.mark.usefixtures("isa")
def test_a_piece_of_any_length_is_the_documented_leaf():
    values = values_of(1, 100)
    for count in range(100):
        stats = kernels.accumulate(np.empty(count, np.float32), values[:count], add=False)
        assert stats.sum_squares == plain_leaf(values[:count])


@pytest.mark.usefixtures("isa")
def test_leaves_lie_at_multiples_of_the_block_wherever_a_run_starts():
    values = values_of(2, 2 * BLOCK)
    for before in (1, 100, BLOCK - 1):  # elements of the run that belong to its first leaf
        leaves = [values[:before], values[before : before + BLOCK], values[before + BLOCK :]]
        expected = plain_tree([0.0, *map(plain_leaf, leaves)])
        found = kernels.accumulate(np.empty_like(values), values, add=False, first_element=2 * BLOCK - before)
        assert found.sum_squares == expected


@pytest.mark.usefixtures("isa")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    blocks=st.integers(1, 21),
    tail=st.integers(0, BLOCK - 1),
    page_blocks=st.sampled_from([1, 2, 4, 8, 16, 32]),
)
def test_a_norm_does_not_depend_on_page_size(seed, blocks, tail, page_blocks):
    values = values_of(seed, (blocks - 1) * BLOCK + tail)
    stored = np.empty_like(values)
    whole = kernels.accumulate(stored, values, add=False).sum_squares
    page = page_blocks * BLOCK
    nodes = [
        kernels.accumulate(stored[i : i + page], values[i : i + page], add=False, first_element=i).sum_squares
        for i in range(0, values.size, page)
    ]
    assert kernels.tree_sum(nodes) == kernels.tree_sum(np.array(nodes)) == whole


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    leaves=st.lists(st.floats(0, 1e300), max_size=70),
    levels=st.integers(0, 7),
    first_group=st.integers(0, 2**20),
)
def test_groups_of_any_size_anywhere_give_the_root(leaves, levels, first_group):
    group = 1 << levels
    first = first_group * group
    nodes = [kernels.tree_sum(leaves[i : i + group], first + i) for i in range(0, len(leaves), group)]
    assert kernels.tree_sum(nodes, first_group) == kernels.tree_sum(leaves, first)
    if first == 0:
        assert kernels.tree_sum(leaves) == plain_tree(list(leaves))


def test_a_plain_running_sum_would_differ():
    """The values of these tests tell one order of additions from another."""
    values = values_of(0, 4 * BLOCK).astype(np.float64)
    running = 0.0
    for square in (values * values).tolist():
        running += square
    stored = np.empty(values.size, np.float32)
    assert running != kernels.accumulate(stored, values.astype(np.float32), add=False).sum_squares
