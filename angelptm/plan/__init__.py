"""Plans: where every page lives, and where each unit lies in the device arena.

Pure functions on pure data. Nothing here imports torch or the native module, so every planning test runs anywhere.
"""

from angelptm.plan.arena import ArenaPlacement, Window, place_units, windows_of
from angelptm.plan.budget import Budgets, CommitBudget, Plan, SpanPlan, SsdBudget, UnitPlan, make_plan
from angelptm.plan.describe import plan_rows, plan_summary

__all__ = [
    "ArenaPlacement",
    "Budgets",
    "CommitBudget",
    "Plan",
    "SpanPlan",
    "SsdBudget",
    "UnitPlan",
    "Window",
    "make_plan",
    "place_units",
    "plan_rows",
    "plan_summary",
    "windows_of",
]
