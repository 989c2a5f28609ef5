"""What a reader of a measurement needs to know of the machine it was made on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def machine_facts(path: str) -> dict[str, str | int]:
    """CPU, memory, kernel, and the file system and device under ``path``; "unknown" where the system does not say."""
    device = os.stat(path).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    parent = block.resolve().parent  # of a partition: the whole device
    model = _first_line(block / "device/model") or _first_line(parent / "device/model")
    return {
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system": file_system(path),
        "device": model or (block.resolve().name if block.exists() else "unknown"),
    }


def source_commit(folder: Path) -> str:
    """Short hash of the commit that the sources around ``folder`` are of, with ``-dirty`` where files have changed
    since; "unknown" outside a repository, and without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip().split("\n")[0]
    except OSError:
        return ""


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def file_system(path: str) -> str:
    """Type of the longest mount point above ``path``."""
    path = os.path.realpath(path)
    best = ("", "unknown")
    try:
        lines = Path("/proc/mounts").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return best[1]
    for line in lines:
        point, kind = line.split()[1:3]
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]
