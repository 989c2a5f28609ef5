"""``angelptm plan``."""

from __future__ import annotations

import json as json_format
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from angelptm.cli.train import ConfigPath, Overrides
from angelptm.config import Config, load_config
from angelptm.config.schema import Hardware
from angelptm.errors import DataError
from angelptm.memory import RANKS_HERE, host_memory
from angelptm.plan import (
    Party,
    Plan,
    Prediction,
    Rates,
    Share,
    Trace,
    choose,
    plan_from_trace,
    plan_rows,
    plan_summary,
    shares_of,
)
from angelptm.plan.shares import WHOLE
from angelptm.sizes import format_bytes

if TYPE_CHECKING:
    from torch import nn

    from angelptm.foresight.outlook import Outlook, Target


RankCount = Annotated[
    int,
    typer.Option(
        "--ranks", min=1, help="Processes on this machine that train the model together, one for each GPU mostly."
    ),
]


def plan(
    config: ConfigPath,
    set_: Overrides = None,
    ranks: RankCount = 1,
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
    search: Annotated[
        bool, typer.Option("--search", help="Look for the settings with the most tokens per second.")
    ] = False,
    max_scale: Annotated[
        bool, typer.Option("--max-scale", help="Look for the most layers of this model that fit the machine.")
    ] = False,
) -> None:
    """Says how many bytes of each kind live on each tier, whether it fits, and how fast it will be.

    That takes a machine's rates: those of the config's hardware file, or of this machine with --measure or with
    hardware: auto. Allocates nothing of the model. With --ranks the table is that of the first rank, whose share is the
    largest; steps are foreseen for one rank alone."""
    from angelptm.train.resume import as_trained  # not above, as it imports torch

    if trace is not None and (measure or search or max_scale):
        raise typer.BadParameter("a step is foreseen from a machine's rates, or taken from a run's trace: not both")
    if search and max_scale:
        raise typer.BadParameter("--search or --max-scale: one at a time")
    if ranks > 1 and (measure or search or max_scale or trace is not None):
        raise typer.BadParameter("steps are foreseen for one rank: leave --ranks out")
    loaded = as_trained(load_ranked(config, set_ or [], ranks))
    if ranks > 1:
        _, made = planned(loaded, ranks=ranks)
        if json:
            print(json_format.dumps(plan_summary(made)))
        else:
            show_plan(made, Console())
        return
    if trace is not None:
        with Console(stderr=True).status("simulating steps"):
            made, prediction = _predict(loaded, trace)
        if json:
            print(json_format.dumps({**plan_summary(made), "prediction": prediction.facts()}))
        else:
            show_plan(made, Console())
            print(prediction.describe())
        return
    hardware = None if measure else loaded.described_hardware()
    if hardware is not None and not hardware.predicts:  # rates of drives alone
        hardware = None
    has_rates = measure or loaded.hardware == "auto" or hardware is not None
    if (search or max_scale) and not has_rates:
        raise typer.BadParameter("--search and --max-scale want a machine's rates: add --measure, or hardware: FILE")
    if search:
        _search(loaded, hardware, json)
    elif max_scale:
        _max_scale(loaded, hardware, json)
    else:
        _plan(loaded, hardware, has_rates, json)


def _plan(config: Config, hardware: Hardware | None, has_rates: bool, json: bool) -> None:
    model, made = planned(config, hardware)
    facts: dict[str, Any] = {}
    text = ""
    if has_rates:
        from angelptm.foresight.outlook import look_ahead, require_memory

        target = _target(config, hardware)
        with Console(stderr=True).status("going through a step without values"):
            outlook = look_ahead(model, config, made, target)
        require_memory(made, outlook.activation_bytes, outlook.workspace_bytes, config, target)
        facts = {"prediction": outlook.prediction.facts(), **outlook.facts()}
        text = _describe(outlook, made, config, target)
    if json:
        print(json_format.dumps({**plan_summary(made), **facts}))
        return
    show_plan(made, Console())
    _show_limits(made, config, hardware)
    if text:
        print(text)


def _target(config: Config, hardware: Hardware | None) -> Target:
    from angelptm.foresight.outlook import described_machine, this_machine

    if hardware is not None:
        return described_machine(hardware, config)
    with Console(stderr=True).status("measuring this machine"):
        return this_machine(config)


def _show_limits(plan: Plan, config: Config, hardware: Hardware | None) -> None:
    """What this machine allows a process beside its memory, where the plan is for this machine."""
    if hardware is not None:
        return
    memory, pool = host_memory(), plan.host_frames * plan.page_bytes
    for name, limit in (("control group", memory.cgroup_limit_bytes), ("locked memory", memory.memlock_limit_bytes)):
        if limit is not None and (name != "locked memory" or config.device.startswith("cuda")):
            print(f"{name}: {format_bytes(limit)} allowed here; the host pool takes {format_bytes(pool)} of it")


def _search(config: Config, hardware: Hardware | None, json: bool) -> None:
    from angelptm.foresight.search import Search
    from angelptm.model.materialize import build_model

    target = _target(config, hardware)
    with Console(stderr=True).status("looking for settings") as status:
        found = Search(config, build_model(config), target, hardware).run(status.update)
    if json:
        rows = [{"changes": dict(one.changes), **one.outlook.facts()} for one in found]
        print(json_format.dumps({"proposals": rows}))
        return
    table = Table(title=f"on {target.name}, the fastest first")
    keys = [key for key in _SEARCHED if any(key in one.changes for one in found)]
    for key in keys:
        table.add_column(_SEARCHED[key], justify="right")
    for column in ("tokens/s", "MFU", "bottleneck"):
        table.add_column(column, justify="left" if column == "bottleneck" else "right")
    for one in found:
        late = f", {one.outlook.steps_behind:.1f} steps late" if one.outlook.steps_behind is not None else ""
        bottleneck = one.outlook.prediction.bottleneck.replace("_", " ") + late
        values = [_cell(one.changes.get(key, _value_of(config, key))) for key in keys]
        table.add_row(*values, f"{one.outlook.tokens_per_s:,.0f}", f"{one.outlook.mfu:.0%}", bottleneck)
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    console.print(table)
    exact = next((one for one in found if one.outlook.steps_behind is None), found[0])
    sets = " ".join(f"--set {key}={_cell(value, 'true', 'false')}" for key, value in exact.changes.items())
    console.print(f"fastest with exact updates: {sets}", highlight=False, soft_wrap=True, markup=False)


_TABLE_WIDTH = 100
_SEARCHED = {
    "data.micro_batch_size": "micro",
    "gradient_accumulation_steps": "times",
    "gradient_checkpointing": "recompute",
    "tiers.device": "device",
    "page_size": "page",
    "update.mode": "update",
}
"""Keys that a search changes, and their columns."""


def _value_of(config: Config, key: str) -> Any:
    """What a config has at a dotted key."""
    found: Any = config.model_dump(mode="json")
    for name in key.split("."):
        found = found[name]
    return found


def _cell(value: Any, yes: str = "yes", no: str = "no") -> str:
    return (yes if value else no) if isinstance(value, bool) else str(value)


def _max_scale(config: Config, hardware: Hardware | None, json: bool) -> None:
    from angelptm.foresight.search import largest_that_fits

    target = _target(config, hardware)
    with Console(stderr=True).status("looking for the largest model") as status:
        found = largest_that_fits(config, target, hardware, status.update)
    if json:
        facts = {"layers": found.layers, "parameters": found.parameters, "refusal": found.refusal}
        print(json_format.dumps({**facts, **plan_summary(found.plan), **found.outlook.facts()}))
        return
    show_plan(found.plan, Console())
    print(f"{found.layers} layers, {found.parameters / 1e9:.2f} B parameters; one more does not fit: {found.refusal}")
    print(_describe(found.outlook, found.plan, config, target))


def load_ranked(config: Path, overrides: Sequence[str], ranks: int) -> Config:
    """The config as each of so many ranks on this machine would load it: sizes that are auto are their part of it."""
    if ranks > 1:
        os.environ[RANKS_HERE] = str(ranks)
    return load_config(config, overrides)


def planned(config: Config, hardware: Hardware | None = None, ranks: int = 1) -> tuple[nn.Module, Plan]:
    """The config's model without its values, and its plan, with the commits that training would make; for the machine
    that ``hardware`` describes, or for this one. Of several ranks it is the first one's, whose share is the largest.
    Raises CapacityError where a budget is too small."""
    from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of  # not above, as they import torch
    from angelptm.model.materialize import build_model
    from angelptm.train.resume import as_trained

    trained = as_trained(config)
    with Console(stderr=True).status("building the model without its values"):
        model = build_model(trained)
    party = Party(Share(0, shares_of(trained.distributed.shard, ranks, ranks)) if ranks > 1 else WHOLE, ranks)
    return model, plan_of(*lay_out(model, trained), trained, buffer_bytes_of(model), hardware, party)


def _describe(outlook: Outlook, plan: Plan, config: Config, target: Target) -> str:
    from angelptm.foresight.outlook import device_needs, host_needs

    lines = [f"on {target.name}: {outlook.tokens_per_s:,.0f} tokens/s, {outlook.mfu:.0%} of the device's rate (MFU)"]
    if config.gradient_accumulation_steps > 1:
        takes = f"a step of {config.gradient_accumulation_steps} micro-batches takes {outlook.step_seconds:,.1f} s"
        of_it = (
            f"; with {outlook.micro_batches} of them:"
            if outlook.micro_batches < config.gradient_accumulation_steps
            else ""
        )
        lines.append(takes + of_it)
    lines.append(outlook.prediction.describe())
    if outlook.steps_behind is not None:
        lines.append(f"parameters are about {outlook.steps_behind:.1f} steps behind their gradients")
    beside = outlook.activation_bytes, outlook.workspace_bytes
    tiers = [("host", host_needs(plan, *beside, config), target.host_bytes)]
    if target.device_bytes is not None:
        tiers.insert(0, ("device", device_needs(plan, *beside), target.device_bytes))
    for tier, needs, available in tiers:
        said = ", ".join(f"{need.what} {format_bytes(need.bytes)}" for need in needs if need.bytes)
        total = sum(need.bytes for need in needs)
        lines.append(f"{tier} memory: {format_bytes(total)} of {format_bytes(available)}: {said}")
    if outlook.ssd_written_bytes:
        lines.append(f"SSD writes {format_bytes(int(outlook.ssd_written_bytes_per_day))} a day")
    if not outlook.prediction.steady:
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
