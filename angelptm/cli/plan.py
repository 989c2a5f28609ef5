"""``angelptm plan``."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from angelptm.cli.train import ConfigPath, Overrides
from angelptm.config import Config, load_config
from angelptm.errors import DataError
from angelptm.plan import (
    Plan,
    Prediction,
    Rates,
    Trace,
    choose,
    plan_from_trace,
    plan_rows,
    plan_summary,
)
from angelptm.sizes import format_bytes


def plan(
    config: ConfigPath,
    set_: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="RUN",
            help="The folder of a run of this model, whose traced step and measured rates say what a step will take.",
        ),
    ] = None,
) -> None:
    """Says how many bytes of each kind live on each tier, and whether it fits; allocates nothing."""
    from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of  # not above, as they import torch
    from angelptm.model.materialize import build_model
    from angelptm.train.resume import as_trained

    loaded = as_trained(load_config(config, set_ or []))
    prediction = None
    if trace is not None:
        with Console(stderr=True).status("simulating steps"):
            made, prediction = _predict(loaded, trace)
    else:
        with Console(stderr=True).status("building the model without its values"):
            model = build_model(loaded)
        made = plan_of(*lay_out(model, loaded), loaded, buffer_bytes_of(model))
    if json:
        predicted = {} if prediction is None else {"prediction": prediction.facts()}
        print(json_format.dumps({**plan_summary(made), **predicted}))
        return
    show_plan(made, Console())
    if prediction is not None:
        print(prediction.describe())


def _predict(config: Config, run: Path) -> tuple[Plan, Prediction]:
    """The plan of a run's model under the config's budgets, and what a step takes then. The model is not built: what
    is not in the trace, the buffers that commits hold, counts as nothing."""
    from angelptm.engine.planning import settings_of
    from angelptm.engine.setup import ITEMSIZE, budgets_of

    for name in ("trace.json", "rates.json"):
        if not (run / name).is_file():
            raise DataError(
                str(run / name),
                "no such file",
                "what a run records of its steps",
                "Name the run_dir that `angelptm train` printed; execution.timeline_steps: 0 records nothing.",
            )
    traced, rates = Trace.load(run / "trace.json"), Rates.load(run / "rates.json")
    if traced.param_itemsize != ITEMSIZE[config.precision]:
        raise DataError(
            str(run / "trace.json"),
            f"parameters of {traced.param_itemsize} bytes",
            f"those of precision {config.precision}",
            "Name a run of the same precision: computing takes other times in another one.",
        )
    made = plan_from_trace(traced, budgets_of(config))
    settings, lead = settings_of(config)
    return made, choose(made, traced, rates, settings, lead=lead)[1]


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
