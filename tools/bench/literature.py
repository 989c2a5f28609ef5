"""What the planner says of machines that others published results for, beside what they published.

    python tools/bench/literature.py                       # minutes: models of hundreds of billions, without values
    python tools/bench/literature.py --cases 'Horizon*' --out RESULT.json

Machines are described by configs/hardware, from data sheets: nothing here was measured on them. A machine of several
GPUs is taken as a whole: all of its DRAM and SSD, and the memory of one GPU for what a GPU holds at a time, as pages
that are dealt to all ranks would use it. This version runs one GPU.

Largest models of a family differ in their number of layers alone. Exits with 1 when a case fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BF16 = {"states": {"exp_avg": "bf16", "exp_avg_sq": "bf16"}}
INT8 = {"states": {"exp_avg": "int8", "exp_avg_sq": "int8"}}


@dataclass(frozen=True)
class Case:
    """``published`` is in billions of parameters. ``largest``: look for the largest model; else plan the one that is
    named."""

    published: str
    source: str
    hardware: str
    model: dict[str, Any]
    uses_ssd: bool
    largest: bool = True
    data: dict[str, int] = field(default_factory=lambda: {"sequence_length": 1024, "micro_batch_size": 1})
    keys: dict[str, Any] = field(default_factory=dict)


ANGEL = "Angel-PTM, arXiv 2303.02868: largest models on one server of 8 A100-40GB"
HORIZON = "Horizon-LM, arXiv 2602.04816: 120 B on one H200 with 1.5 TB of DRAM, no SSD"
QWEN = {"preset": "qwen2.5-32b", "config": {"hidden_size": 8192, "intermediate_size": 29568}}
CASES = {
    "Angel-PTM GPT": Case("55 (DeepSpeed 28)", ANGEL, "a100-8x40gb", {"preset": "gpt3-30b"}, uses_ssd=False),
    "Angel-PTM GPT, int8 moments": Case(
        "55 (DeepSpeed 28)", ANGEL, "a100-8x40gb", {"preset": "gpt3-30b"}, uses_ssd=False, keys={"optimizer": INT8}
    ),
    "Angel-PTM T5": Case("58 (DeepSpeed 27)", ANGEL, "a100-8x40gb", {"preset": "t5-11b"}, uses_ssd=False),
    "ZeRO-Infinity": Case(
        "1000",
        "ZeRO-Infinity, arXiv 2104.07857: a trillion parameters on one DGX-2",
        "dgx-2",
        {"preset": "gpt3-175b", "config": {"n_embd": 25600, "n_head": 256}},
        uses_ssd=True,
        keys={"units": {"classes": ["GPT2Attention", "GPT2MLP"]}},  # a block is of 16 GB
    ),
    "Ratel": Case(
        "175",
        "Ratel (LoHan), arXiv 2403.06504: 175 B on one RTX 4090 with 256 GB of DRAM",
        "consumer-24gb",
        {"preset": "gpt3-175b"},
        uses_ssd=True,
        largest=False,
    ),
    "Horizon-LM": Case(
        "120",
        HORIZON,
        "h200",
        QWEN,
        uses_ssd=False,
    ),
    "Horizon-LM, bf16 moments": Case("120", HORIZON, "h200", QWEN, uses_ssd=False, keys={"optimizer": BF16}),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="*", help="only these, as a pattern (default all)")
    parser.add_argument("--out", type=Path, help="also write the result to this file, as JSON")
    return parser.parse_args(arguments)


def config_of(case: Case) -> dict[str, Any]:
    tiers: dict[str, Any] = {"device": "auto", "host": "auto"}
    if case.uses_ssd:
        tiers["ssd"] = "auto"
    return {
        "device": "cuda",
        "hardware": str(ROOT / f"configs/hardware/{case.hardware}.yaml"),
        "tiers": tiers,
        "page_size": "64MiB",
        "precision": "bf16",
        "gradient_checkpointing": True,
        "model": case.model,
        "data": case.data,
        **case.keys,
    }


def measure(case: Case) -> dict[str, Any]:
    from angelptm.config import load_config
    from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of
    from angelptm.foresight.outlook import described_machine, look_ahead, require_memory
    from angelptm.foresight.search import largest_that_fits
    from angelptm.model.materialize import build_model

    config = load_config(config_of(case))
    hardware = config.described_hardware()
    assert hardware is not None
    target = described_machine(hardware, config)
    if case.largest:
        found = largest_that_fits(config, target, hardware, lambda _: None)
        plan, outlook, refusal = found.plan, found.outlook, found.refusal
    else:
        model = build_model(config)
        plan = plan_of(*lay_out(model, config), config, buffer_bytes_of(model), hardware)
        outlook, refusal = look_ahead(model, config, plan, target), None
        require_memory(plan, outlook.activation_bytes, outlook.workspace_bytes, config, target)
    parameters = sum(unit.layout.numel for unit in plan.units)
    placed = {tier: sum(kind[tier] for kind in plan.kind_bytes.values()) for tier in ("device", "host", "ssd")}
    return {
        "published_billions": case.published,
        "source": case.source,
        "parameters": parameters,
        "placed_bytes": placed,
        "bytes_per_parameter": sum(placed.values()) / parameters,
        "one_layer_more": refusal,
        **outlook.facts(),
        "bottleneck": outlook.prediction.bottleneck,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from angelptm.errors import AngelPTMError
    from io_engine.machine import source_commit

    found: dict[str, dict[str, Any]] = {}
    for name in (one for one in CASES if fnmatch.fnmatchcase(one, options.cases)):
        try:
            result = found[name] = measure(CASES[name])
        except AngelPTMError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 1
        print(
            f"{name}: published {result['published_billions']} B, ours {result['parameters'] / 1e9:.1f} B "
            f"({result['bytes_per_parameter']:.1f} bytes a parameter); one GPU {result['tokens_per_s']:.1f} tokens/s, "
            f"bottleneck {result['bottleneck']}",
            flush=True,
        )
    if options.out is not None:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content = {"cases": found, "date": date, "commit": source_commit(ROOT)}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
