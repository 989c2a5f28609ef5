"""What `angelptm plan --measure` says before a run, beside what the run then takes: step time, and bytes of each tier.

    python tools/bench/foresee.py --out RESULT.json          # five configs, three rounds each: a quarter of an hour
    python tools/bench/foresee.py --cases 'gpt2 host' --rounds 1

Each round measures the machine, foresees a step and trains some, one after the other; figures are medians of rounds.
A tier's bytes are its peak in the run against the peak that was foreseen. Exits with 1 when a command fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

STEPS, SETTLED = 16, 6
ON_SSD = {"param": "ssd", "states": "ssd"}
CASES: dict[str, dict[str, Any]] = {
    "gpt2 ssd bf16": {"precision": "bf16", "placement": ON_SSD},
    "gpt2 ssd bf16 clipped": {"precision": "bf16", "placement": ON_SSD, "gradient_clipping": 1.0},
    "gpt2 ssd fp32": {"placement": ON_SSD, "data": {"sequence_length": 128}},
    "gpt2 host": {"precision": "bf16", "tiers": {"host": "3GiB"}, "data": {"micro_batch_size": 2}},
    "gpt2-medium int8": {
        "precision": "bf16",
        "placement": ON_SSD,
        "model": {"preset": "gpt2-medium"},
        "gradient_checkpointing": True,
        "optimizer": {"states": {"exp_avg": "int8", "exp_avg_sq": "int8"}},
        "data": {"sequence_length": 64},
    },
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="*", help="only these, as a pattern (default all)")
    parser.add_argument("--rounds", type=int, default=3, help="of each case (default 3)")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the drive to use (default here)")
    parser.add_argument("--out", type=Path, help="also write the result to this file, as JSON")
    return parser.parse_args(arguments)


def config_of(keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    base: dict[str, Any] = {
        "tiers": {"device": "256MiB", "host": "512MiB", "ssd": [{"path": str(folder / "ssd")}]},
        "model": {"preset": "gpt2"},
        "data": {"sequence_length": 256, "micro_batch_size": 1},
        "optimizer": {"type": "adamw", "lr": 1e-4},
        "training": {"steps": STEPS, "eval_batches": 1},
        "run_dir": str(folder / "run"),
    }
    for name, value in keys.items():
        base[name] = {**base[name], **value} if isinstance(value, dict) and name in base else value
    return base


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "angelptm.cli.main", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"error: angelptm {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def measure(keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = folder / "config.json"
    config.write_text(json.dumps(config_of(keys, folder)))
    foreseen = json.loads(command("plan", str(config), "--measure", "--json"))
    command("train", str(config))
    result = json.loads((folder / "run/result.json").read_text())
    prediction = foreseen["prediction"]
    return {
        "foreseen_seconds": prediction["step_seconds"],
        "step_seconds": statistics.median(result["step_seconds"][SETTLED:]),
        "foreseen_peak_bytes": prediction["peak_bytes"],
        "peak_bytes": result["peak_bytes"],
        "bottleneck": prediction["bottleneck"],
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from io_engine.machine import machine_facts, source_commit

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES if fnmatch.fnmatchcase(name, options.cases)}
    for number in range(options.rounds):
        for name in found:
            with tempfile.TemporaryDirectory(prefix="angelptm-foresee-", dir=options.folder) as folder:
                one = measure(CASES[name], Path(folder).absolute())
            found[name].append(one)
            said = f"foreseen {one['foreseen_seconds']:.3f} s, took {one['step_seconds']:.3f} s"
            print(f"round {number + 1}/{options.rounds}: {name}: {said}", file=sys.stderr, flush=True)
    for name, rounds in found.items():
        ratio = statistics.median(one["foreseen_seconds"] / one["step_seconds"] for one in rounds)
        tiers = {
            tier: statistics.median(one["foreseen_peak_bytes"][tier] / max(1, size) for one in rounds)
            for tier, size in rounds[0]["peak_bytes"].items()
            if size
        }
        bytes_said = ", ".join(f"{tier} {part:.3f}" for tier, part in tiers.items())
        print(f"{name}: foreseen {ratio:.2f} of measured; peak bytes {bytes_said} of measured")
    if options.out is not None:
        result = {
            "cases": found,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine_facts(str(options.folder)),
            "commit": source_commit(ROOT),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
