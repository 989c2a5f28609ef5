"""``angelptm plan``."""

from __future__ import annotations

import json as json_format
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from angelptm.cli.train import ConfigPath, Overrides
from angelptm.config import load_config
from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of
from angelptm.model.materialize import build_model
from angelptm.plan import Plan, plan_rows, plan_summary
from angelptm.sizes import format_bytes
from angelptm.train.resume import as_trained


def plan(
    config: ConfigPath,
    set_: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Says how many bytes of each kind live on each tier, and whether it fits; allocates nothing."""
    loaded = as_trained(load_config(config, set_ or []))
    with Console(stderr=True).status("building the model without its values"):
        model = build_model(loaded)
    made = plan_of(*lay_out(model, loaded), loaded, buffer_bytes_of(model))
    if json:
        print(json_format.dumps(plan_summary(made)))
    else:
        show_plan(made, Console())


def show_plan(plan: Plan, console: Console) -> None:
    """The table of kinds and tiers, and the sizes behind it."""
    parameters = sum(unit.layout.numel for unit in plan.units)
    table = Table(title=f"{parameters / 1e6:.1f} M parameters in {len(plan.units)} units: bytes by kind and tier")
    for column in ("kind", "device", "host", "ssd"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    rows = plan_rows(plan)
    for row in rows:
        table.add_row(
            str(row["kind"]), *(format_bytes(int(row[t])) if row[t] else "-" for t in ("device", "host", "ssd"))
        )
    table.add_section()
    totals = {tier: sum(int(row[tier]) for row in rows) for tier in ("device", "host", "ssd")}
    table.add_row("total", *(format_bytes(size) for size in totals.values()))
    budget = (plan.device_frames * plan.page_bytes, plan.host_frames * plan.page_bytes, totals["ssd"])
    table.add_row("taken", *(format_bytes(size) for size in budget))
    console.print(table)
    console.print(
        f"fits. {plan.update_threads} updating threads with {plan.ring_depth} spans in flight each; "
        f"pages of {format_bytes(plan.page_bytes)}.",
        highlight=False,
    )
