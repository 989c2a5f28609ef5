"""Pages are dealt to ranks: each page to one, in shares that differ by a page, in plans that fit together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from angelptm.errors import ConfigError
from angelptm.plan import PEER, Budgets, Plan, Share, SsdBudget, make_plan, shares_of
from angelptm.plan.shares import owners_of
from angelptm.units.layout import ParamSpec, pack

PAGE = 64 * 2**10
ELEMENTS = PAGE // 4
SIZES = [3 * ELEMENTS, ELEMENTS // 2, 7 * ELEMENTS + 5, ELEMENTS]
BUDGETS = Budgets(PAGE, 64 * PAGE, 64 * PAGE, (SsdBudget("/ssd", None, 2**40),), param="host", states="ssd")


def plan_of(share: Share) -> Plan:
    """Of four units, the last of which is frozen."""
    layouts = [
        pack(f"u{index}", index, [ParamSpec(f"u{index}.w", (size,), index != 3, ((f"u{index}", "w"),))], ELEMENTS)
        for index, size in enumerate(SIZES)
    ]
    sites = [((index,), 0) for index in range(len(SIZES))]
    return make_plan(layouts, sites, replace(BUDGETS, share=share), param_itemsize=4, grad_itemsize=4, moment_count=2)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_shares_differ_by_a_page(count: int) -> None:
    owners = [owner for unit in owners_of([3, 1, 8, 1], count) for owner in unit]
    held = [owners.count(rank) for rank in range(count)]
    assert sum(held) == 13
    assert max(held) - min(held) <= 1


@pytest.mark.parametrize("count", [2, 3, 7])
def test_plans_of_all_ranks_have_each_page_once_and_one_arena(count: int) -> None:
    whole, parts = plan_of(Share()), [plan_of(Share(rank, count)) for rank in range(count)]
    for part in parts:
        assert part.arena == whole.arena
    for kind, tiers in whole.kind_bytes.items():
        for tier, size in tiers.items():
            assert sum(part.kind_bytes[kind][tier] for part in parts) == size, (kind, tier)
    for unit, of_whole in enumerate(whole.units):
        for span in range(len(of_whole.spans)):
            assert [part.units[unit].spans[span].is_mine for part in parts].count(True) == 1
        for homes in zip(*(part.units[unit].frozen_homes for part in parts)):
            assert sum(home != PEER for home in homes) == 1


@pytest.mark.parametrize("asked", [3, 8])
def test_copies_that_do_not_divide_the_ranks_are_refused(asked: int) -> None:
    with pytest.raises(ConfigError, match=r"distributed\.shard: found \d, expected .* divides all 4"):
        shares_of(asked, 4, 4)
    assert [shares_of(one, 4, 2) for one in ("all", "node", 1, 2)] == [4, 2, 1, 2]
