"""The ``angelptm`` command. Operating errors become one message and an exit code; there are no tracebacks for them."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

import typer

from angelptm.cli.checkpoint import app as checkpoint_app
from angelptm.cli.checkpoint_tables import printable
from angelptm.cli.launch import launch
from angelptm.cli.measure import measure
from angelptm.cli.plan import plan
from angelptm.cli.report import report
from angelptm.cli.trace import trace
from angelptm.cli.train import ResumeCommand, train
from angelptm.errors import AngelPTMError
from io_engine.cli import app as io_app

app = typer.Typer(
    help="Trains PyTorch models whose states exceed GPU memory and DRAM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(cls=ResumeCommand)(train)
app.command()(launch)
app.command()(plan)
app.command()(measure)
app.command()(trace)
app.command()(report)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(io_app, name="io")

EXIT_ERROR = 2


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the console command. Exit code 0, or 2 for an error that the message explains."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except (AngelPTMError, OSError, MemoryError) as error:
        text = "\n".join(map(printable, str(error).splitlines())) or type(error).__name__
        print(f"error: {text}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
