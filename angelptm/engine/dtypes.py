"""The two compute precisions, as torch and the native module name them."""

from __future__ import annotations

import angelptm_native as native
import torch

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NATIVE_DTYPES = {torch.float32: native.DType.F32, torch.bfloat16: native.DType.BF16}
