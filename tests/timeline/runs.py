"""Run folders that no training made: one as it should be, and an ugly one."""

from __future__ import annotations

import json
from pathlib import Path

from angelptm.timeline import Counter, Event, Lane, Step, Timeline, save

UNITS = ["embed", *(f"h.{index}" for index in range(10)), "ln_f"]
STEP_S = 2.0
EVIL = "<script>alert('x')</script><img src=http://example.com/x.png onerror=alert(1)>\"'&\u202e\x00\x1b[31m"


def timeline(steps: int = 4) -> Timeline:
    """Forward, stall and backward of each unit; reads and writes that overlap; two updaters; three tiers."""
    found = Timeline(origin_unix_s=1_793_000_000.0)
    found.lanes = [
        Lane("engine", "compute"),
        Lane("stalls", "stall"),
        Lane("ssd read", "channel"),
        Lane("ssd write", "channel"),
        Lane("host to device", "channel"),
        Lane("updater 0", "updater"),
        Lane("updater 1", "updater"),
    ]
    occupancy: dict[str, list[tuple[float, float]]] = {"device": [], "host": [], "ssd": []}
    for number in range(1, steps + 1):
        start = (number - 1) * STEP_S * 1.01
        found.steps.append(Step(number, start, start + STEP_S * (1 + 0.002 * number)))
        _one_step(found, start, occupancy)
    found.counters = [Counter(name, "bytes", tuple(samples)) for name, samples in occupancy.items()]
    found.facts = {
        "tokens_per_step": 1024,
        "machine": {"cpu": "Example 9000", "cores": 2, "memory_bytes": 16 << 30, "kernel": "6.1"},
        "rooflines": {
            "forward": {"ceiling": "matmul at 90 GFLOP/s", "seconds": 0.42},
            "backward": {"ceiling": "matmul at 90 GFLOP/s", "seconds": 0.81},
        },
    }
    return found


def _one_step(found: Timeline, start: float, occupancy: dict[str, list[tuple[float, float]]]) -> None:
    at = start
    for index, unit in enumerate(UNITS):
        _transfers(found, unit, at, 0.03)
        if index % 4 == 1:
            args = {"cause": "waits for the update", "unit": unit}
            found.events.append(Event("stalls", f"waits for the update of {unit}", at, at + 0.022, 0, args))
        elif index % 4 == 3:
            args = {"cause": "waits for the SSD to read", "unit": unit}
            found.events.append(Event("stalls", f"waits for the SSD to read of {unit}", at, at + 0.011, 0, args))
        found.events.append(Event("engine", f"forward {unit}", at + 0.022, at + 0.06))
        occupancy["device"].append((at, (8 + index % 5) * 2**20))
        occupancy["host"].append((at, (60 + index) * 2**20))
        at += 0.06
    for index, unit in enumerate(reversed(UNITS)):
        _transfers(found, unit, at, 0.04)
        found.events.append(Event("engine", f"backward {unit}", at + 0.01, at + 0.09))
        found.events.append(Event("engine", f"gradient {unit}", at + 0.07, at + 0.085, 2**20))
        occupancy["device"].append((at, (14 - index % 4) * 2**20))
        occupancy["ssd"].append((at, (300 + index) * 2**20))
        thread = f"updater {index % 2}"
        found.events.append(Event(thread, f"update {unit}", at + 0.09, at + 0.16, 3 * 2**20, {"what": "update"}))
        found.events.append(Event(thread, "waits for I/O", at + 0.16, at + 0.18, 0, {"what": "wait_io"}))
        for part in range(3):
            begin = at + 0.1 + 0.01 * part
            args = {"what": "write", "kind": "EXP_AVG", "link": "host→ssd"}
            found.events.append(Event("ssd write", f"write {unit}.{part}", begin, begin + 0.025, 2**20, args))
        at += 0.09
    found.events.append(Event("engine", "step", at, start + STEP_S - 0.01))


def _transfers(found: Timeline, unit: str, at: float, seconds: float) -> None:
    for part in range(2):
        begin = at + part * seconds / 4
        args = {"what": "read", "kind": "PARAM", "link": "ssd→host"}
        found.events.append(Event("ssd read", f"read {unit}.{part}", begin, begin + seconds / 2, 2 * 2**20, args))
    args = {"what": "copy", "kind": "PARAM", "link": "host→device"}
    found.events.append(Event("host to device", f"copy {unit}", at + seconds * 0.75, at + seconds, 4 * 2**20, args))


def make_run(folder: Path) -> Path:
    """A whole run folder."""
    folder.mkdir(parents=True)
    save(timeline(), folder / "timeline.json.gz")
    (folder / "config.yaml").write_text("precision: bf16\n")
    moved = {"device": 11 * 2**20, "host": 30 * 2**20, "ssd": 20 * 2**20}
    lines = [
        {"step": n, "loss": 3.0, "seconds": STEP_S,
         "bytes": {tier: {"read": size * n, "written": size * n // 2} for tier, size in moved.items()}}
        for n in range(1, 5)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    _write(
        folder,
        "result.json",
        {
            "model": "gpt2-demo",
            "parameters": 10_800_000,
            "tokens_per_step": 1024,
            "budget_bytes": {"device": 16 * 2**20, "host": 96 * 2**20, "ssd": 400 * 2**20},
            "peak_bytes": {"device": 14 * 2**20, "host": 71 * 2**20, "ssd": 311 * 2**20},
            "config_hash": "0123456789abcdef",
        },
    )
    _write(folder, "plan.json", {"page_bytes": 2**20, "parameters": 10_800_000})
    _write(
        folder,
        "prediction.json",
        {
            "step_seconds": 1.9,
            "busy_seconds": {"compute": 1.6, "ssd_read": 0.55, "ssd_write": 0.5, "update": 0.8},
            "stall_seconds": {"waits for the update": 0.05, "waits for a free frame": 0.01},
            "traffic_bytes": {"PARAM": {"ssd→host": 96 * 2**20, "host→device": 96 * 2**20},
                              "EXP_AVG": {"host→ssd": 40 * 2**20}},
            "peak_bytes": {"device": 15 * 2**20, "host": 70 * 2**20, "ssd": 311 * 2**20},
            "bottleneck": "compute",
            "second_bottleneck": "update",
            "rates": {"ssd_read_bytes_per_s": 1.3e9, "ssd_write_bytes_per_s": 2.2e9, "compute_flops": 90e9},
        },
    )  # fmt: skip
    uses = [{"unit": unit, "phase": "forward", "seconds": 0.038, "bytes": 4 * 2**20} for unit in UNITS]
    _write(folder, "trace.json", {"uses": [*uses, *({**use, "phase": "backward"} for use in reversed(uses))]})
    moves = [{"unit": unit, "move": "fetch", "before_use": index, "bytes": 2**22} for index, unit in enumerate(UNITS)]
    _write(folder, "schedule.json", {"lookahead": 3, "moves": moves})
    return folder


def make_ugly_run(folder: Path) -> Path:
    """One step, no stall, names that are long or try to be markup, many lanes and events, files that lie."""
    folder.mkdir(parents=True)
    long = "transformer.layers.with_a_name_that_nobody_would_choose." * 20
    found = Timeline(steps=[Step(7, 0.0, 1e-3)])
    found.lanes = [Lane(f"{EVIL} {long}"[:4096], "compute"), Lane(EVIL, "channel")]
    found.lanes += [Lane(f"updater {index}", "updater") for index in range(60)]
    for index in range(5000):
        start = index * 2e-7
        found.events.append(Event(found.lanes[0].name, f"{EVIL}{long}"[:4096], start, start + 1.5e-7, 2**40))
        found.events.append(Event(EVIL, long[:4096], start, start + 9e-7, 1, {"kind": EVIL + long, "link": long}))
    for lane in found.lanes[2:]:
        found.events.append(Event(lane.name, EVIL, 0.0, 1.0))
    found.counters = [Counter("device", "bytes", tuple((i * 1e-6, float(i % 7)) for i in range(1000)))]
    found.facts = {"machine": {"cpu": EVIL + long, "cores": []}, "rooflines": {EVIL: 3}, "tokens_per_step": "many"}
    found.dropped = {EVIL: 12, long: 3}
    save(found, folder / "timeline.json.gz")
    (folder / "config.yaml").write_text("precision: [1\n")
    (folder / "metrics.jsonl").write_text('nonsense\n[1]\n{"step": 7, "bytes": 3}\n')
    _write(folder, "result.json", {"model": EVIL + long, "parameters": -1, "budget_bytes": {"device": 0, "host": "x"}})
    _write(
        folder,
        "prediction.json",
        {"busy_seconds": {EVIL: 1e300, long: 0}, "bottleneck": long, "second_bottleneck": [EVIL], "rates": {long: 1}},
    )
    _write(folder, "trace.json", [{EVIL: long, "b": {"c": [1] * 500}, "unit": EVIL}] * 1000)
    (folder / "schedule.json").write_text("[" * 100_000)
    return folder


def _write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))
