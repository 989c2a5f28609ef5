"""``angelptm trace``. Imports no torch, so that looking at a run is quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from angelptm.errors import DataError
from angelptm.timeline.figures import Figures, figures_of, percent, seconds_text
from angelptm.timeline.html import printable
from angelptm.timeline.perfetto import FILE_NAME as PERFETTO_NAME
from angelptm.timeline.perfetto import write_perfetto
from angelptm.timeline.report import FILE_NAME as REPORT_NAME
from angelptm.timeline.report import write_report
from angelptm.timeline.run_files import read_run

_MOST_CAUSES = 10


def trace(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, with timeline.json.gz in it.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where the files go; default: the run folder.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="The step to report; default: one of median length.")
    ] = None,
) -> None:
    """What a step's time went into: an HTML report, and a timeline for ui.perfetto.dev."""
    with Console(stderr=True).status("reading the timeline"):
        found = read_run(run)
        figures = figures_of(found, step)
        folder = run if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / PERFETTO_NAME, lambda path: write_perfetto(found.timeline, path))
        _write_whole(folder / REPORT_NAME, lambda path: write_report(found, figures, path))
    console = Console()
    show_figures(figures, console)
    for name in (REPORT_NAME, PERFETTO_NAME):
        console.print(Text(printable(folder / name)), soft_wrap=True)


def show_figures(figures: Figures, console: Console) -> None:
    """Step time, bottleneck and the causes of stalls."""
    table = Table(title=f"step {figures.step.number}", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("of the step", justify="right")
    length = figures.step.seconds
    speed = f" ({figures.tokens_per_s:,.0f} tokens/s)" if figures.tokens_per_s is not None else ""
    table.add_row(f"the step{speed}", seconds_text(length), percent(1))
    table.add_row("stood still", seconds_text(figures.stall_seconds), _share(figures.stall_seconds, length))
    if figures.stalls:
        table.add_section()
    causes = list(figures.stalls_by_cause.items())
    for cause, seconds in causes[:_MOST_CAUSES]:
        table.add_row(Text(printable(cause)), seconds_text(seconds), _share(seconds, length))
    if len(causes) > _MOST_CAUSES:
        seconds = sum(seconds for _, seconds in causes[_MOST_CAUSES:])
        table.add_row(f"{len(causes) - _MOST_CAUSES} other causes", seconds_text(seconds), _share(seconds, length))
    console.print(table)
    for sentence in (figures.bottleneck, figures.predicted_bottleneck):
        if sentence:
            console.print(Text(printable(sentence)), soft_wrap=True)


def _share(seconds: float, length: float) -> str:
    return percent(seconds / length) if length > 0 else "–"


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """A reader finds the old file or the new one, never half of it."""
    if path.is_dir():
        raise DataError(str(path), "a folder", "a file that can be replaced", "Choose another folder with --out.")
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
