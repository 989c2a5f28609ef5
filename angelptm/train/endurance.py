"""What a run does to its drives."""

from __future__ import annotations

import os
from collections.abc import Sequence

from angelptm.config.schema import SsdPath
from angelptm.engine.setup import existing_folder

_SECONDS_PER_DAY = 86400


def drive_capacity_bytes(folders: Sequence[SsdPath]) -> int:
    """What the config states, or the size of the file system; of folders on one file system it counts once."""
    capacities: dict[int, int] = {}
    for folder in folders:
        existing = existing_folder(folder.path)
        space = os.statvfs(existing)
        device = existing.stat().st_dev
        stated = folder.drive_capacity
        if stated is not None or device not in capacities:
            capacities[device] = stated if stated is not None else space.f_blocks * space.f_frsize
    return sum(capacities.values())


def endurance(written_bytes: int, steps: int, seconds: float, capacity_bytes: int) -> dict[str, float]:
    """Bytes written to the SSD tier per step and per day at this speed, and the drive writes per day that these are."""
    if not steps or not seconds:
        return {}
    per_day = written_bytes / seconds * _SECONDS_PER_DAY
    return {
        "written_bytes_per_step": written_bytes / steps,
        "written_bytes_per_day": per_day,
        "drive_capacity_bytes": capacity_bytes,
        "drive_writes_per_day": per_day / capacity_bytes if capacity_bytes else 0.0,
    }
