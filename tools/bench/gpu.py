"""What a GPU is kept from by paging: link rates, hidden transfers, memory, and the losses beside the CPU's.

    python tools/bench/gpu.py --out RESULT.json                        # minutes: GPT-3 1.3 B in bf16 on cuda
    python tools/bench/gpu.py --preset gpt3-6.7b --device 6GiB --host 100GiB
    python tools/bench/gpu.py --where late --small                     # no GPU: does it run?

- links: pages through the engine's copy streams from and to its page-locked pool, against plain copies of torch's own
  pinned memory, in turns, median of five.
- hidden: a step with planned moves, against the same with everything resident (nothing moves but what updates publish),
  and with serial moves, in turns. Parameters and states live in host memory.
- memory: the most that torch's allocator had on the GPU, against the arena and what steps need beside it.
- losses: of the first steps of a small model, against the CPU device, in fp32 and in bf16.

Exits with 1 when the link is below 90 % of a plain copy, a tier's peak above its budget, or losses differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ROUNDS = 5
LEAST_LINK = 0.9
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", default="cuda", help="the config's device (default cuda)")
    parser.add_argument("--preset", default="gpt3-1.3b", help="of angelptm.model.presets (default gpt3-1.3b)")
    parser.add_argument("--device", default="2GiB", help="arena in which units take turns (default 2GiB)")
    parser.add_argument("--resident", default="4GiB", help="arena that holds all of them (default 4GiB)")
    parser.add_argument("--host", default="40GiB", help="host pool (default 40GiB)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step (default 8)")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of each (default 1024)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a block (default 3)")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="for what is written (default here)")
    parser.add_argument("--small", action="store_true", help="the demo's model: does it run?")
    parser.add_argument("--out", type=Path, help="also write the result to this file, as JSON")
    options = parser.parse_args(arguments)
    if options.small:
        options.preset, options.device, options.resident, options.host = "gpt2-demo", "16MiB", "64MiB", "512MiB"
        options.batch, options.sequence, options.steps = 1, 64, 1
    return options


def plain_rates(device: Any, size: int) -> dict[str, float]:
    """Bytes per second of torch's own copies of pinned memory."""
    import torch

    here = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)

    def rate(to: torch.Tensor, source: torch.Tensor) -> float:
        synchronize(device)
        start = time.perf_counter()
        to.copy_(source, non_blocking=True)
        synchronize(device)
        return size / (time.perf_counter() - start)

    rate(there, here), rate(here, there)
    return {"in": rate(there, here), "out": rate(here, there)}


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paged_rates(engine: Any, size: int) -> dict[str, float]:
    """Of the engine's streams, page after page, between its pool and device memory."""
    import torch

    store, device = engine._store, engine._device
    page, base = store.page_bytes, store.host_address
    there = torch.empty(size, dtype=torch.uint8, device=device.torch_device)
    frames = min(size // page, store.host_frame_count)

    def rate(stream: Any, *, inward: bool) -> float:
        stream.wait_for(device.computed(stream))
        device.synchronize()
        start = time.perf_counter()
        for index in range(frames):
            here, far = base + index * page, there.data_ptr() + index * page
            # What the pool holds is copied over itself: it comes back as it went.
            stream.copy(far if inward else here, here if inward else far, page)
        mark = stream.mark()
        while not stream.passed(mark):
            time.sleep(2e-5)
        return frames * page / (time.perf_counter() - start)

    rate(device.copies_in, inward=True)
    found = {"in": rate(device.copies_in, inward=True)}
    found["out"] = rate(device.copies_out, inward=False)
    return found


def engine_of(options: argparse.Namespace, folder: str, arena: str, **keys: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig

    import angelptm
    from angelptm.model.presets import PRESETS

    preset = PRESETS[options.preset]
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if preset["model_type"] == "gpt2" else {}
    architecture = AutoConfig.for_model(preset["model_type"], **{**preset["config"], **dropout})
    config = {
        "device": options.where,
        "tiers": {"device": arena, "host": options.host, "ssd": [{"path": folder}]},
        "page_size": "1MiB" if options.small else "4MiB",
        "precision": "bf16",
        "placement": {"param": "host", "grad": "host", "states": "host"},
        "optimizer": {"type": "adamw", "lr": 1e-4},
        **keys,
    }
    return angelptm.initialize(angelptm.materialize(architecture, seed=1), config), architecture


def steps_of(engine: Any, architecture: Any, options: argparse.Namespace, count: int) -> float:
    """Seconds of a step, on average, until its updates are done."""
    import torch

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, architecture.vocab_size, (options.batch, options.sequence), generator=generator)
    tokens = tokens.to(engine.device)
    start = time.perf_counter()
    for _ in range(count):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.drain()
    synchronize(engine.device)
    return (time.perf_counter() - start) / count


def measure_steps(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    import torch

    engines: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    try:
        for name, arena, keys in (
            ("planned", options.device, {}),
            ("resident", options.resident, {}),
            ("serial", options.device, {"execution": {"moves": "serial"}}),
        ):
            if options.where.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.empty_cache()
            before = _allocated(options)
            # One after the other: each has a host pool of its own.
            engine, architecture = engine_of(options, f"{folder}/{name}", arena, **keys)
            engines[name] = engine
            steps_of(engine, architecture, options, 6)  # the traced ones, and those that settle
            if name == "planned" and engine._device.copies_in is not None:
                size = min(256 << 20, engine.config.tiers.host)
                plain, paged = [], []
                for _ in range(ROUNDS):
                    plain.append(plain_rates(engine.device, size))
                    engine.drain()
                    paged.append(paged_rates(engine, size))
                found["link"] = {
                    way: {
                        "plain": statistics.median(one[way] for one in plain),
                        "paged": statistics.median(one[way] for one in paged),
                    }
                    for way in ("in", "out")
                }
            seconds[name] = [steps_of(engine, architecture, options, options.steps) for _ in range(ROUNDS)]
            found[name] = {
                "step_seconds": seconds[name],
                "traffic": engine.traffic(),
                "peak_bytes": engine.peak_bytes(),
                "budget_bytes": {"device": engine.config.tiers.device, "host": engine.config.tiers.host},
                "device_allocated_bytes": _allocated(options, peak=True) - before,
                "activation_bytes": engine.activation_bytes,
                "prediction": engine.prediction(),
            }
            engine.close()
            del engines[name], engine
    finally:
        for engine in engines.values():
            engine.close()
    return found


def _allocated(options: argparse.Namespace, *, peak: bool = False) -> int:
    import torch

    if not options.where.startswith("cuda"):
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def measure_losses(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """A small model's first losses, on both devices."""
    import torch

    found: dict[str, Any] = {}
    small = argparse.Namespace(**{**vars(options), "preset": "gpt2-demo", "small": True, "host": "512MiB"})
    for precision in ("fp32", "bf16"):
        losses = {}
        for where in ("cpu", options.where):
            own = argparse.Namespace(**{**vars(small), "where": where})
            engine, architecture = engine_of(own, f"{folder}/{precision}-{where}", "16MiB", precision=precision)
            generator = torch.Generator().manual_seed(2)
            losses[where] = []
            for _ in range(8):
                tokens = torch.randint(0, architecture.vocab_size, (2, 64), generator=generator)
                loss = engine(input_ids=tokens, labels=tokens).loss
                losses[where].append(float(loss.detach()))
                engine.backward(loss)
                engine.step()
            engine.close()
        worst = max(abs(a - b) / abs(a) for a, b in zip(losses["cpu"], losses[options.where]))
        found[precision] = {"cpu": losses["cpu"], "device": losses[options.where], "worst": worst}
    return found


def complaints(found: dict[str, Any]) -> list[str]:
    wrong = []
    for way, rates in found["steps"].get("link", {}).items():
        if rates["paged"] < LEAST_LINK * rates["plain"] and found["where"].startswith("cuda"):
            wrong.append(f"copies {way} run at {rates['paged'] / rates['plain']:.0%} of a plain pinned copy")
    for name in ("planned", "resident", "serial"):
        case = found["steps"][name]
        wrong += [
            f"{name}: the {tier} tier's peak is above its budget"
            for tier, budget in case["budget_bytes"].items()
            if case["peak_bytes"][tier] > budget
        ]
    for precision, losses in found["losses"].items():
        if losses["worst"] > LOSS_TOLERANCE[precision]:
            wrong.append(f"{precision} losses differ from the CPU's by {losses['worst']:.2%}")
    return wrong


def show(found: dict[str, Any]) -> None:
    print(f"{found['preset']}, {found['batch']} x {found['sequence']} tokens, on {found['name']}")
    for way, rates in found["steps"].get("link", {}).items():
        part = rates["paged"] / rates["plain"]
        print(f"copies {way}: {rates['paged'] / 1e9:.1f} GB/s, {part:.0%} of plain ({rates['plain'] / 1e9:.1f} GB/s)")
    base = statistics.median(found["steps"]["resident"]["step_seconds"])
    for name in ("resident", "planned", "serial"):
        case = found["steps"][name]
        step = statistics.median(case["step_seconds"])
        print(
            f"{name}: {step:.3f} s a step ({step / base:.2f} of resident), on the device at most "
            f"{case['device_allocated_bytes'] / 2**30:.2f} GiB, of it {case['peak_bytes']['device'] / 2**30:.2f} arena"
        )
    for precision, losses in found["losses"].items():
        print(f"losses in {precision}: within {losses['worst']:.3%} of the CPU's")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    from angelptm.errors import AngelPTMError
    from io_engine.machine import machine_facts, source_commit

    try:
        with tempfile.TemporaryDirectory(prefix="angelptm-gpu-", dir=options.folder) as folder:
            losses = measure_losses(options, folder)
            steps = measure_steps(options, folder)
    except AngelPTMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {
        **{key: getattr(options, key) for key in ("where", "preset", "batch", "sequence", "device", "resident")},
        "name": torch.cuda.get_device_name() if options.where.startswith("cuda") else options.where,
        "steps": steps,
        "losses": losses,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine_facts(str(options.folder)),
        "torch": torch.__version__,
        "commit": source_commit(ROOT),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    wrong = complaints(found)
    for complaint in wrong:
        print(f"not as promised: {complaint}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
