"""Models, budgets and rates that the tests of traces, schedules and the simulator share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import assume
from hypothesis import strategies as st

from angelptm.errors import CapacityError
from angelptm.plan import NOMINAL_RATES, Budgets, GradientDone, Plan, SsdBudget, Trace, make_plan, synthetic_trace
from angelptm.units import ParamSpec, UnitLayout, pack

PAGE = 65536
FREE = 2**45
RATES = replace(NOMINAL_RATES, ssd_read_bytes_per_s=3e9, ssd_write_bytes_per_s=1.5e9, ssd_mixed_bytes_per_s=2.2e9)


def layout_of(index: int, trainable: int, frozen: int = 0, itemsize: int = 4) -> UnitLayout:
    """A unit of up to two parameters with these numbers of elements."""
    params = [
        ParamSpec(f"unit{index}.{name}", (size,), name == "weight", ((f"unit{index}", name),))
        for name, size in (("weight", trainable), ("fixed", frozen))
        if size
    ]
    return pack(f"unit{index}", index, params, PAGE // itemsize)


@dataclass(frozen=True)
class Case:
    """A model as its layouts and sites."""

    layouts: tuple[UnitLayout, ...]
    sites: tuple[tuple[tuple[int, ...], int], ...]
    itemsize: int = 4
    seconds_per_element: float = 1e-9

    def trace(self) -> Trace:
        return synthetic_trace(
            self.layouts,
            self.sites,
            param_itemsize=self.itemsize,
            grad_itemsize=self.itemsize,
            moment_count=2,
            seconds_per_element=self.seconds_per_element,
        )

    def budgets(self, device: int, host: int, **more: object) -> Budgets:
        return replace(Budgets(PAGE, device * PAGE, host * PAGE, (SsdBudget("a", None, FREE),)), **more)

    def plan(self, device: int, host: int, **more: object) -> Plan:
        return make_plan(
            self.layouts,
            self.sites,
            self.budgets(device, host, **more),
            param_itemsize=self.itemsize,
            grad_itemsize=self.itemsize,
            moment_count=2,
        )


def blocks(count: int, pages: int = 2, itemsize: int = 4, seconds_per_element: float = 1e-9) -> Case:
    """``count`` equal units one after another."""
    elements = pages * PAGE // itemsize
    layouts = tuple(layout_of(index, elements, 0, itemsize) for index in range(count))
    return Case(layouts, tuple(((index,), 0) for index in range(count)), itemsize, seconds_per_element)


@st.composite
def models(draw: st.DrawFn, most_units: int = 7) -> Case:
    """Units of unequal sizes, some frozen in part or whole, in sites that nest, and some tied to a second site."""
    itemsize = draw(st.sampled_from([2, 4]))
    page = PAGE // itemsize
    sizes = st.one_of(st.integers(1, 4).map(lambda pages: pages * page), st.integers(1, 4 * page))
    kinds = st.sampled_from([(True, False), (True, False), (True, False), (True, True), (False, True)])
    layouts = []
    for index in range(draw(st.integers(1, most_units))):
        trainable, frozen = draw(kinds)
        layouts.append(layout_of(index, draw(sizes) if trainable else 0, draw(sizes) if frozen else 0, itemsize))
    order = [(index,) for index in range(len(layouts))]
    if len(order) > 2 and draw(st.booleans()):
        order[-1] = (*order[-1], draw(st.integers(0, len(order) - 2)))
    sites = []
    depth = 0
    for units in order:
        sites.append((units, depth))
        depth = draw(st.integers(0, depth + 1))
    return Case(tuple(layouts), tuple(sites), itemsize)


@st.composite
def planned(draw: st.DrawFn) -> tuple[Case, Trace, Plan]:
    """A model, its trace, and a plan under budgets that suffice."""
    case = draw(models())
    param = draw(st.sampled_from(["auto", "host", "ssd"]))
    try:
        plan = case.plan(draw(st.integers(1, 24)), draw(st.integers(8, 120)), param=param)
    except CapacityError:
        assume(False)
        raise
    return case, with_late_gradients(case.trace(), draw(st.integers(0, 3))), plan


def with_late_gradients(trace: Trace, uses: int) -> Trace:
    """The gradients of the first unit complete some uses later, as those of a tied embedding do."""
    late = [
        replace(done, use=min(done.use + uses, len(trace.uses) - 1)) if done.unit == 0 else done
        for done in trace.gradients
    ]
    return replace(trace, gradients=tuple(sorted(late, key=lambda done: (done.use, done.unit))))


def trained(trace: Trace) -> dict[int, GradientDone]:
    return {done.unit: done for done in trace.gradients}


def frames_of(plan: Plan, offsets: Sequence[int], unit: int) -> range:
    return range(offsets[unit], offsets[unit] + plan.units[unit].frame_count)
