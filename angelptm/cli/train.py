"""``angelptm train``."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from angelptm.config import load_config
from angelptm.sizes import format_bytes

if TYPE_CHECKING:
    from angelptm.train import RunResult

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key, for example training.steps=10. Repeatable."),
]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config, or a DeepSpeed JSON.")]


class ResumeCommand(TyperCommand):
    """Lets ``--resume`` stand without a path."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelled = []
        for index, argument in enumerate(args):
            following = args[index + 1] if index + 1 < len(args) else "-"
            spelled.append("--resume=" if argument == "--resume" and following.startswith("-") else argument)
        return super().parse_args(ctx, spelled)


def train(
    config: ConfigPath,
    set_: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[PATH]",
            help="Goes on from the newest commit of the run (or checkpoint folder) PATH; without PATH, of run_dir.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The result as one JSON object on the last line.")] = False,
) -> None:
    """Trains a model as a config says."""
    from angelptm.train import train as run_training  # not above: torch takes seconds, which no other command needs
    from angelptm.train.progress import ConsoleReporter

    console = Console(stderr=True) if json else Console()
    source = Path(resume) if resume else None
    result = run_training(
        load_config(config, set_ or []), ConsoleReporter(console), resume=resume is not None, resume_from=source
    )
    if result.rank > 0:
        return  # the first of several ranks tells
    show_result(result, console)
    if json:
        print(json_format.dumps(result.to_json()), flush=True)


def show_result(result: RunResult, console: Console) -> None:
    """Losses, a sample, the tiers' table and the run folder."""
    if result.sample is not None:
        console.print(Panel(Text(result.sample), title="sample: the prompt, then what the model writes"))
    table = Table(title="tiers: what was allowed, used and moved while training")
    for column in ("tier", "budget", "peak", "read", "written"):
        table.add_column(column, justify="left" if column == "tier" else "right")
    for tier, moved in result.bytes.items():
        table.add_row(
            tier,
            format_bytes(result.budget_bytes[tier]),
            format_bytes(result.peak_bytes[tier]),
            format_bytes(moved["read"]),
            format_bytes(moved["written"]),
        )
    console.print(table)
    facts = {
        **({"training loss": f"{result.losses[0]:.4f} → {result.losses[-1]:.4f}"} if result.losses else {}),
        "speed": f"{result.tokens_per_s:,.0f} tokens/s, {sum(result.step_seconds):.1f} s in steps"
        + (f", on {result.ranks} ranks; tiers and memory are those of the first" if result.ranks > 1 else ""),
        "memory": f"peak RSS {format_bytes(result.peak_rss_bytes)}, of it "
        f"{format_bytes(result.activation_bytes)} of activations kept for backward",
        **({"SSD writes": _endurance(result.endurance)} if result.endurance.get("written_bytes_per_step") else {}),
        **(
            {"commits": f"{result.commits}, for which training stood still {sum(result.commit_seconds):.2f} s in all"}
            if result.commits
            else {}
        ),
        "run folder": result.run_dir,
    }
    if result.validation_loss_before is not None and result.validation_loss_after is not None:
        change = f"{result.validation_loss_before:.4f} → {result.validation_loss_after:.4f}"
        facts = {"validation loss": change, **facts}
    for name, value in facts.items():
        console.print(f"{name:<16}{value}", soft_wrap=True, highlight=False, markup=False)


def _endurance(figures: Mapping[str, float]) -> str:
    return (
        f"{format_bytes(int(figures['written_bytes_per_step']))} a step, "
        f"{format_bytes(int(figures['written_bytes_per_day']))} a day at this speed: "
        f"{figures['drive_writes_per_day']:.2f} drive writes a day of "
        f"{format_bytes(int(figures['drive_capacity_bytes']))}"
    )
