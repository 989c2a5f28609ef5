"""``angelptm plan``."""

from __future__ import annotations

import json as json_format
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from torch import nn

_CHOOSING_SECONDS = 20.0


def plan(
    config: ConfigPath,
    set_: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure this machine, some seconds, and say what a step will take."),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="RUN",
            help="The folder of a run of this model, whose traced step and measured rates say what a step will take.",
        ),
    ] = None,
) -> None:
    """Says how many bytes of each kind live on each tier, whether it fits, and with --measure how fast it will be.

    Allocates nothing of the model."""
    from angelptm.train.resume import as_trained  # not above, as it imports torch

    if measure and trace is not None:
        raise typer.BadParameter("a step is foreseen from this machine's rates, or taken from a run's trace: not both")
    loaded = as_trained(load_config(config, set_ or []))
    prediction, foreseen = None, None
    if trace is not None:
        with Console(stderr=True).status("simulating steps"):
            made, prediction = _predict(loaded, trace)
    else:
        model, made = planned(loaded)
        if measure:
            prediction, foreseen = _foresee(loaded, model, made)
    if json:
        predicted = {} if prediction is None else {"prediction": prediction.facts()}
        print(json_format.dumps({**plan_summary(made), **predicted, **(foreseen or {})}))
        return
    show_plan(made, Console())
    if prediction is not None:
        print(prediction.describe())
    if prediction is not None and foreseen is not None:
        print(_describe(prediction, foreseen))


def planned(config: Config) -> tuple[nn.Module, Plan]:
    """The config's model without its values, and its plan, with the commits that training would make. Raises
    CapacityError where a budget is too small."""
    from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of  # not above, as they import torch
    from angelptm.model.materialize import build_model
    from angelptm.train.resume import as_trained

    trained = as_trained(config)
    with Console(stderr=True).status("building the model without its values"):
        model = build_model(trained)
    return model, plan_of(*lay_out(model, trained), trained, buffer_bytes_of(model))


def _foresee(config: Config, model: nn.Module, plan: Plan) -> tuple[Prediction, dict[str, float]]:
    """A step as the simulator sees it, from shapes and from what this machine was measured to give."""
    from angelptm.engine.foresight import Timed, activation_bytes_of, foresee
    from angelptm.engine.machine import measure_machine
    from angelptm.engine.planning import settings_of

    console = Console(stderr=True)
    with console.status("measuring this machine"):
        rates, compute, device = measure_machine(config)
    with console.status("going through a step without values"):
        foreseen = foresee(model, config, plan, Timed(compute, config.precision, device))
    trace = foreseen.with_gradient_copies(rates.gradient_bytes_per_s)
    settings, lead = settings_of(config)
    prediction = choose(plan, trace, rates, settings, lead=lead, seconds=_CHOOSING_SECONDS)[1]
    # Filling the pages and the first steps, which move everything on demand, come before the steady step.
    first = {"device": plan.arena.peak_frames * plan.page_bytes}
    if plan.ssd_slots > plan.commit_slots:
        first["host"] = plan.host_frames * plan.page_bytes
    peaks = {tier: max(size, first.get(tier, 0)) for tier, size in prediction.peak_bytes.items()}
    prediction = replace(prediction, peak_bytes=peaks)
    seconds = prediction.step_seconds
    written = sum(link["ssd_written"] for link in prediction.traffic.values())
    return prediction, {
        "tokens_per_s": trace.tokens_per_step / seconds,
        "mfu": foreseen.model_flops / seconds / compute.flops_per_s[config.precision],
        "model_flops": foreseen.model_flops,
        "activation_bytes": activation_bytes_of(trace),
        "ssd_written_bytes_per_day": written * 86400 / seconds,
    }


def _describe(prediction: Prediction, foreseen: dict[str, float]) -> str:
    lines = [
        f"{foreseen['tokens_per_s']:.0f} tokens/s, {foreseen['mfu']:.0%} of the device's rate (MFU)",
        f"activations {format_bytes(int(foreseen['activation_bytes']))}, beside the device budget",
    ]
    if foreseen["ssd_written_bytes_per_day"]:
        lines.append(f"SSD writes {format_bytes(int(foreseen['ssd_written_bytes_per_day']))} a day")
    if not prediction.steady:
        lines.append("no two steps are alike: these are averages")
    return "\n".join(lines)


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
