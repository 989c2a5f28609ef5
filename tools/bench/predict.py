"""How well the plan predicts: step time and peak bytes of each tier, said after three steps and measured after them.

    python tools/bench/predict.py                       # all cases, GPT-2 demo and 124 M
    python tools/bench/predict.py --cases 'demo*' --rounds 9
    python tools/bench/predict.py --small --json        # seconds: does it run?

Cases of the group "calibrate" are those that the simulator's constants were chosen with; no constant was chosen with
those of the group "judge". A round steps each case for a block that begins and ends quiet; rates are measured again in
every round, so that what else the machine does is in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# As for the other benchmarks: no file beside this one hides a library (transformers looks for `kernels`).
sys.path[0] = str(ROOT / "tools")
sys.path.insert(1, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench.precision import fast_precision  # noqa: E402

from io_engine.machine import machine_facts  # noqa: E402

MIB = 2**20
TIERS = ("device", "host", "ssd")


@dataclass(frozen=True)
class Case:
    """``group``: "calibrate" or "judge"."""

    name: str
    group: str
    preset: str
    sequence: int
    batch: int
    device: int
    host: int
    page: str
    placement: dict[str, Any] = field(default_factory=dict)
    clip: bool = False
    execution: dict[str, Any] = field(default_factory=dict)


ON_SSD = {"param": "ssd", "states": "ssd"}
ALL_ON_SSD = {**ON_SSD, "grad": "ssd"}
CASES = [
    Case("demo ssd", "calibrate", "gpt2-demo", 128, 4, 24 * MIB, 64 * MIB, "1MiB", ON_SSD),
    Case("demo host", "calibrate", "gpt2-demo", 128, 4, 64 * MIB, 256 * MIB, "1MiB", {"states": "host"}),
    Case("demo ssd clipped", "judge", "gpt2-demo", 128, 4, 24 * MIB, 64 * MIB, "1MiB", ON_SSD, clip=True),
    Case("demo half", "judge", "gpt2-demo", 64, 2, 16 * MIB, 160 * MIB, "1MiB", {"param": "ssd", "states": 0.5}),
    Case("demo tiny arena", "judge", "gpt2-demo", 64, 1, 10 * MIB, 64 * MIB, "1MiB", ON_SSD),
    Case("demo gradients ssd", "calibrate", "gpt2-demo", 64, 2, 16 * MIB, 48 * MIB, "1MiB", ALL_ON_SSD),
    Case("124M ssd", "calibrate", "gpt2", 256, 1, 256 * MIB, 512 * MIB, "4MiB", ON_SSD),
    Case("124M host", "judge", "gpt2", 256, 1, 640 * MIB, 3072 * MIB, "4MiB", {"param": "device", "states": "host"}),
    Case("124M half clipped", "judge", "gpt2", 256, 2, 256 * MIB, 1536 * MIB, "4MiB", {"states": 0.5}, clip=True),
    Case("124M tiny arena", "calibrate", "gpt2", 256, 1, 160 * MIB, 512 * MIB, "4MiB", ON_SSD),
    Case("124M serial", "judge", "gpt2", 256, 1, 256 * MIB, 512 * MIB, "4MiB", ON_SSD, execution={"moves": "serial"}),
]
SMALL = [
    Case("demo ssd", "calibrate", "gpt2-demo", 16, 1, 24 * MIB, 64 * MIB, "1MiB", ON_SSD),
    Case("demo half clipped", "judge", "gpt2-demo", 16, 1, 16 * MIB, 160 * MIB, "1MiB", {"states": 0.5}, clip=True),
]


class Run:
    """One engine, its batch, and what was measured of it."""

    def __init__(self, case: Case, precision: str, folder: Path) -> None:
        import torch
        from transformers import AutoConfig

        import angelptm
        from angelptm.model.presets import PRESETS

        preset = PRESETS[case.preset]
        architecture = AutoConfig.for_model(preset["model_type"], **preset["config"])
        self.case = case
        self.engine = angelptm.initialize(
            angelptm.materialize(architecture, seed=1),
            {
                "tiers": {"device": case.device, "host": case.host, "ssd": [{"path": str(folder)}]},
                "page_size": case.page,
                "precision": precision,
                "optimizer": {"type": "adamw", "lr": 1e-4},
                "placement": case.placement,
                "gradient_clipping": 1.0 if case.clip else None,
                "execution": case.execution,
            },
        )
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, architecture.vocab_size, (case.batch, case.sequence), generator=generator)
        self._batch = {"input_ids": tokens, "labels": tokens}
        self.measured: list[float] = []
        self.predicted: list[float] = []
        self.load: list[float] = []
        for _ in range(4):
            self.step()
        self.engine.drain()

    def step(self) -> None:
        loss = self.engine(**self._batch).loss
        self.engine.backward(loss)
        self.engine.step()

    def predict(self) -> float:
        said = self.engine._planning.predict_again()
        assert said is not None, "the traced steps are over"
        seconds: float = said["step_seconds"]
        return seconds

    def block(self, steps: int) -> None:
        """Steps after a first one that brings the step into its rhythm, each from its start to the next one's. The
        prediction is the mean of those with the rates before and after them."""
        before = self.predict()
        self.step()
        starts = [time.perf_counter()]
        for _ in range(steps):
            self.step()
            starts.append(time.perf_counter())
        self.measured.append((starts[-1] - starts[0]) / steps)
        self.load.append(os.getloadavg()[0])
        self.engine.drain()
        self.predicted.append((before + self.predict()) / 2)

    def result(self) -> dict[str, Any]:
        said = self.engine.prediction()
        assert said is not None, "the traced steps are over"
        peak = self.engine.peak_bytes()
        ratios = [told / found for told, found in zip(self.predicted, self.measured)]
        return {
            "name": self.case.name,
            "group": self.case.group,
            "measured_seconds": statistics.median(self.measured),
            "measured_range": [min(self.measured), max(self.measured)],
            "predicted_seconds": statistics.median(self.predicted),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "peak_bytes": {tier: [said["peak_bytes"][tier], peak[tier]] for tier in TIERS},
            "bottleneck": said["bottleneck"],
            "rates": said["rates"],
            "busy_seconds": said["busy_seconds"],
            "stall_seconds": sum(said["stall_seconds"].values()),
            "steady": said["steady"],
            "load": [min(self.load), max(self.load)],
            "config_hash": self.engine.config.hash,
        }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", action="append", metavar="PATTERN", help="only these, e.g. 'demo*'; repeatable")
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], help="default: bf16 where the processor helps with it, else fp32"
    )
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each case")
    parser.add_argument("--steps", type=int, default=6, help="steps of a block")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the drive to use (default: here)")
    parser.add_argument("--small", action="store_true", help="two tiny cases: does it run?")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.steps < 1:
        parser.error("--rounds and --steps are at least 1")
    return options


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="angelptm-predict-", dir=options.folder) as folder:
        run = Run(case, options.precision, Path(folder))
        try:
            for _ in range(options.rounds):
                run.block(options.steps)
            return run.result()
        finally:
            run.engine.close()


HEADER = f"{'case':20} {'group':10} {'predicted':>10} {'measured':>10} {'ratio':>6}  range"
HEADER += "          peaks, bound by, load"


def row(one: dict[str, Any]) -> str:
    peaks = " ".join(f"{tier} {told / real:.3f}" for tier, (told, real) in one["peak_bytes"].items() if real)
    low, high = one["ratio_range"]
    return (
        f"{one['name']:20} {one['group']:10} {one['predicted_seconds']:9.3f}s {one['measured_seconds']:9.3f}s "
        f"{one['ratio']:6.2f}  {low:5.2f} - {high:5.2f}  {peaks}, {one['bottleneck']}, {one['load'][1]:.1f}"
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.precision = options.precision or fast_precision()
    cases = SMALL if options.small else CASES
    if options.small:
        options.rounds, options.steps = 1, 2
    if options.cases:
        cases = [case for case in cases if any(fnmatch(case.name, pattern) for pattern in options.cases)]
    found: dict[str, Any] = {
        "machine": machine_facts(str(options.folder)),
        "precision": options.precision,
        "cases": [],
    }
    if not options.json:
        print(HEADER)
    for case in cases:
        found["cases"].append(measure(case, options))
        print(row(found["cases"][-1]), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
