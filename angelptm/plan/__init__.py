"""Plans: where every page lives, where each unit lies in the device arena, and which move is issued when.

Pure functions on pure data. Nothing here imports torch or the native module, so every planning test runs anywhere.

In reading order: ``budgets`` is what the user allows; ``placing`` gives pages their homes, with ``shape``, ``pool`` and
``slots``; ``placed`` is what it comes to; ``trace`` is a step that ran; ``residence`` says how long units stay
in the arena; ``moves`` makes the ``schedule`` of a step; ``simulate`` says what the step takes on a machine of given
``rates``; ``choose`` takes the fastest of a few schedules.
"""

from angelptm.plan.arena import ArenaPlacement, Window, place_units, windows_of
from angelptm.plan.budgets import Budgets, CommitBudget, SsdBudget, SweepBudget
from angelptm.plan.channels import Event
from angelptm.plan.choose import choose, plan_from_trace
from angelptm.plan.describe import plan_rows, plan_summary
from angelptm.plan.jsonfile import PlanFileError
from angelptm.plan.moves import make_schedule, planned_offsets
from angelptm.plan.placed import PEER, Plan, SpanPlan, UnitPlan
from angelptm.plan.placing import make_plan
from angelptm.plan.prediction import Prediction, Settings
from angelptm.plan.rates import NOMINAL_RATES, ChannelRates, Rates, rates_for
from angelptm.plan.schedule import CopyOut, Fetch, Schedule, Traffic, WriteBack
from angelptm.plan.shares import ALONE, Party, Share, shares_of
from angelptm.plan.simulate import simulate
from angelptm.plan.trace import GradientDone, Trace, Use, synthetic_trace

__all__ = [
    "ALONE",
    "NOMINAL_RATES",
    "PEER",
    "ArenaPlacement",
    "Budgets",
    "ChannelRates",
    "CommitBudget",
    "CopyOut",
    "Event",
    "Fetch",
    "GradientDone",
    "Party",
    "Plan",
    "PlanFileError",
    "Prediction",
    "Rates",
    "Schedule",
    "Settings",
    "Share",
    "SpanPlan",
    "SsdBudget",
    "SweepBudget",
    "Trace",
    "Traffic",
    "UnitPlan",
    "Use",
    "Window",
    "WriteBack",
    "choose",
    "make_plan",
    "make_schedule",
    "place_units",
    "plan_from_trace",
    "plan_rows",
    "plan_summary",
    "planned_offsets",
    "rates_for",
    "shares_of",
    "simulate",
    "synthetic_trace",
    "windows_of",
]
