"""How fast one core steps AdamW on states in each format, against what the drive can bring and take.

    python tools/bench/formats.py                    # a minute; the drive of this folder
    python tools/bench/formats.py --folder /nvme --out RESULT.json
    python tools/bench/formats.py --small            # seconds: does it run?

A round takes every format in turn on the same memory; medians of the rounds. "Of the drive" is how many times faster
the core goes through the states, read and written, than the drive moves as many bytes, half of them each way, by fio
where that is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "tools")
sys.path.insert(1, str(ROOT))

import angelptm_native as native  # noqa: E402
import torch  # noqa: E402
from bench.step.drive import drive_of  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from angelptm import kernels  # noqa: E402
from angelptm.states.codec import MASTER_FORMATS, MOMENT_FORMATS  # noqa: E402
from angelptm.states.formats import BLOCK8, StateFormats  # noqa: E402
from io_engine.machine import machine_facts, source_commit  # noqa: E402

CASES = {
    "fp32": StateFormats(),
    "split, fp32 moments": StateFormats("split"),
    "split, bf16 moments": StateFormats("split", "bf16", "bf16"),
    "split, int8 moments": StateFormats("split", "int8", "int8"),
    "fp32, int8 moments": StateFormats("fp32", "int8", "int8"),
}
DRIVE_BYTES = 2**30


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=16 * 2**20, help="of the arrays (default 16 Mi)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the drive (default here)")
    parser.add_argument("--small", action="store_true", help="few elements, a short look at the drive: does it run?")
    parser.add_argument("--out", type=Path, help="also write the result to this file, as JSON")
    options = parser.parse_args(arguments)
    options.drive_bytes = DRIVE_BYTES
    if options.small:
        options.elements, options.rounds, options.drive_bytes = 2**16, 2, 2**24
    return options


class Case:
    """States of ``elements`` in a format, with bf16 gradients and parameters, and ordinary values in all of them."""

    def __init__(self, formats: StateFormats, elements: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.formats, self.elements = formats, elements
        master = torch.randn(elements, generator=generator)
        self.param = torch.empty(elements, dtype=torch.bfloat16)
        self.master = master if formats.master == "fp32" else torch.empty(elements, dtype=torch.int16)
        remainder = self.master.data_ptr() if formats.master == "split" else 0
        native.split_master(master.data_ptr(), self.param.data_ptr(), remainder, elements)
        self.grad = (torch.randn(elements, generator=generator) * 1e-3).bfloat16()
        self.moments = [self._moment(form) for form in (formats.exp_avg, formats.exp_avg_sq)]
        start = torch.randn(elements, generator=generator) * 1e-3
        native.encode(native.Moment.EXP_AVG, start.data_ptr(), self._codes(0), elements, 1, 0)
        start.square_()
        native.encode(native.Moment.EXP_AVG_SQ, start.data_ptr(), self._codes(1), elements, 1, 0)
        self.hyper = kernels.adamw_hyper(1e-6, step=100)

    def _moment(self, form: str) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[form]
        return torch.zeros(self.elements, dtype=dtype), torch.zeros(-(-self.elements // BLOCK8))

    def _codes(self, index: int) -> native.MomentCodes:
        form = (self.formats.exp_avg, self.formats.exp_avg_sq)[index]
        values, scales = self.moments[index]
        return native.MomentCodes(MOMENT_FORMATS[form], values.data_ptr(), scales.data_ptr())

    @property
    def state_bytes(self) -> int:
        """Read and written."""
        return 2 * sum(self.formats.section_bytes(self.elements, 2))

    def step(self) -> None:
        native.step_compact(
            self.hyper,
            MASTER_FORMATS[self.formats.master],
            self.master.data_ptr(),
            self._codes(0),
            self._codes(1),
            self.grad.data_ptr(),
            native.DType.BF16,
            self.param.data_ptr(),
            self.param.data_ptr(),
            native.DType.BF16,
            self.elements,
            1,
            0,
        )


def seconds_of(act: Callable[[], None]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cases = {name: Case(formats, options.elements) for name, formats in CASES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with drive_of(options.folder, options.drive_bytes) as ceiling:
        ceiling.want(50)
        for number in range(options.rounds + 1):  # the first warms up
            for name, case in cases.items():
                taken = seconds_of(case.step)
                if number:
                    seconds[name].append(taken)
            if number % 3 == 0:
                ceiling.round()
        drive = ceiling.bytes_per_s(50)
    results = []
    for name, case in cases.items():
        median = statistics.median(seconds[name])
        rate = case.state_bytes / median
        results.append(
            {
                "name": name,
                "state_bytes_per_element": case.state_bytes / case.elements,
                "elements_per_s": case.elements / median,
                "state_bytes_per_s": rate,
                "of_the_drive": rate / drive,
                "seconds": seconds[name],
            }
        )
    return {
        "drive_bytes_per_s": drive,
        "drive_program": ceiling.program,
        "cases": results,
        "isa": native.isa_name(native.isa_in_use()),
    }


def show(found: dict[str, Any]) -> None:
    title = f"one core, {found['isa']}; the drive moves {found['drive_bytes_per_s'] / 1e9:.2f} GB/s, half each way"
    table = Table(title=title)
    for heading in ("states", "bytes read and written", "M elements/s", "GB/s of states", "of the drive"):
        table.add_column(heading, justify="left" if heading == "states" else "right")
    for one in found["cases"]:
        table.add_row(
            one["name"],
            f"{one['state_bytes_per_element']:.2f}",
            f"{one['elements_per_s'] / 1e6:.0f}",
            f"{one['state_bytes_per_s'] / 1e9:.2f}",
            f"{one['of_the_drive']:.1f}x",
        )
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    found = measure(options)
    found |= {
        "elements": options.elements,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine_facts(options.folder),
        "commit": source_commit(ROOT),
    }
    show(found)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
