"""``angelptm checkpoint``: looks at commits, checks them, copies and exports them, and gives back space."""

from __future__ import annotations

import contextlib
import json as json_format
import sys
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from angelptm.checkpoint.collect import collect
from angelptm.checkpoint.copying import copy_commit
from angelptm.checkpoint.describe import describe_commit, list_commits, list_params, stored_bytes
from angelptm.checkpoint.export import export_safetensors
from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.opened import choose_step, open_commit
from angelptm.cli import checkpoint_tables as tables
from angelptm.errors import AngelPTMError, CorruptPageError
from angelptm.sizes import format_bytes, parse_bytes
from io_engine.errors import IoError

app = typer.Typer(help="Looks at commits, checks, copies and exports them.", no_args_is_help=True, add_completion=False)

EXIT_DAMAGED = 1


class Format(str, Enum):
    safetensors = "safetensors"
    dcp = "dcp"


class ExportDtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    as_trained = "as-trained"


CommitPath = Annotated[Path, typer.Argument(metavar="PATH", help="A run folder or a checkpoint folder.")]
Step = Annotated[int | None, typer.Option("--step", min=0, help="Which commit; by default the newest.")]
Ssd = Annotated[
    list[Path] | None,
    typer.Option("--ssd", metavar="FOLDER", help="A folder of tiers.ssd, where slot files are. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@app.command("list")
def list_command(path: CommitPath, json: Json = False) -> None:
    """Lists the commits of a run."""
    with CheckpointFolder.read(path) as folder:
        commits = list_commits(folder)
    if json:
        _print_json({"folder": str(folder.path), "commits": commits})
    else:
        tables.show_commits(str(folder.path), commits, Console())


@app.command()
def show(
    path: CommitPath,
    step: Step = None,
    params: Annotated[bool, typer.Option("--params", help="Also every parameter.")] = False,
    json: Json = False,
) -> None:
    """Says what a commit holds; reads no page."""
    with CheckpointFolder.read(path) as folder:
        manifest = folder.load(choose_step(folder, step))
    facts = describe_commit(manifest)
    if params:
        facts["params"] = list_params(manifest)
    if json:
        _print_json({"folder": str(folder.path), **facts})
    else:
        tables.show_commit(facts, Console())


@app.command()
def verify(
    path: CommitPath,
    step: Step = None,
    all_: Annotated[bool, typer.Option("--all", help="Every commit.")] = False,
    ssd: Ssd = None,
    json: Json = False,
) -> None:
    """Reads every page of a commit against its checksum. Exit code 0 only when all is intact, 1 when it is not."""
    if all_ and step is not None:
        raise typer.BadParameter("--step and --all exclude each other")
    with CheckpointFolder.read(path) as folder:
        steps = folder.commits() if all_ else []
        where = str(folder.path)
        steps = steps or [choose_step(folder, step)]
    found = []
    for one in steps:
        try:
            found.append(_verify(path, one, ssd or []))
        except (AngelPTMError, OSError) as error:
            if not all_:
                raise
            found.append({"step": one, "intact": False, "error": str(error), "bad_pages": []})
    if json:
        _print_json({"folder": where, "intact": all(one["intact"] for one in found), "commits": found})
    else:
        tables.show_verified(found, Console())
    if not all(one["intact"] for one in found):
        raise typer.Exit(EXIT_DAMAGED)


def _verify(path: Path, step: int, ssd: list[Path]) -> dict[str, Any]:
    with open_commit(path, step, ssd) as opened, _progress() as progress:
        start = time.perf_counter()
        bad = opened.reader.verify(lambda done, total: progress(f"verifying step {step}", done, total))
        seconds = time.perf_counter() - start
        size = stored_bytes(opened.manifest)
        return {
            "step": step,
            "intact": not bad,
            "error": None,
            "pages": len(opened.reader.stored()),
            "bytes": size,
            "seconds": seconds,
            "bytes_per_s": size / max(seconds, 1e-9),
            "bad_pages": [_bad_page(error) for error in bad],
        }


def _bad_page(error: CorruptPageError | IoError) -> dict[str, Any]:
    if isinstance(error, IoError):
        return {"page": None, "parameter": None, "path": error.path, "offset": error.offset, "error": str(error)}
    return {
        "page": error.page,
        "parameter": error.parameter,
        "path": error.path,
        "offset": error.offset,
        "expected_crc": f"{error.expected_crc:08x}",
        "found_crc": f"{error.found_crc:08x}",
        "error": None,
    }


@app.command()
def export(
    path: CommitPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    step: Step = None,
    format_: Annotated[
        Format, typer.Option("--format", help="dcp: torch.distributed.checkpoint, with optimizer states.")
    ] = Format.safetensors,
    dtype: Annotated[
        ExportDtype | None, typer.Option("--dtype", help="Of parameters in safetensors; by default as-trained.")
    ] = None,
    max_shard: Annotated[
        str, typer.Option("--max-shard", metavar="SIZE", help="Bytes of one safetensors file.")
    ] = "5GB",
    ssd: Ssd = None,
    json: Json = False,
) -> None:
    """Writes a commit in a format that other programs read: safetensors for transformers, or dcp."""
    try:
        max_shard_bytes = parse_bytes(max_shard)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--max-shard") from None
    if format_ is Format.dcp and dtype not in (None, ExportDtype.fp32):
        raise typer.BadParameter("dcp holds the fp32 masters", param_hint="--dtype")
    with open_commit(path, step, ssd or []) as opened, Console(stderr=True).status(f"writing {out}"):
        if format_ is Format.dcp:
            from angelptm.checkpoint.dcp import export_dcp  # imports torch, which takes seconds

            files = export_dcp(opened.reader, out)
        else:
            chosen = {ExportDtype.fp32: "fp32", ExportDtype.bf16: "bf16"}.get(dtype or ExportDtype.as_trained)
            files = export_safetensors(opened.reader, out, chosen, max_shard_bytes)  # type: ignore[arg-type]
    header = opened.manifest.header
    size = sum(file.stat().st_size for file in files)
    if json:
        _print_json({"step": header.step, "format": format_.value, "bytes": size, "files": [str(one) for one in files]})
        return
    names = f"{len(files)} files" if len(files) > 1 else files[0].name
    _say(f"step {header.step} → {out}: {names}, {format_bytes(size)}")
    if format_ is Format.safetensors and header.model is None:
        _say("without config.json: the model is none of transformers, so build it and load the files into it")


@app.command()
def copy(
    path: CommitPath,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A new or empty folder, or an unfinished copy.")],
    step: Step = None,
    ssd: Ssd = None,
    json: Json = False,
) -> None:
    """Copies a commit to a checkpoint folder of its own, on any drive. When stopped, the same command goes on."""
    start = time.perf_counter()
    try:
        with open_commit(path, step, ssd or []) as opened, _progress() as progress:
            copied = copy_commit(opened.reader, dest, progress)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    seconds = time.perf_counter() - start
    if json:
        _print_json(
            {
                "step": copied.step,
                "path": str(copied.path),
                "copied_pages": copied.copied_pages,
                "kept_pages": copied.kept_pages,
                "bytes": copied.bytes,
                "seconds": seconds,
            }
        )
        return
    kept = f", {copied.kept_pages} were there already" if copied.kept_pages else ""
    _say(
        f"step {copied.step} → {dest}: {copied.copied_pages} pages copied, {format_bytes(copied.bytes)} in "
        f"{seconds:.2f} s{kept}"
    )


@app.command()
def gc(
    path: CommitPath,
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Newest commits to keep; by default all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    ssd: Ssd = None,
    json: Json = False,
) -> None:
    """Gives back space: commits beyond --keep, what interrupted runs left, and slots that no commit names."""
    result = collect(path, ssd or [], keep=keep, dry_run=dry_run)
    if json:
        _print_json(
            {
                "dry_run": dry_run,
                "kept_steps": result.kept_steps,
                "removed_steps": result.removed_steps,
                "held_steps": result.held_steps,
                "removed_files": [{"path": str(one), "bytes": size} for one, size in result.removed_files],
                "punched_files": [{"path": str(one), "bytes": size} for one, size in result.punched_files],
                "freed_bytes": result.freed_bytes,
            }
        )
    else:
        tables.show_collected(result, dry_run, Console())


def _print_json(value: dict[str, Any]) -> None:
    print(json_format.dumps(value), flush=True)


def _say(text: str) -> None:
    Console().print(tables.printable(text), soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar of pages on standard error where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _what, _done, _total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def moved(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield moved
