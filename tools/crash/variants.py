"""The runs that are killed: a GPT-2 of two blocks on some kilobytes of text, with all that a commit must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from angelptm.config import Config

STEPS = 12

# Few slots in flight, so that those of a commit too many are missed at once.
_TIGHT = {"update": {"threads": 1, "ring_depth": 1}, "io": {"queue_depth": 1}}
_SSD = {"placement": {"param": "ssd", "grad": "ssd", "states": "ssd"}}

VARIANTS: dict[str, dict[str, Any]] = {
    "ssd": {**_SSD, **_TIGHT, "checkpoint": {"every": 1, "keep": 1}},
    "ssd-keep2": {**_SSD, "checkpoint": {"every": 2, "keep": 2}, "folders": 2},
    "bf16": {**_SSD, "checkpoint": {"every": 2, "keep": 1}, "precision": "bf16", "gradient_accumulation_steps": 2},
    "int8": {**_SSD, **_TIGHT, "checkpoint": {"every": 1, "keep": 1}, "precision": "bf16", "moments": "int8"},
    "half": {**_TIGHT, "placement": {"param": "host", "states": 0.5}, "checkpoint": {"every": 1, "keep": 1}},
    "host": {"placement": {"param": "host", "states": "host"}, "checkpoint": {"every": 2, "keep": 2}},
    "no-ssd": {"placement": {"states": "host"}, "checkpoint": {"every": 1, "keep": 1}, "folders": 0},
}
"""Keys of the configuration; ``folders``: how many the SSD tier has, one by default; and ``moments``: their format."""


def config_of(variant: str, root: Path, corpus: Path) -> Config:
    """Everything that the run writes is below ``root``."""
    keys = dict(VARIANTS[variant])
    folders, moments = keys.pop("folders", 1), keys.pop("moments", "fp32")
    on_host = keys["placement"]["states"] != "ssd"
    values: dict[str, Any] = {
        "tiers": {
            "device": "512KiB",
            "host": "8MiB" if on_host else "1MiB",
            "ssd": [{"path": str(root / f"ssd{index}")} for index in range(folders)],
        },
        "page_size": "64KiB",
        "optimizer": {
            "type": "adamw",
            "lr": 3e-3,
            "states": {"exp_avg": moments, "exp_avg_sq": moments, "int8_from_elements": 0},
            "groups": [{"params": ["*.bias"], "weight_decay": 0.0}],
        },
        "gradient_clipping": 0.5,
        "schedule": {"type": "cosine", "warmup_steps": 3},
        "model": {
            "preset": "gpt2-demo",
            # Dropout, so that a generator that is not where it was shows in the next loss.
            "config": {
                **{"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 16},
                **{"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
            },
        },
        "data": {"path": str(corpus), "sequence_length": 16, "micro_batch_size": 2, "validation_fraction": 0.2},
        "training": {"steps": STEPS, "seed": 1, "eval_batches": 1, "threads": 1},
        "run_dir": str(root / "run"),
        **keys,
    }
    return Config(**values)


def write_corpus(folder: Path) -> None:
    folder.mkdir(parents=True)
    for index in range(5):
        (folder / f"{index}.txt").write_text(f"chapter {index}. " + "the quick brown fox jumps. " * 20)
