"""What people see of ``angelptm checkpoint``. Names come from files that others may have written: ``printable``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from angelptm.checkpoint.collect import Collected
from angelptm.sizes import format_bytes

_SHOWN_BAD_PAGES = 50


def printable(text: str) -> str:
    """Control characters become escapes, so that no name can move the cursor."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "backslashreplace").decode()
        for letter in text
    )


def _text(value: object) -> Text:
    return Text(printable(str(value)))


def _table(title: str, columns: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(title=_text(title), title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _say(console: Console, text: str) -> None:
    console.print(_text(text), soft_wrap=True)


def show_commits(folder: str, commits: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One row for each commit."""
    if not commits:
        _say(console, f"{folder}: no commit")
        return
    columns = ("step", "created (UTC)", "pages", "bytes", "files", "format", "header")
    table = _table(folder, columns, ("step", "pages", "bytes", "files"))
    for one in commits:
        if one["error"] is not None:
            table.add_row(str(one["step"]), *["-"] * 5, Text("damaged, see below", style="bold red"))
            continue
        table.add_row(
            str(one["step"]),
            _text(_time(one["created"])),
            str(one["pages"]),
            format_bytes(one["stored_bytes"]),
            str(len(one["files"])),
            _text(f"{one['format_version']} ({one['package_version']})"),
            "intact",
        )
    console.print(table)
    for one in commits:
        if one["error"] is not None:
            _say(console, f"step {one['step']}: {one['error']}")


def _time(created: str) -> str:
    """To the second."""
    return created[:19].replace("T", " ")


def show_commit(facts: Mapping[str, Any], console: Console) -> None:
    """The facts as lines, then the tables of kinds, files, and parameters if asked for."""
    trained = f", {facts['trainable_elements']:,} of them trained"
    counters = facts["counters"]
    updates = f"{counters['min']} to {counters['max']}" if counters["min"] != counters["max"] else f"{counters['max']}"
    lines = {
        "step": facts["step"],
        "created": _time(facts["created"]) + " UTC",
        "written by": f"angelptm {facts['package_version']}, format {facts['format_version']}",
        "config hash": facts["config_hash"] or "none",
        "model": facts["model_type"] or "of no library",
        "parameters": f"{facts['parameter_elements']:,} in {facts['parameters']} tensors and {facts['units']} units"
        + (trained if facts["trainable_elements"] != facts["parameter_elements"] else ""),
        "buffers": facts["buffers"],
        "precision": f"{facts['precision']}, pages of {format_bytes(facts['page_bytes'])}",
        "optimizer": f"{facts['optimizer']}, {updates} updates a parameter",
        **{f"group {index}": _group(group) for index, group in enumerate(facts["groups"])},
        "scheduler": _json(facts["scheduler"]),
        "data": _json(facts["data"]),
        "client state": _json(facts["client"]),
        "generators": "saved" if facts["random_generators"] else "not saved",
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines.items():
        grid.add_row(name, _text(value))
    console.print(grid)
    kinds = _table("pages by kind", ("kind", "pages", "never written", "bytes"), ("pages", "never written", "bytes"))
    for name, kind in facts["kinds"].items():
        kinds.add_row(
            name, str(kind["pages"]), str(kind["never_written_pages"] or "-"), format_bytes(kind["stored_bytes"])
        )
    kinds.add_section()
    kinds.add_row("total", str(sum(one["pages"] for one in facts["kinds"].values())), "", _size(facts))
    console.print(kinds)
    files = _table("slot files", ("name", "slots", "used"), ("slots", "used"))
    for file in facts["files"]:
        files.add_row(_text(file["name"]), str(file["slot_count"]), str(file["used_slots"]))
    console.print(files)
    if "params" in facts:
        _show_params(facts["params"], console)


def _size(facts: Mapping[str, Any]) -> str:
    return format_bytes(facts["stored_bytes"])


def _group(group: Mapping[str, Any]) -> str:
    options = ", ".join(
        f"{key} {json.dumps(value)}" for key, value in group["options"].items() if value not in (None, False)
    )
    return f"{group['parameters']} parameters: {options}"


def _json(value: Mapping[str, Any] | None) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]}... (--json has all)"


def _show_params(params: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = _table("parameters", ("name", "shape", "unit", "updates"), ("updates",))
    for one in params:
        tied = [name for name in one["names"] if name != one["name"]]
        table.add_row(
            Text("\n").join([_text(one["name"]), *(_text(f"= {name}") for name in tied)]),
            "×".join(map(str, one["shape"])) or "scalar",
            _text(one["unit"] or "(root)"),
            "frozen" if one["updates"] is None else str(one["updates"]),
        )
    console.print(table)


def show_verified(commits: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A line for each commit, and each bad page."""
    for one in commits:
        if one["error"] is not None:
            _say(console, f"step {one['step']}: cannot be read: {one['error']}")
            continue
        read = (
            f"{one['pages']} pages, {format_bytes(one['bytes'])} in {one['seconds']:.2f} s "
            f"({one['bytes_per_s'] / 1e9:.2f} GB/s)"
        )
        bad = one["bad_pages"]
        _say(console, f"step {one['step']}: {f'{len(bad)} bad of ' if bad else 'intact, '}{read}")
        for page in bad[:_SHOWN_BAD_PAGES]:
            if page["error"] is not None:
                _say(console, f"  {page['error']}")
                continue
            _say(console, f"  page {page['page']}, {page['parameter']}")
            _say(console, f"    {page['path']} at offset {page['offset']}")
            _say(console, f"    CRC32C {page['found_crc']}, written was {page['expected_crc']}")
        if len(bad) > _SHOWN_BAD_PAGES:
            _say(console, f"  and {len(bad) - _SHOWN_BAD_PAGES} more; --json has all")


def show_collected(result: Collected, dry_run: bool, console: Console) -> None:
    """What went, and what stays."""
    removed, freed = ("would remove", "would free") if dry_run else ("removed", "freed")
    for step in result.removed_steps:
        _say(console, f"{removed} the commit of step {step}")
    for step in result.held_steps:
        _say(console, f"kept the commit of step {step}, which another process reads")
    for path, size in result.removed_files:
        _say(console, f"{removed} {path}, {format_bytes(size)}")
    for path, size in result.punched_files:
        _say(console, f"{freed} {format_bytes(size)} of unused slots in {path}")
    kept = ", ".join(map(str, result.kept_steps)) or "none"
    _say(console, f"{freed} {format_bytes(result.freed_bytes)}; commits kept: {kept}")
