"""Formats of optimizer states. Pure data: neither torch nor the native module is imported here."""

from __future__ import annotations

from dataclasses import dataclass, replace

BLOCK8 = 128
"""Elements of an int8 moment under one fp32 scale: the native module's kBlock8."""

MOMENT_COUNT = {"adamw": 2, "sgd": 1, "lion": 1}
"""Moments that a rule keeps, by the name of its optimizer."""

MASTER_ITEMSIZE = {"fp32": 4, "split": 2}
MOMENT_ITEMSIZE = {"fp32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class StateFormats:
    """What a parameter's states are stored as; csrc/kernels/codec.h says what the words mean.

    ``master``: "fp32", or "split" beside a bf16 parameter. ``exp_avg`` and ``exp_avg_sq``: "fp32", "bf16" or "int8";
    the latter means nothing to rules that keep one moment.
    """

    master: str = "fp32"
    exp_avg: str = "fp32"
    exp_avg_sq: str = "fp32"

    def of_rule(self, moment_count: int) -> StateFormats:
        """The same without what the rule does not keep."""
        return self if moment_count > 1 else replace(self, exp_avg_sq="fp32")

    def moments(self, moment_count: int) -> tuple[str, ...]:
        """Formats of the moments that a rule keeps."""
        return (self.exp_avg, self.exp_avg_sq)[:moment_count]

    def section_bytes(self, count: int, moment_count: int) -> list[int]:
        """Bytes of the sections of ``count`` elements in a record: master, moments, and a part of scales for each
        moment in int8, in this order."""
        moments = self.moments(moment_count)
        return [
            MASTER_ITEMSIZE[self.master] * count,
            *(MOMENT_ITEMSIZE[one] * count for one in moments),
            *(4 * -(-count // BLOCK8) for one in moments if one == "int8"),
        ]


FP32 = StateFormats()
