"""Peak memory and step time of one model: trained by plain PyTorch, and by AngelPTM under budgets.

Each case runs in a process of its own, so that its peak RSS is its own. The limit that AngelPTM is held to is

    device budget + host budget + activations that autograd keeps (as reported) + 700 MiB for Python and torch.

    python tools/bench/memory.py                      # GPT-2 medium, 355 M parameters, 512 MiB host, 256 MiB device
    python tools/bench/memory.py --small --json       # seconds instead of minutes
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 2**20
FOR_PYTHON_BYTES = 700 * MIB


def build(preset: str, seed: int, sequence: int) -> tuple[Any, Any]:
    """A materialized model without its values, and one batch."""
    import torch
    from transformers import AutoConfig

    from angelptm import materialize
    from angelptm.model.presets import PRESETS

    keys = PRESETS[preset]
    config = AutoConfig.for_model(
        keys["model_type"], **{**keys["config"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    )
    model = materialize(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (1, sequence), generator=generator)
    return model, {"input_ids": tokens, "labels": tokens}


def report(losses: list[float], seconds: list[float], **facts: Any) -> None:
    from angelptm.memory import peak_rss_bytes

    peak = peak_rss_bytes()
    print(json.dumps({"losses": losses, "step_seconds": seconds, "peak_rss_bytes": peak, **facts}))


def run_angelptm(case: dict[str, Any]) -> None:
    import angelptm

    model, batch = build(case["preset"], 1, case["sequence"])
    with tempfile.TemporaryDirectory(dir=case["folder"]) as folder:
        config = {
            "tiers": {"device": case["device"], "host": case["host"], "ssd": [{"path": folder}], **case["more"]},
            "page_size": case["page"],
            "precision": case["precision"],
            "optimizer": {"type": "adamw", "lr": 1e-4},
            "placement": {"param": "ssd", "states": "ssd"},
            "gradient_checkpointing": True,
            "gradient_clipping": 1.0,
        }
        engine = angelptm.initialize(model, config)
        losses, seconds = [], []
        for _ in range(case["steps"]):
            start = time.perf_counter()
            loss = engine(**batch).loss
            losses.append(float(loss.detach()))
            engine.backward(loss)
            engine.step()
            engine.drain()
            seconds.append(time.perf_counter() - start)
        facts = {
            "activation_bytes": engine.activation_bytes,
            "bytes": engine.traffic(),
            "peak_bytes": engine.peak_bytes(),
            "budget_bytes": engine.config.tiers.device + engine.config.tiers.host,
        }
        engine.close()
    report(losses, seconds, **facts)


def run_torch(case: dict[str, Any]) -> None:
    """The same model and values in memory: torch's AdamW, with fp32 masters beside bf16 parameters."""
    import torch

    from angelptm.config import Config
    from angelptm.engine.setup import lay_out
    from angelptm.model.materialize import source_of

    model, batch = build(case["preset"], 1, case["sequence"])
    config = Config(tiers={"device": "1GiB", "host": "1GiB"}, precision=case["precision"])
    source, values = source_of(model), {}
    for layout in lay_out(model, config)[1]:
        values.update(source.values(model, layout))
    dtype = torch.float32 if case["precision"] == "fp32" else torch.bfloat16
    model.to_empty(device="cpu")
    model.tie_weights()
    model.to(dtype)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(values[name])
    params = dict(model.named_parameters())
    masters = params if dtype is torch.float32 else {name: torch.nn.Parameter(values[name].clone()) for name in params}
    values.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-4, weight_decay=0.01, fused=True)
    losses, seconds = [], []
    for _ in range(case["steps"]):
        start = time.perf_counter()
        loss = model(**batch).loss
        losses.append(float(loss.detach()))
        loss.backward()
        if dtype is not torch.float32:
            for name, param in params.items():
                masters[name].grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dtype is not torch.float32:
            with torch.no_grad():
                for name, param in params.items():
                    param.copy_(masters[name])
        seconds.append(time.perf_counter() - start)
    report(losses, seconds, activation_bytes=0)


def measure(kind: str, case: dict[str, Any]) -> dict[str, Any]:
    """One case in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", kind, json.dumps(case)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{kind} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["name"] = kind
    if kind == "angelptm":
        found["limit_bytes"] = found["budget_bytes"] + found["activation_bytes"] + FOR_PYTHON_BYTES
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sequence", type=int, help="tokens of the batch (default 256; 64 with --small)")
    parser.add_argument("--folder", default=".", help="where the SSD tier's files go")
    parser.add_argument("--keep-freed", metavar="SIZE", help="tiers.keep_freed; the default's if not given")
    parser.add_argument("--without-torch", action="store_true", help="only the AngelPTM case")
    parser.add_argument("--small", action="store_true", help="a model of 11 M parameters in small budgets")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.worker:
        kind, case = arguments.worker
        (run_angelptm if kind == "angelptm" else run_torch)(json.loads(case))
        return
    size = (
        {"preset": "gpt2-demo", "device": "16MiB", "host": "32MiB", "page": "256KiB", "sequence": 64}
        if arguments.small
        else {"preset": "gpt2-medium", "device": "256MiB", "host": "512MiB", "page": "4MiB", "sequence": 256}
    )
    case = {**size, "precision": arguments.precision, "steps": arguments.steps}
    case["more"] = {"keep_freed": arguments.keep_freed} if arguments.keep_freed else {}
    case["sequence"] = arguments.sequence or size["sequence"]
    case["folder"] = str(Path(arguments.folder).absolute())
    cases = [measure("angelptm", case)] + ([] if arguments.without_torch else [measure("torch", case)])
    result = {"case": case, "machine": f"{platform.machine()} {platform.release()}", "cases": cases}
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{size['preset']}, {arguments.precision}, {case['sequence']} tokens, checkpointed blocks")
    for found in cases:
        limit = f", limit {found['limit_bytes'] / MIB:.0f} MiB" if "limit_bytes" in found else ""
        print(
            f"{found['name']:<10} peak RSS {found['peak_rss_bytes'] / MIB:.0f} MiB{limit}, "
            f"step {min(found['step_seconds']):.2f} s, losses {[round(loss, 6) for loss in found['losses']]}"
        )


if __name__ == "__main__":
    main()
