"""make_plan over random models and budgets: where pages live, what is refused, and whether the refusal is true."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from angelptm.errors import CapacityError
from angelptm.plan import Budgets, Plan, SsdBudget, make_plan, plan_rows, plan_summary
from angelptm.states.formats import FP32, StateFormats
from angelptm.states.layout import choose_page_elements
from angelptm.units import ParamSpec, UnitLayout, pack

SETTINGS = settings(max_examples=150, deadline=None)
PAGE = 65536
FREE = 2**40


@dataclass(frozen=True)
class Case:
    """A model of units in a row, its precision and its optimizer."""

    units: tuple[tuple[tuple[int, bool], ...], ...]  # (numel, trainable) of each parameter
    param_itemsize: int
    grad_itemsize: int
    moment_count: int
    states: StateFormats = FP32  # of every other parameter

    def layouts(self, page_bytes: int = PAGE) -> list[UnitLayout]:
        states = replace(self.states, master="fp32") if self.param_itemsize == 4 else self.states
        units = [
            [
                ParamSpec(f"p{i}", (n,), train, ((f"m{u}", f"p{i}"),), FP32 if i % 2 else states)
                for i, (n, train) in enumerate(unit)
            ]
            for u, unit in enumerate(self.units)
        ]
        elements = choose_page_elements(
            [(math.prod(one.shape), one.states) for unit in units for one in unit if one.trainable],
            page_bytes=page_bytes,
            param_itemsize=self.param_itemsize,
            grad_itemsize=self.grad_itemsize,
            moment_count=self.moment_count,
        )
        return [pack(f"unit{u}", u, unit, elements) for u, unit in enumerate(units)]

    def plan(self, budgets: Budgets) -> Plan:
        return make_plan(
            self.layouts(budgets.page_bytes),
            [((unit,), 0) for unit in range(len(self.units))],
            budgets,
            param_itemsize=self.param_itemsize,
            grad_itemsize=self.grad_itemsize,
            moment_count=self.moment_count,
        )


numels = st.one_of(st.integers(1, 300), st.integers(1, 6 * PAGE // 4))
units = st.lists(st.tuples(numels, st.sampled_from([True, True, True, False])), min_size=1, max_size=3).map(tuple)
cases = st.builds(
    Case,
    st.lists(units, min_size=1, max_size=5).map(tuple),
    st.sampled_from([2, 4]),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 2]),
    st.one_of(
        st.just(FP32),
        st.builds(
            StateFormats,
            st.sampled_from(["fp32", "split"]),
            st.sampled_from(["fp32", "bf16", "int8"]),
            st.sampled_from(["fp32", "bf16", "int8"]),
        ),
    ),
)
budgets_of = st.builds(
    Budgets,
    page_bytes=st.just(PAGE),
    device_bytes=st.integers(1, 40).map(lambda pages: pages * PAGE),
    host_bytes=st.integers(1, 160).map(lambda pages: pages * PAGE),
    ssd=st.sampled_from(
        [(), (SsdBudget("a", None, FREE),), (SsdBudget("a", None, FREE), SsdBudget("b", None, FREE, 3.0))]
    ),
    param=st.sampled_from(["auto", "auto", "device", "host", "ssd"]),
    grad=st.sampled_from(["auto", "auto", "host", "ssd"]),
    states=st.sampled_from(["auto", "auto", "host", "ssd", 0.0, 0.3, 1.0]),
    update_threads=st.sampled_from([None, None, 1, 3]),
    ring_depth=st.sampled_from([None, None, 1, 4]),
    queue_depth=st.sampled_from([1, 4, 16]),
    cores=st.sampled_from([1, 2, 8]),
)


def plan_or_assume(case: Case, budgets: Budgets) -> Plan:
    try:
        return case.plan(budgets)
    except CapacityError:
        assume(False)
        raise


def homes(plan: Plan) -> Counter[tuple[str, str]]:
    """(kind, tier) → pages, counted from the spans alone."""
    found: Counter[tuple[str, str]] = Counter()
    for unit in plan.units:
        for span in unit.spans:
            found["PARAM", span.param_home] += 1
            for home in span.grad_homes:
                found["GRAD", home] += 1
            for page in span.states.pages:
                found[page.kind, span.states_home] += 1
        for home in unit.frozen_homes:
            found["PARAM", home] += 1
    return found


@SETTINGS
@given(cases, budgets_of)
def test_pages_at_home_ring_and_staging_fit_the_host_pool(case: Case, budgets: Budgets) -> None:
    plan = plan_or_assume(case, budgets)
    assert plan.host_frames <= budgets.host_bytes // PAGE
    assert plan.home_frames + plan.ring_frames + plan.staging_frames <= plan.host_frames
    assert plan.home_frames == sum(pages for (_, tier), pages in homes(plan).items() if tier == "host")
    moving = any(tier == "ssd" for _, tier in homes(plan))
    assert plan.staging_frames >= (2 if moving else 0)
    assert plan.device_frames * PAGE <= budgets.device_bytes
    assert plan.arena.peak_frames <= plan.device_frames


@SETTINGS
@given(cases, budgets_of)
def test_every_page_has_exactly_one_home_and_kinds_count_them(case: Case, budgets: Budgets) -> None:
    plan = plan_or_assume(case, budgets)
    for unit, layout in zip(plan.units, case.layouts(), strict=True):
        elements = plan.page_elements
        assert sum(span.elements for span in unit.spans) == layout.trainable_elements
        assert all(span.elements == elements for span in unit.spans[:-1])
        assert len(unit.frozen_homes) == -(-layout.frozen_elements // elements)
        assert unit.frame_count == len(unit.spans) + len(unit.frozen_homes)
        for span in unit.spans:
            assert len(span.grad_homes) == -(-span.elements // plan.grad_page_elements)
            assert {span.states_home, *span.grad_homes} <= {"host", "ssd"}
            assert span.param_home in ("device", "host", "ssd")
    counted = homes(plan)
    for kind, tiers in plan.kind_bytes.items():
        for tier, size in tiers.items():
            assert size == counted[kind, tier] * PAGE
    assert sum(sum(tiers.values()) for tiers in plan.kind_bytes.values()) == sum(counted.values()) * PAGE


@SETTINGS
@given(cases, budgets_of)
def test_placement_that_was_asked_for_is_what_is_planned(case: Case, budgets: Budgets) -> None:
    plan = plan_or_assume(case, budgets)
    counted = homes(plan)
    for kind, wish in (("PARAM", budgets.param), ("GRAD", budgets.grad), ("MASTER", budgets.states)):
        found = {tier for other, tier in counted if other == kind}
        if isinstance(wish, str) and wish != "auto":
            assert found <= {wish}
    if isinstance(budgets.states, float):
        states = Counter({tier: pages for (kind, tier), pages in counted.items() if kind not in ("PARAM", "GRAD")})
        assert states["host"] <= budgets.states * states.total()
        # Dealt span by span, so less than one span of host room is left over.
        largest = (1 + case.moment_count) * -(-plan.page_elements * 4 // PAGE)
        assert states["host"] > budgets.states * states.total() - largest - 1


@SETTINGS
@given(cases, budgets_of, st.sampled_from(["host", "device"]), st.integers(1, 80))
def test_more_memory_never_means_more_disk(case: Case, budgets: Budgets, tier: str, extra: int) -> None:
    assume(budgets.ssd)
    small = plan_or_assume(case, budgets)
    field = f"{tier}_bytes"
    large = case.plan(replace(budgets, **{field: getattr(budgets, field) + extra * PAGE}))
    for plan in (small, large):
        assert plan.ssd_slots * PAGE >= sum(tiers["ssd"] for tiers in plan.kind_bytes.values())
    assert sum(t["ssd"] for t in large.kind_bytes.values()) <= sum(t["ssd"] for t in small.kind_bytes.values())
    assert large.ssd_slots <= small.ssd_slots


@SETTINGS
@given(cases, budgets_of)
def test_slots_cover_every_write_in_flight(case: Case, budgets: Budgets) -> None:
    plan = plan_or_assume(case, budgets)
    live = sum(pages for (_, tier), pages in homes(plan).items() if tier == "ssd")
    if live == 0:
        assert plan.ssd_slots == 0
        assert plan.ssd_slots_by_path == ()
    else:
        written = plan.ring_frames // plan.ring_depth * plan.write_depth
        assert plan.ssd_slots >= live + written + budgets.queue_depth
        assert sum(slots for _, slots, _ in plan.ssd_slots_by_path) == plan.ssd_slots


@SETTINGS
@given(cases, budgets_of)
def test_refusal_names_what_is_enough_and_one_page_less_is_not(case: Case, budgets: Budgets) -> None:
    try:
        case.plan(budgets)
    except CapacityError as refused:
        error = refused
    else:
        return
    assert error.tier in ("device", "host", "ssd")
    assert error.needed_bytes > error.available_bytes
    for part in (f"tier {error.tier}", str(error.needed_bytes), str(error.available_bytes), error.remedy):
        assert part in str(error)
    assert error.remedy
    if error.tier == "ssd":
        assert not budgets.ssd
        assert "tiers.ssd" in error.remedy
        return
    assert error.available_bytes <= getattr(budgets, f"{error.tier}_bytes")

    def refused_tier(size: int) -> str | None:
        try:
            case.plan(replace(budgets, **{f"{error.tier}_bytes": size}))
        except CapacityError as again:
            return again.tier
        return None

    assert refused_tier(error.needed_bytes) != error.tier
    if error.tier == "host":  # exact; packing of the arena may succeed below what a refusal promises
        assert refused_tier(error.needed_bytes - PAGE) == "host"


def linear(pages: int, count: int = 4) -> Case:
    """``count`` units of ``pages`` fp32 pages each, AdamW."""
    return Case(((((pages * PAGE // 4), True),),) * count, 4, 4, 2)


def test_arena_smaller_than_the_largest_unit_is_refused_by_name() -> None:
    with pytest.raises(CapacityError, match="unit0") as refused:
        linear(3).plan(Budgets(PAGE, 2 * PAGE, 1000 * PAGE))
    assert (refused.value.tier, refused.value.needed_bytes, refused.value.available_bytes) == (
        "device",
        3 * PAGE,
        2 * PAGE,
    )
    assert linear(3).plan(Budgets(PAGE, 3 * PAGE, 1000 * PAGE)).arena.peak_frames == 3


def test_host_takes_parameters_first_then_gradients_then_states() -> None:
    case = linear(4, count=8)  # 32 PARAM, 32 GRAD and 96 state pages
    budgets = Budgets(PAGE, 8 * PAGE, 0, (SsdBudget("a", None, FREE),), param="auto")
    seen = []
    for frames in range(20, 260, 4):
        plan = case.plan(replace(budgets, host_bytes=frames * PAGE))
        on_host = [plan.kind_bytes[kind]["host"] // PAGE for kind in ("PARAM", "GRAD", "MASTER")]
        assert on_host[1] == 0 or on_host[0] == 32
        assert on_host[2] == 0 or on_host[1] == 32
        seen.append(sum(on_host))
    assert seen == sorted(seen)
    assert seen[0] > 0
    assert seen[-1] == 96


def test_everything_in_memory_needs_no_slot_and_no_more_frames_than_pages() -> None:
    plan = linear(1).plan(Budgets(PAGE, 64 * PAGE, 10000 * PAGE, (SsdBudget("a", None, FREE),)))
    assert plan.ssd_slots == 0
    assert plan.host_frames == plan.home_frames + plan.ring_frames + 16


def ssd_plan(*folders: SsdBudget) -> Plan:
    budgets = Budgets(PAGE, 8 * PAGE, 64 * PAGE, folders, param="ssd", grad="ssd", states="ssd")
    return linear(2, count=10).plan(budgets)


def test_slots_are_spread_over_folders_by_weight() -> None:
    plan = ssd_plan(SsdBudget("fast", None, FREE, 3.0), SsdBudget("slow", None, FREE, 1.0))
    (fast, fast_slots, _), (slow, slow_slots, _) = plan.ssd_slots_by_path
    assert (fast, slow) == ("fast", "slow")
    assert fast_slots + slow_slots == plan.ssd_slots
    assert abs(fast_slots - 3 * slow_slots) <= 4


def test_folder_that_is_full_passes_its_share_on() -> None:
    plan = ssd_plan(SsdBudget("small", 5 * PAGE + 100, FREE), SsdBudget("large", None, FREE))
    assert [slots for _, slots, _ in plan.ssd_slots_by_path] == [5, plan.ssd_slots - 5]


def test_sizes_of_the_folders_are_a_border() -> None:
    slots = ssd_plan(SsdBudget("a", None, FREE)).ssd_slots
    fits = ssd_plan(SsdBudget("a", 7 * PAGE, FREE), SsdBudget("b", (slots - 7) * PAGE, FREE))
    assert sum(count for _, count, _ in fits.ssd_slots_by_path) == slots
    with pytest.raises(CapacityError, match=r"tiers\.ssd\[\]\.size") as refused:
        ssd_plan(SsdBudget("a", 7 * PAGE, FREE), SsdBudget("b", (slots - 7) * PAGE - 1, FREE))
    assert (refused.value.tier, refused.value.needed_bytes) == ("ssd", slots * PAGE)
    assert refused.value.available_bytes == (slots - 1) * PAGE


def test_full_disk_is_refused_with_its_free_space() -> None:
    with pytest.raises(CapacityError, match="Free disk space") as refused:
        ssd_plan(SsdBudget("a", None, 3 * PAGE))
    assert refused.value.available_bytes == 3 * PAGE
    with pytest.raises(CapacityError, match="size given for a") as refused:
        ssd_plan(SsdBudget("a", 9 * PAGE, 3 * PAGE))
    assert (refused.value.needed_bytes, refused.value.available_bytes) == (9 * PAGE, 3 * PAGE)


@SETTINGS
@given(cases, budgets_of)
def test_summary_and_rows_show_the_plan(case: Case, budgets: Budgets) -> None:
    plan = plan_or_assume(case, budgets)
    summary = plan_summary(plan)
    assert summary["parameters"] == sum(numel for unit in case.units for numel, _ in unit)
    host = summary["host"]
    assert isinstance(host, dict)
    assert host["home_bytes"] + host["ring_bytes"] + host["staging_bytes"] == plan.host_frames * PAGE
    rows = plan_rows(plan)
    assert [row["kind"] for row in rows] == [*plan.kind_bytes, "on the move"]
    assert sum(int(row["ssd"]) for row in rows) == plan.ssd_slots * PAGE
    assert sum(int(row["host"]) for row in rows) <= budgets.host_bytes
