"""A plan in words and rows, for the terminal and for programs."""

from __future__ import annotations

from angelptm.plan.placed import Plan


def plan_rows(plan: Plan) -> list[dict[str, int | str]]:
    """One row a kind, bytes of whole pages on each tier, then what is for pages on the move, and for commits."""
    rows: list[dict[str, int | str]] = [{"kind": kind, **tiers} for kind, tiers in plan.kind_bytes.items()]
    arena = plan.arena.peak_frames * plan.page_bytes
    on_device = plan.kind_bytes["PARAM"]["device"]
    rows.append(
        {
            "kind": "on the move",
            "device": arena - on_device if on_device == 0 else 0,
            "host": (plan.ring_frames + plan.moving_frames) * plan.page_bytes,
            "ssd": (plan.ssd_slots - plan.commit_slots) * plan.page_bytes
            - sum(tiers["ssd"] for tiers in plan.kind_bytes.values()),
        }
    )
    if plan.commit_slots:
        rows.append({"kind": "commits", "device": 0, "host": 0, "ssd": plan.commit_slots * plan.page_bytes})
    return rows


def plan_summary(plan: Plan) -> dict[str, object]:
    """The plan's figures as JSON-ready data; bytes unless the key says otherwise."""
    return {
        "page_bytes": plan.page_bytes,
        "parameters": sum(unit.layout.numel for unit in plan.units),
        "units": len(plan.units),
        "kinds": plan.kind_bytes,
        "device": {
            "frames": plan.device_frames,
            "peak_bytes": plan.device_peak_bytes,
            "lower_bound_bytes": plan.arena.lower_bound_frames * plan.page_bytes,
        },
        "host": {
            "frames": plan.host_frames,
            "home_bytes": plan.home_frames * plan.page_bytes,
            "ring_bytes": plan.ring_frames * plan.page_bytes,
            "staging_bytes": plan.moving_frames * plan.page_bytes,
        },
        "ssd": {
            "slots": plan.ssd_slots,
            "bytes": plan.ssd_slots * plan.page_bytes,
            "commit_bytes": plan.commit_slots * plan.page_bytes,
            "paths": [{"path": path, "slots": slots} for path, slots, _ in plan.ssd_slots_by_path],
        },
        "update": {"threads": plan.update_threads, "ring_depth": plan.ring_depth},
        "fits": True,
    }
