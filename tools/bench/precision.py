"""The precision that a benchmark uses unless told otherwise."""

from __future__ import annotations


def fast_precision() -> str:
    """bf16 where torch multiplies matrices in it with the processor's help, else fp32: without, a backward pass takes
    a hundred times as long (0.4 to 0.7 Gflop/s on two cores with AVX2)."""
    import torch

    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
