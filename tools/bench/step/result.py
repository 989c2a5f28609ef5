"""From blocks to what is reported: medians, the limit, ratios to it and to every ceiling, and whether losses agree."""

from __future__ import annotations

import math
import statistics
from typing import Any

from bench.step.drive import BLOCK_BYTES, DEPTH, Drive
from bench.step.rounds import Rounds, Series

# The first loss comes from equal values in equal precision. Later ones differ as summation orders do: torch's own AdamW
# variants reach 2e-3 of each other after 6 steps.
_FIRST_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-3}
_LATER_LOSS_TOLERANCE = 0.05  # of the mean


def report(rounds: Rounds, drive: Drive, facts: dict[str, int], work: dict[str, Any]) -> dict[str, Any]:
    """``cases``, ``ceilings`` and ``losses`` of the JSON object."""
    ceilings = _ceilings(rounds, drive)
    resident = {one.case.clip: _median_step(one) for one in rounds.series if one.case.kind == "resident"}
    flops = step_flops(facts, work)
    return {
        "cases": [_case(one, drive, ceilings, resident, flops, work["precision"]) for one in rounds.series],
        "ceilings": ceilings,
        "step_flops": flops,
        "losses": check_losses(rounds.series, work["precision"]),
    }


def step_flops(facts: dict[str, int], work: dict[str, Any]) -> float:
    """Multiplications and additions of forward and backward: 6 for each parameter of a matrix and token, and attention
    (scores and their use, of all pairs); a third more where blocks are computed twice."""
    tokens = work["batch"] * work["sequence"]
    attention = 2 * 2 * facts["layers"] * facts["width"] * work["sequence"] * tokens
    forward = 2 * facts["matmul_parameters"] * tokens + attention
    head = 2 * facts["vocabulary"] * facts["width"] * tokens
    return float(3 * forward + (forward - head if work["recompute"] else 0))


def _ceilings(rounds: Rounds, drive: Drive) -> dict[str, Any]:
    names = rounds.ceilings[0]
    return {
        **{name: _spread([one[name] for one in rounds.ceilings]) for name in names},
        "drive": {
            "program": drive.program,
            "block_bytes": BLOCK_BYTES,
            "queue_depth": DEPTH,
            "bytes_per_s_by_read_percent": {str(mix): _spread(drive.samples[mix]) for mix in sorted(drive.samples)},
        },
    }


def _case(
    one: Series,
    drive: Drive,
    ceilings: dict[str, Any],
    resident: dict[bool, float],
    flops: float,
    precision: str,
) -> dict[str, Any]:
    per_step = _spread([block.reply["seconds"] / one.steps for block in one.blocks])
    step, moved, percent = per_step["median"], one.ssd_bytes(), one.read_percent()
    total = moved["read"] + moved["written"]
    drive_seconds = total / drive.bytes_per_s(percent) if percent is not None else 0.0
    found: dict[str, Any] = {
        "name": one.case.name,
        "kind": one.case.kind,
        "clipping": one.case.clip,
        "step_seconds": step,
        "step_seconds_min": per_step["min"],
        "step_seconds_max": per_step["max"],
        "step_seconds_rounds": per_step["samples"],
        "single_step_seconds": statistics.median(block.latency_seconds for block in one.blocks),
        "step_return_seconds": [second for block in one.blocks for second in block.reply["step_seconds"]],
        "peak_rss_bytes": one.peak_rss_bytes,
        "peak_rss_bytes_per_parameter": one.peak_rss_bytes / one.facts["parameters"],
        "bytes": _bytes(one),
        "ssd_read_percent": percent,
        "drive_seconds": drive_seconds,
        "matmul_seconds": flops / ceilings[f"matmul_{precision}_flops"]["median"],
        "losses": one.losses[0],
        "kept_running": one.lives_on,
        "config": one.case.config,
        **one.facts,
    }
    found["of_matmul_ceiling"] = found["matmul_seconds"] / step
    found["of_drive_ceiling"] = drive_seconds / step
    if "bytes" in one.blocks[0].reply["counters"]:
        host = found["bytes"]["tiers"]["host"]
        rate = (host["read"] + host["written"]) / step
        found["of_memory_ceiling"] = rate / ceilings["memory_bytes_per_s"]["median"]
        found["phase_seconds"] = _per_step(one, lambda reply: reply["counters"]["phase_seconds"])
    baseline = resident.get(one.case.clip)
    found["limit_seconds"] = None  # of the cases that the others are held against
    if one.case.kind != "resident" and baseline is not None:
        found["torch_step_seconds"] = baseline
        found["limit_seconds"] = max(baseline, drive_seconds)
        found["bound_by"] = "compute" if baseline >= drive_seconds else "drive"
        found["of_limit"] = step / found["limit_seconds"]
    prediction = one.facts.get("prediction")
    if prediction is not None:
        found["predicted_of_measured"] = prediction["step_seconds"] / step
    return found


def _bytes(one: Series) -> dict[str, Any]:
    """Of one step, median of the blocks: by tier as the case counts them, by the process and by the whole device as
    the kernel does."""
    found: dict[str, Any] = {"process": _per_step(one, lambda reply: reply["process_io"])}
    if all(block.device_io is not None for block in one.blocks):
        found["device"] = {
            side: statistics.median(block.device_io[side] / one.steps for block in one.blocks if block.device_io)
            for side in ("read", "written")
        }
    if "bytes" in one.blocks[0].reply["counters"]:
        found["tiers"] = {
            tier: _per_step(one, lambda reply, tier=tier: reply["counters"]["bytes"][tier])
            for tier in one.blocks[0].reply["counters"]["bytes"]
        }
    return found


def _per_step(one: Series, part: Any) -> dict[str, float]:
    replies = [part(block.reply) for block in one.blocks]
    return {key: statistics.median(reply[key] for reply in replies) / one.steps for key in replies[0]}


def _median_step(one: Series) -> float:
    return statistics.median(block.reply["seconds"] for block in one.blocks) / one.steps


def _spread(samples: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "samples": samples}


def _is_exact(one: Series) -> bool:
    return one.case.kind == "paged" and not one.case.rounds_states


def check_losses(series: list[Series], precision: str) -> dict[str, Any]:
    """``problems`` is empty when AngelPTM's exact cases agree bit by bit with each other and with all others within the
    tolerances, and every life of a worker had the same losses as its first."""
    problems = []
    for one in series:
        if not all(math.isfinite(loss) for life in one.losses for loss in life):
            problems.append(f"{one.case.name}: a loss is not finite")
        elif one.case.kind == "paged" and any(life != one.losses[0][: len(life)] for life in one.losses):
            problems.append(f"{one.case.name}: started again, it gave other losses")
    differences: dict[str, dict[str, float]] = {}
    for clip in (False, True):
        paged = [one for one in series if _is_exact(one) and one.case.clip == clip]
        for other in paged[1:]:
            length = min(len(other.losses[0]), len(paged[0].losses[0]))
            if other.losses[0][:length] != paged[0].losses[0][:length]:
                problems.append(f"{other.case.name}: its losses are not bit-equal to those of {paged[0].case.name}")
        reference = paged or [one for one in series if one.case.clip == clip]
        for other in series:
            if other.case.clip != clip or _is_exact(other) or other is reference[0]:
                continue
            pairs = list(zip(other.losses[0], reference[0].losses[0]))
            first = abs(pairs[0][0] / pairs[0][1] - 1)
            mean = abs(sum(one for one, _ in pairs) / sum(one for _, one in pairs) - 1)
            differences[other.case.name] = {"first": first, "mean": mean}
            if first > _FIRST_LOSS_TOLERANCE[precision] or mean > _LATER_LOSS_TOLERANCE:
                problems.append(
                    f"{other.case.name}: against {reference[0].case.name} its first loss is off by {first:.1e} and "
                    f"the mean by {mean:.1e}"
                )
    return {"problems": problems, "relative_differences": differences}
