"""``python -m io_engine bench`` and ``tune``; the same application is mounted as ``angelptm io``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from io_engine.backends import BACKENDS, working_backends
from io_engine.bench import OPS, BenchPlan, run_bench
from io_engine.plot import plot_bench, require_matplotlib
from io_engine.report import print_bench, print_hardware, shown_progress
from io_engine.sizes import parse_bytes
from io_engine.tune import TunePlan, tune, write_hardware_file

app = typer.Typer(help="Measure disks and the I/O backends.", no_args_is_help=True, add_completion=False)

_QUICK_BYTES, _QUICK_ROUNDS, _QUICK_BLOCK = "16MiB", 2, "1MiB"

Texts = list[str] | None
Numbers = list[int] | None
Text = str | None
Number = int | None

Quick = Annotated[bool, typer.Option("--quick", help="Small sizes and 2 rounds: shows that it works.")]
Size = Annotated[Text, typer.Option("--size", "--io-size", "--io_size", help="Bytes of the test file.  [1GiB]")]
Rounds = Annotated[Number, typer.Option("--rounds", "--loops", min=1, help="Measurements of each kind; median.  [5]")]


@contextmanager
def _one_message() -> Iterator[None]:
    """Errors of operation become one line on standard error and exit code 2; an interrupt, code 130. SIGTERM unwinds
    like Ctrl-C, so that what was made is removed."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("interrupted; nothing is left behind", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _chosen_backends(names: list[str] | None) -> list[str]:
    working = working_backends()
    if not names:
        for name, refusal in working.items():
            if refusal:
                print(f"left out: {name}: {refusal}", file=sys.stderr)
        return [name for name, refusal in working.items() if not refusal]
    for name in names:
        if name not in working:
            raise ValueError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
        if working[name]:
            raise OSError(f"backend {name} does not work here: {working[name]}")
    return names


def _chosen_ops(names: list[str] | None, read: bool, write: bool) -> list[str]:
    chosen = [*(names or []), *(["read"] if read else []), *(["write"] if write else [])]
    return list(dict.fromkeys(chosen)) or list(OPS)


@app.command("bench")
def bench_command(
    path: Annotated[str, typer.Option("--path", "--folder", help="Folder on the disk to measure.")] = ".",
    size: Size = None,
    block_size: Annotated[
        Texts, typer.Option("--block-size", "--block_size", help="Bytes of a request; repeatable.  [1MiB, 4MiB]")
    ] = None,
    queue_depth: Annotated[
        Numbers, typer.Option("--queue-depth", "--queue_depth", min=1, help="Requests at once; repeatable.  [8]")
    ] = None,
    backend: Annotated[
        Texts, typer.Option("--backend", help=f"{', '.join(BACKENDS)}; repeatable.  [all that work]")
    ] = None,
    op: Annotated[Texts, typer.Option("--op", help=f"{', '.join(OPS)}; repeatable.  [all]")] = None,
    read: Annotated[bool, typer.Option("--read", help="As --op read.")] = False,
    write: Annotated[bool, typer.Option("--write", help="As --op write.")] = False,
    rounds: Rounds = None,
    fio: Annotated[bool, typer.Option(help="Measure fio, where installed, as the ceiling.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    plot: Annotated[Text, typer.Option("--plot", metavar="FILE.png", help="Draw the result.")] = None,
    quick: Quick = False,
) -> None:
    """Throughput and latency of the I/O backends, in interleaved rounds, next to fio."""
    with _one_message():
        if plot:
            require_matplotlib()
        plan = BenchPlan(
            folder=path,
            file_bytes=parse_bytes(size or (_QUICK_BYTES if quick else "1GiB")),
            block_bytes=[parse_bytes(b) for b in block_size or ([_QUICK_BLOCK] if quick else ["1MiB", "4MiB"])],
            queue_depths=queue_depth or [8],
            backends=_chosen_backends(backend),
            ops=_chosen_ops(op, read, write),
            rounds=rounds or (_QUICK_ROUNDS if quick else 5),
            with_fio=fio,
        )
        with shown_progress() as progress:
            report = run_bench(plan, progress)
        if plot:
            plot_bench(report, plot)
        if as_json:
            print(json.dumps(report))
        else:
            print_bench(report)


@app.command("tune")
def tune_command(
    path: Annotated[
        Texts, typer.Option("--path", "--folder", "--nvme_dir", help="Folder on a disk; repeatable.  [.]")
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The hardware file to write.")] = "hardware.yaml",
    size: Size = None,
    block_size: Annotated[Texts, typer.Option("--block-size", "--block_size", help="To try.  [1MiB, 4MiB]")] = None,
    queue_depth: Annotated[
        Numbers, typer.Option("--queue-depth", "--queue_depth", min=1, help="To try.  [4, 8, 16, 32]")
    ] = None,
    rounds: Rounds = None,
    as_json: Annotated[bool, typer.Option("--json", help="Also print the content as one JSON object.")] = False,
    quick: Quick = False,
) -> None:
    """Measure the disks and write the rates and the best settings to a hardware file."""
    with _one_message():
        plan = TunePlan(
            paths=path or ["."],
            file_bytes=parse_bytes(size or (_QUICK_BYTES if quick else "1GiB")),
            block_bytes=[parse_bytes(b) for b in block_size or ([_QUICK_BLOCK] if quick else ["1MiB", "4MiB"])],
            queue_depths=queue_depth or ([2, 4] if quick else [4, 8, 16, 32]),
            rounds=rounds or (_QUICK_ROUNDS if quick else 5),
        )
        with shown_progress() as progress:
            content = tune(plan, progress)
        write_hardware_file(output, content)
        if as_json:
            print(json.dumps(content))
        else:
            print_hardware(content, output)


def main() -> None:
    """Entry of ``python -m io_engine``."""
    app(prog_name="io_engine")
