"""How much memory a process of this machine may have: DRAM, control group, locked pages, and that of a GPU."""

from __future__ import annotations

import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")
RANKS_HERE = "LOCAL_WORLD_SIZE"
"""The variable in which torchrun says how many processes it has started on this machine."""
PROCESS_BYTES = 2**30
"""What Python, torch and transformers take of the host's memory, beside pages and activations."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes; None where there is no limit."""

    total_bytes: int
    available_bytes: int
    swap_bytes: int
    cgroup_limit_bytes: int | None
    memlock_limit_bytes: int | None

    @property
    def allowed_bytes(self) -> int:
        """What a process may have of it, whatever others have now."""
        return min(self.total_bytes, self.cgroup_limit_bytes or self.total_bytes)


def ranks_here() -> int:
    """Processes on this machine that share it as ranks of one run."""
    text = os.environ.get(RANKS_HERE, "")
    return max(1, int(text)) if text.isdecimal() else 1


def host_memory() -> HostMemory:
    memory = psutil.virtual_memory()
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return HostMemory(
        total_bytes=memory.total,
        available_bytes=memory.available,
        swap_bytes=psutil.swap_memory().total,
        cgroup_limit_bytes=_cgroup_limit_bytes(),
        memlock_limit_bytes=None if locked == resource.RLIM_INFINITY else locked,
    )


def gpu_memory_bytes(index: int = 0) -> int | None:
    """Of the GPU of that index; None where torch sees no such GPU."""
    import torch  # takes seconds, which no other question needs

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    return int(torch.cuda.get_device_properties(index).total_memory)


def peak_rss_bytes() -> int:
    """The most that this program has had in memory so far. ru_maxrss, the answer where /proc has none, also knows the
    process that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", read_text(Path("/proc/self/status")))
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def _cgroup_limit_bytes() -> int | None:
    """The smallest memory limit on the way from this process's control group (version 2 or 1) up to the root."""
    folders: list[Path] = []
    for line in read_text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            group = (_CGROUP_ROOT / controllers).joinpath(name.lstrip("/"))
            folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(_CGROUP_ROOT)]
    texts = [read_text(folder / file).strip() for folder in folders for file in ("memory.max", "memory.limit_in_bytes")]
    # Version 1 writes a number near 2**63 for "no limit".
    limits = [int(text) for text in texts if text.isdecimal() and int(text) < 2**60]
    return min(limits, default=None)


def read_text(path: Path) -> str:
    """The text of a file of /proc or /sys; empty if it does not exist here."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
