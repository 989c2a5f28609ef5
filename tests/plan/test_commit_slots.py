"""Slots for commits: a model of who holds which slot, driven through every order of events, never needs more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelptm.errors import CapacityError
from angelptm.plan import Budgets, CommitBudget, Plan, SsdBudget

from .test_budget import FREE, PAGE, SETTINGS, Case, budgets_of, cases, homes, linear, plan_or_assume

commits_of = st.builds(
    CommitBudget,
    keep=st.integers(1, 4),
    folder=st.just(SsdBudget("commits", None, FREE)),
    other_bytes=st.integers(0, 3 * PAGE),
)


def with_commits(budgets: Budgets, commits: CommitBudget | None) -> Budgets:
    return replace(budgets, commits=commits)


def changing_pages(plan: Plan, tiers: tuple[str, ...]) -> int:
    """Pages of a commit that each step changes: states, and trainable parameters where masters are made of them."""
    found = sum(pages for (kind, home), pages in homes(plan).items() if home in tiers and kind not in ("PARAM", "GRAD"))
    if plan.splits_masters:
        found += sum(span.param_home in tiers for unit in plan.units for span in unit.spans)
    return found


def live_slots(plan: Plan) -> int:
    return sum(pages for (_, tier), pages in homes(plan).items() if tier == "ssd")


class Holders:
    """Slots in use of a run whose every page changes at each step, as the worst one does."""

    def __init__(self, plan: Plan, commits: CommitBudget) -> None:
        self.plan, self.keep = plan, commits.keep
        self.on_ssd = changing_pages(plan, ("ssd",))
        self.on_host = changing_pages(plan, ("host", "device"))
        self.other = -(-commits.other_bytes // PAGE)
        self.fixed = sum(home != "ssd" for unit in plan.units for home in unit.frozen_homes)
        self.step = 0
        self.kept: list[int] = []
        self.copied_at: int | None = None  # the step whose host pages the page table has copies of
        self.peak = 0

    def used(self, extra: int = 0) -> int:
        states = {self.step, *self.kept}  # the current ones and those of each commit
        copies = {*self.kept, *([] if self.copied_at is None else [self.copied_at])}
        used = live_slots(self.plan) + (len(states) - 1) * self.on_ssd
        used += len(copies) * self.on_host + len(self.kept) * self.other + self.fixed + extra
        self.peak = max(self.peak, used)
        return used

    def train(self) -> None:
        self.used()  # what is in flight comes on top; a page published gives its former slot back, or a commit has it
        self.step += 1
        self.used()

    def commit(self, fails: bool, in_flight: int) -> None:
        rolling = 0
        if self.copied_at is not None and self.copied_at not in self.kept and self.copied_at != self.step:
            rolling = min(self.on_host, in_flight)  # new copies replace those of a failed commit some at a time
            self.used(rolling)
        self.copied_at = self.step
        self.used(rolling + self.other)  # its buffers are written last
        if not fails:
            self.kept = sorted({*self.kept, self.step})
            self.used(rolling)
            self.kept = self.kept[-self.keep :]


@SETTINGS
@given(
    cases,
    budgets_of,
    commits_of,
    st.lists(st.sampled_from(["train", "commit", "fail"]), max_size=16),
)
def test_no_order_of_steps_and_commits_needs_more_slots_than_planned(
    case: Case, budgets: Budgets, commits: CommitBudget, events: list[str]
) -> None:
    plan = plan_or_assume(case, with_commits(budgets, commits))
    holders = Holders(plan, commits)
    for event in events:
        if event == "train":
            holders.train()
        else:
            holders.commit(event == "fail", budgets.queue_depth)
    in_flight = plan.ssd_slots - plan.commit_slots - live_slots(plan)
    written = plan.ring_frames // plan.ring_depth * plan.write_depth
    assert in_flight >= (0 if live_slots(plan) == 0 else written + budgets.queue_depth)
    assert holders.peak <= plan.ssd_slots - in_flight
    assert sum(slots for _, slots, _ in plan.ssd_slots_by_path) == plan.ssd_slots


@SETTINGS
@given(cases, budgets_of, commits_of)
def test_commits_take_slots_and_one_frame_and_change_nothing_else(
    case: Case, budgets: Budgets, commits: CommitBudget
) -> None:
    plan = plan_or_assume(case, with_commits(budgets, commits))
    assert plan.saver_frames == 1
    without = plan_or_assume(case, with_commits(budgets, None))
    assert (without.commit_slots, without.saver_frames) == (0, 0)
    if homes(plan) == homes(without):
        assert plan.ssd_slots - plan.commit_slots == without.ssd_slots
    assert plan.home_frames + plan.ring_frames + plan.staging_frames + plan.saver_frames <= plan.host_frames


@SETTINGS
@given(cases, budgets_of, commits_of)
def test_each_commit_more_costs_one_set_of_states(case: Case, budgets: Budgets, commits: CommitBudget) -> None:
    plan = plan_or_assume(case, with_commits(budgets, commits))
    more = case.plan(with_commits(budgets, replace(commits, keep=commits.keep + 1)))
    states = changing_pages(plan, ("ssd", "host", "device"))
    assert more.commit_slots - plan.commit_slots == states + -(-commits.other_bytes // PAGE)


def test_without_an_ssd_tier_the_checkpoint_folder_takes_the_copies() -> None:
    commits = CommitBudget(1, SsdBudget("commits", None, FREE))
    plan = linear(2).plan(Budgets(PAGE, 64 * PAGE, 1000 * PAGE, commits=commits))
    assert [path for path, _, _ in plan.ssd_slots_by_path] == ["commits"]
    assert plan.ssd_slots == plan.commit_slots


def test_refusal_says_what_commits_take_and_offers_to_keep_fewer() -> None:
    commits = CommitBudget(3, SsdBudget("commits", None, FREE))
    budgets = Budgets(PAGE, 8 * PAGE, 64 * PAGE, (SsdBudget("a", None, FREE),), "ssd", "ssd", "ssd", commits=commits)
    needed = linear(2).plan(budgets).ssd_slots
    small = replace(budgets, ssd=(SsdBudget("a", (needed - 1) * PAGE, FREE),))
    with pytest.raises(CapacityError, match=r"of it for commits.*Or lower checkpoint\.keep \(now 3\)") as refused:
        linear(2).plan(small)
    assert refused.value.needed_bytes == needed * PAGE
    assert linear(2).plan(replace(budgets, ssd=(SsdBudget("a", needed * PAGE, FREE),))).ssd_slots == needed
