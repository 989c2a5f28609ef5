"""Budgets that the user leaves to us: ``auto`` becomes bytes, from a hardware file or from this machine's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from angelptm.config.schema.hardware import Hardware
from angelptm.config.schema.types import expected
from angelptm.memory import gpu_memory_bytes, host_memory, ranks_here
from angelptm.sizes import parse_bytes

AUTO = "auto"
# What is left beside the pages, for Python, torch, a small batch's activations and the page cache: an eighth, but not
# less and not more than these.
_LEAST_REST_BYTES, _MOST_REST_BYTES, _REST_PART = 3 * 2**30, 32 * 2**30, 8
# Of a GPU's memory; the rest is for activations, workspaces and the driver. `angelptm plan` says whether it is enough.
_DEVICE_PART = 0.6
_CPU_DEVICE_PART = 16
_MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes of the host that a run may have, and may page-lock, None where there is no limit; and of the device, None
    where that is the host's."""

    host_bytes: int
    locked_bytes: int | None
    device_bytes: int | None


def sized(tiers: Mapping[str, Any], device: object, hardware: Hardware | None) -> dict[str, Any]:
    """``tiers`` with sizes for ``auto``, and with the hardware file's folders for ``ssd: auto``.

    The device gets a share of its own memory, on ``device: cpu`` of the host's; the host pool gets what is left of DRAM
    when the process has some of it. Several ranks of a machine get equal parts of its DRAM. Raises what ``expected``
    makes.
    """
    found = dict(tiers)
    if found.get("ssd") == AUTO:
        if hardware is None or not hardware.ssd:
            raise expected(
                "a list of folders, as no hardware file names any",
                key="tiers.ssd",
                value=AUTO,
                remedy="Write tiers.ssd: [{path: FOLDER}], or name a hardware file that `angelptm measure` wrote.",
            )
        found["ssd"] = [{"path": str(one.path)} for one in hardware.ssd]
    if AUTO not in (found.get("device"), found.get("host")):
        return found
    on_gpu = isinstance(device, str) and device.startswith("cuda")
    memory = _of_hardware(hardware) if hardware is not None and hardware.host is not None else _of_machine(device)
    if found.get("device") == AUTO:
        if on_gpu and memory.device_bytes is None:
            raise expected(
                "a size, as the GPU's memory is not known: torch sees no such GPU here",
                key="tiers.device",
                value=AUTO,
                remedy="Write a size, or name a hardware file that describes the GPU.",
            )
        whole = memory.device_bytes if on_gpu else None
        size = memory.host_bytes // _CPU_DEVICE_PART if whole is None else int(whole * _DEVICE_PART)
        found["device"] = size // _MIB * _MIB
    if found.get("host") == AUTO:
        left = memory.host_bytes - max(_LEAST_REST_BYTES, min(_MOST_REST_BYTES, memory.host_bytes // _REST_PART))
        if not on_gpu:
            left -= _bytes_of(found.get("device"))
        elif memory.locked_bytes is not None:  # the pool is page-locked
            left = min(left, memory.locked_bytes)
        if left < _MIB:
            raise expected(
                f"a size, as this machine's memory of {memory.host_bytes} bytes leaves nothing for pages",
                key="tiers.host",
                value=AUTO,
            )
        found["host"] = left // _MIB * _MIB
    return found


def _bytes_of(size: Any) -> int:
    """0 of what is no size, which the config refuses soon."""
    try:
        return parse_bytes(size)
    except ValueError:
        return 0


def _of_hardware(hardware: Hardware) -> Memory:
    assert hardware.host is not None
    memory = None if hardware.device is None else hardware.device.memory
    return Memory(hardware.host.memory // ranks_here(), None, memory)


def _of_machine(device: object) -> Memory:
    found = host_memory()
    gpu = None
    if isinstance(device, str) and device.startswith("cuda"):
        _, _, index = device.partition(":")
        gpu = gpu_memory_bytes(int(index) if index.isdecimal() else 0)
    locked = found.memlock_limit_bytes
    return Memory(found.allowed_bytes // ranks_here(), locked if locked is None else locked // ranks_here(), gpu)


def hardware_path(value: object) -> Path | None:
    """Of the ``hardware`` key as the user wrote it; None where it is missing, ``auto`` or no path."""
    if not isinstance(value, (str, Path)) or str(value) in ("", AUTO) or "\0" in str(value):
        return None
    return Path(value).expanduser()
