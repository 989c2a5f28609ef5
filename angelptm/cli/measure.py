"""``angelptm measure``."""

from __future__ import annotations

import json as json_format
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from angelptm.config.schema import load_hardware
from angelptm.errors import AngelPTMError
from angelptm.sizes import format_bytes, parse_bytes
from io_engine.machine import machine_facts
from io_engine.report import shown_progress
from io_engine.tune import TunePlan, tune, write_hardware_file

_QUEUE_DEPTHS, _BLOCK_BYTES, _ROUNDS = (4, 16, 32), (2**20, 4 * 2**20), 3


def measure(
    path: Annotated[
        list[Path] | None, typer.Option("--path", help="A folder on an NVMe drive, for the SSD tier; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where models will compute: cuda, cuda:N or cpu.")] = "cpu",
    output: Annotated[Path, typer.Option("--output", "-o", help="The hardware file to write.")] = Path("hardware.yaml"),
    size: Annotated[str, typer.Option("--size", help="Bytes of the test file on each drive.")] = "1GiB",
    json: Annotated[bool, typer.Option("--json", help="Also print the content as one JSON object.")] = False,
) -> None:
    """Measures this machine's device, memory, links and drives, and writes the hardware file that configs name."""
    from angelptm.foresight.machine import measure_device  # not above: torch takes seconds

    try:
        file_bytes = parse_bytes(size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    folders = path or []
    for folder in folders:
        if not folder.is_dir():
            raise AngelPTMError(f"--path {folder}: no such folder. Make it, or name another one.")
    content: dict[str, Any] = {}
    if folders:  # first, as it is what may be refused
        plan = TunePlan([str(folder) for folder in folders], file_bytes, _BLOCK_BYTES, _QUEUE_DEPTHS, _ROUNDS)
        try:
            with shown_progress() as progress:
                content |= tune(plan, progress)
        except ValueError as error:
            raise AngelPTMError(f"--size {size}: {error}") from None
    with Console(stderr=True).status("measuring the device and the cores"):
        content = {**measure_device(device), **content}
    content["machine"] = machine_facts(str(folders[0] if folders else Path.cwd()))
    content["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_hardware_file(str(output), content)
    load_hardware(output)  # what a config will read
    if json:
        print(json_format.dumps(content))
        return
    _show(content, Console())
    print(f"written to {output}; name it in a config as hardware: {output}")


def _show(content: dict[str, Any], console: Console) -> None:
    table = Table("what", "found", title="this machine", title_justify="left")
    for section in ("device", "host", "links"):
        for name, value in content.get(section, {}).items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for part, one in parts:
                table.add_row(f"{section}.{name}{'.' if part else ''}{part}", _shown(name, one))
        table.add_section()
    for ssd in content.get("ssd", []):
        for name, value in ssd.items():
            table.add_row(f"ssd.{name}", _shown(name, value))
        table.add_section()
    for name, value in content.get("io", {}).items():
        table.add_row(f"io.{name}", _shown(name, value))
    console.print(table)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("bytes_per_s"):
        return f"{value / 1e9:.3g} GB/s"
    if name.startswith("flops"):
        return f"{value / 1e12:.3g} TFLOPS"
    if name.startswith("update"):
        return f"{value / 1e6:,.0f} M elements/s"
    if name in ("memory", "cache", "capacity", "block_bytes"):
        return format_bytes(value)
    return f"{value * 1e6:.3g} µs" if name.endswith("seconds") else str(value)
