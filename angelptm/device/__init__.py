"""Devices: where the model computes and the arena lies. Nothing above this package asks which one it is."""

from angelptm.device.cpu import CpuDevice
from angelptm.device.cuda import CudaDevice
from angelptm.device.late import LateDevice
from angelptm.device.protocol import Device

__all__ = ["CpuDevice", "CudaDevice", "Device", "LateDevice", "make_device"]


def make_device(name: str, arena_bytes: int, keep_freed_bytes: int) -> Device:
    """``name`` is the config's ``device``: cpu, late, cuda or cuda:N. Raises AngelPTMError where there is none."""
    kind, _, index = name.partition(":")
    if kind == "cuda":
        return CudaDevice(arena_bytes, int(index) if index else None)
    return {"cpu": CpuDevice, "late": LateDevice}[kind](arena_bytes, keep_freed_bytes)
