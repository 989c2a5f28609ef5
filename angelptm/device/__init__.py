"""Devices: where the model computes and the arena lies. Nothing above this package asks which one it is."""

from angelptm.device.cpu import CpuDevice
from angelptm.device.protocol import Device

__all__ = ["CpuDevice", "Device"]
