"""The result for people."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 2**20


def show(found: dict[str, Any]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=170)
    work, machine, ceilings = found["work"], found["machine"], found["ceilings"]
    table = Table(
        title=f"{work['preset']}, {work['parameters'] / 1e6:.1f} M parameters, {work['precision']}, "
        f"batch {work['batch']} x {work['sequence']} tokens, {found['rounds']} rounds of {found['steps']} steps"
    )
    table.add_column("case")
    for heading in ("step s", "min", "max", "single", "limit s", "of limit", "bound by", "matmul", "drive"):
        table.add_column(heading, justify="right")
    for heading in ("SSD MiB read", "written", "peak RSS MiB", "B/param"):
        table.add_column(heading, justify="right")
    for case in found["cases"]:
        moved = case["bytes"].get("tiers", {}).get("ssd", case["bytes"]["process"])
        limit = (
            [f"{case['limit_seconds']:.3f}", f"{case['of_limit']:.2f}", case["bound_by"]]
            if "of_limit" in case
            else [""] * 3
        )
        table.add_row(
            case["name"],
            *(
                f"{case[key]:.3f}"
                for key in ("step_seconds", "step_seconds_min", "step_seconds_max", "single_step_seconds")
            ),
            *limit,
            f"{100 * case['of_matmul_ceiling']:.0f} %",
            f"{100 * case['of_drive_ceiling']:.0f} %" if case["ssd_read_percent"] is not None else "",
            f"{moved['read'] / MIB:.0f}",
            f"{moved['written'] / MIB:.0f}",
            f"{case['peak_rss_bytes'] / MIB:.0f}",
            f"{case['peak_rss_bytes_per_parameter']:.1f}",
        )
    console.print(table)
    for case in found["cases"]:
        if "predicted_of_measured" in case:
            console.print(f"{case['name']}: predicted {100 * case['predicted_of_measured']:.0f} % of measured")
    for name, reason in found["left_out"].items():
        console.print(f"left out: {name}: {reason}", highlight=False)
    rates = ", ".join(f"{mix} % reads {rate['median'] / 1e9:.2f}" for mix, rate in _drive(ceilings).items())
    rates = f"drive, GB/s by {ceilings['drive']['program']}: {rates}"
    console.print(
        f"matmul {ceilings['matmul_bf16_flops']['median'] / 1e9:.0f} Gflop/s bf16, "
        f"{ceilings['matmul_fp32_flops']['median'] / 1e9:.0f} fp32; memory "
        f"{ceilings['memory_bytes_per_s']['median'] / 1e9:.1f} GB/s; {rates}",
        highlight=False,
    )
    console.print(
        f"{machine['cpu']}, {machine['cpu_count']} CPUs, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['device']} ({machine['file_system']}); "
        f"torch {machine['torch']}, commit {machine['commit']}, {found['date']}",
        highlight=False,
    )


def _drive(ceilings: dict[str, Any]) -> dict[str, Any]:
    rates: dict[str, Any] = ceilings["drive"]["bytes_per_s_by_read_percent"]
    return rates
