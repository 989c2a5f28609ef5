"""The two compute precisions, as torch and the native module name them."""

from __future__ import annotations

import angelptm_native as native
import torch

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NATIVE_DTYPES = {torch.float32: native.DType.F32, torch.bfloat16: native.DType.BF16}


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` in compute precision, as updates round them: bf16 is the nearest, ties away from zero, so that a split
    master is never ambiguous. Contiguous; a new tensor, or ``values`` itself where nothing is to be done."""
    if dtype != torch.bfloat16 or values.dtype == torch.bfloat16:
        return values.to(dtype).contiguous()
    source = values.detach().to(torch.float32).contiguous()
    out = torch.empty(source.shape, dtype=dtype)
    native.split_master(source.data_ptr(), out.data_ptr(), 0, source.numel())
    return out
