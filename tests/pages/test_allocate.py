"""A plan's pages in a real store: as many frames and slots as planned, and folders left as they were found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import angelptm_native as native
import pytest

from angelptm.errors import ConfigError
from angelptm.pages import allocate_pages, open_store
from angelptm.plan import Budgets, Plan, SsdBudget, make_plan
from angelptm.units import ParamSpec, pack
from io_engine.errors import IoError

PAGE = 65536
OPTIONS = {"backend": "threads", "queue_depth": 4, "direct": True, "deadline_seconds": 20.0}


def plan_in(*folders: Path, **placement: object) -> Plan:
    budgets = Budgets(
        PAGE, 64 * PAGE, 48 * PAGE, tuple(SsdBudget(str(f), None, 2**40) for f in folders), queue_depth=4, param="host"
    )
    params = [ParamSpec("a", (300, 100), True, (("m", "a"),)), ParamSpec("b", (50, 7), False, (("m", "b"),))]
    layouts = [pack(f"unit{index}", index, params, PAGE // 2) for index in range(3)]
    sites = [((index,), 0) for index in range(3)]
    return make_plan(layouts, sites, replace(budgets, **placement), param_itemsize=2, grad_itemsize=4, moment_count=2)


@pytest.mark.parametrize(
    "placement", [{}, {"param": "ssd"}, {"states": 0.5}, {"states": "ssd", "grad": "ssd"}, {"param": "device"}]
)
def test_pages_take_the_frames_and_kinds_that_were_planned(tmp_path: Path, placement: dict[str, object]) -> None:
    plan = plan_in(tmp_path / "a", tmp_path / "b", **placement)
    store = open_store(plan, **OPTIONS)  # type: ignore[arg-type]
    pages = allocate_pages(store, plan)
    assert store.host_used_count == plan.home_frames
    assert store.host_frame_count == plan.host_frames
    assert store.slot_count == plan.ssd_slots
    assert store.slot_used_count == 0
    ids = []
    for unit, planned in zip(pages, plan.units, strict=True):
        for span, wanted in zip(unit.spans, planned.spans, strict=True):
            homes = {"host": native.Home.HOST, "ssd": native.Home.SSD}
            states = span.states
            assert {store.page_home(page) for page in states} == {homes[wanted.states_home]}
            assert [store.page_home(page) for page in span.grad] == [homes[home] for home in wanted.grad_homes]
            assert (span.param is None) == (wanted.param_home == "device")
            ids += [*states, *span.grad]
        ids += unit.params
        assert len(unit.params) == (0 if placement.get("param") == "device" else planned.frame_count)
    assert sorted(ids) == list(range(store.page_count))


def test_folders_made_for_a_store_that_cannot_be_opened_are_removed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    before = sorted(tmp_path.rglob("*"))
    # The second folder lies in the first, so the inner one must go before the outer one.
    plan = plan_in(tmp_path / "new", tmp_path / "new" / "deep" / "er", tmp_path / "file", states="ssd")
    with pytest.raises(ConfigError) as refused:
        open_store(plan, **OPTIONS)  # type: ignore[arg-type]
    assert refused.value.key == "tiers.ssd.2.path"
    assert sorted(tmp_path.rglob("*")) == before

    huge = replace(plan, ssd_slots_by_path=((str(tmp_path / "new" / "deep"), 2**31, 1.0),))
    with pytest.raises(IoError) as full:
        open_store(huge, **OPTIONS)  # type: ignore[arg-type]
    assert full.value.path.startswith(str(tmp_path / "new" / "deep"))
    assert sorted(tmp_path.rglob("*")) == before
