"""The native kernels on numpy arrays and torch CPU tensors: one optimizer step, and the gradient copy-out.

Everything works in place on memory that the caller owns, with the GIL released, on the calling thread; several threads
may call at once on disjoint elements. Arrays are one-dimensional and contiguous, float32, or bfloat16 where it says so
(numpy has no bfloat16, so there its bits travel as uint16). What does not fit raises ValueError before anything is
written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import angelptm_native as native
import numpy as np
import torch
from angelptm_native import DType, GradStats, Hyper, Isa, Rule

__all__ = [
    "GRAD_BLOCK",
    "GradStats",
    "Hyper",
    "Isa",
    "Rule",
    "accumulate",
    "adamw_hyper",
    "lion_hyper",
    "sgd_hyper",
    "step",
    "tree_sum",
]

Array: TypeAlias = "np.ndarray | torch.Tensor"

GRAD_BLOCK: int = native.GRAD_BLOCK
"""Elements in a leaf of the tree over which sums of squares are formed; a page holds a power of two of leaves."""

_DTYPES: dict[object, DType] = {
    torch.float32: DType.F32,
    torch.bfloat16: DType.BF16,
    np.dtype(np.float32): DType.F32,
    np.dtype(np.uint16): DType.BF16,
}


def adamw_hyper(
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    step: int,
    grad_scale: float = 1.0,
) -> Hyper:
    """AdamW as torch.optim.AdamW. ``step`` counts from 1; ``grad_scale`` multiplies the gradient first."""
    _check_step(step)
    hyper = Hyper()
    hyper.rule = Rule.ADAMW
    hyper.lr, hyper.eps, hyper.weight_decay, hyper.grad_scale = lr, eps, weight_decay, grad_scale
    hyper.beta1, hyper.beta2 = betas
    hyper.bias_correction1 = 1 - betas[0] ** step
    hyper.bias_correction2_sqrt = math.sqrt(1 - betas[1] ** step)
    return hyper


def sgd_hyper(
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    step: int,
    grad_scale: float = 1.0,
) -> Hyper:
    """SGD as torch.optim.SGD; at ``step`` 1 the momentum buffer starts as the gradient, whatever it held."""
    _check_step(step)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(f"nesterov: found momentum {momentum} and dampening {dampening}, expected > 0 and 0")
    hyper = Hyper()
    hyper.rule = Rule.SGD
    hyper.lr, hyper.beta1, hyper.dampening = lr, momentum, dampening
    hyper.weight_decay, hyper.nesterov, hyper.grad_scale = weight_decay, nesterov, grad_scale
    hyper.first_step = step == 1
    return hyper


def lion_hyper(
    lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, *, grad_scale: float = 1.0
) -> Hyper:
    """Lion (arXiv 2302.06675) with decoupled weight decay; the same at every step."""
    hyper = Hyper()
    hyper.rule = Rule.LION
    hyper.lr, hyper.weight_decay, hyper.grad_scale = lr, weight_decay, grad_scale
    hyper.beta1, hyper.beta2 = betas
    return hyper


def step(
    hyper: Hyper, master: Array, exp_avg: Array | None, exp_avg_sq: Array | None, grad: Array, param: Array
) -> None:
    """One optimizer step, in place; no two arrays may overlap.

    ``master``, ``exp_avg``, ``exp_avg_sq``: (numel,) float32, read and written; a state that the rule does not keep is
    None (``exp_avg_sq`` for SGD and Lion, ``exp_avg`` too for SGD without momentum). ``grad``: (numel,) float32 or
    bfloat16. ``param``: (numel,) float32 or bfloat16, written: the new master rounded to
    nearest, ties away from zero.
    """
    count = _count(master)
    moments = 0 if hyper.rule == Rule.SGD and hyper.beta1 == 0 else native.moment_count(hyper.rule)
    master_address, _ = _check("master", master, count, writable=True, only=DType.F32)
    exp_avg_address = _check_moment("exp_avg", exp_avg, count, needed=moments >= 1)
    exp_avg_sq_address = _check_moment("exp_avg_sq", exp_avg_sq, count, needed=moments >= 2)
    grad_address, grad_dtype = _check("grad", grad, count, writable=False)
    param_address, param_dtype = _check("param", param, count, writable=True)
    native.step(
        hyper,
        master_address,
        exp_avg_address,
        exp_avg_sq_address,
        grad_address,
        grad_dtype,
        param_address,
        param_dtype,
        count,
    )


def accumulate(dst: Array, src: Array, *, add: bool, first_element: int = 0) -> GradStats:
    """``dst = dst + src`` if ``add``, else ``dst = src``; returns the sum of squares and finiteness of the new dst.

    Both: (numel,) float32 or bfloat16; added in float32, rounded once. ``first_element`` is the index of ``dst[0]`` in
    its unit's element space. The sum is a node of a tree that depends on that space alone: `tree_sum` over the pages of
    a unit gives the same bits whatever the page size.
    """
    if first_element < 0:
        raise ValueError(f"first_element: found {first_element}, expected 0 or more")
    count = _count(dst)
    dst_address, dst_dtype = _check("dst", dst, count, writable=True)
    src_address, src_dtype = _check("src", src, count, writable=False)
    return native.accumulate(dst_address, dst_dtype, src_address, src_dtype, count, add, first_element)


def tree_sum(values: Sequence[float] | np.ndarray, first_index: int = 0) -> float:
    """The tree above the pages: ``values[i]`` is the sum of the aligned page ``first_index + i``, all of one size."""
    if first_index < 0:
        raise ValueError(f"first_index: found {first_index}, expected 0 or more")
    return native.tree_sum(np.asarray(values, np.float64).tolist(), first_index)


def _check_step(step: int) -> None:
    if step < 1:
        raise ValueError(f"step: found {step}, expected the number of this step, counted from 1")


def _count(array: Array) -> int:
    return array.numel() if isinstance(array, torch.Tensor) else array.size


def _check_moment(name: str, array: Array | None, count: int, *, needed: bool) -> int:
    if array is None:
        if needed:
            raise ValueError(f"{name}: found None, expected the state that this rule keeps")
        return 0
    if not needed:
        raise ValueError(f"{name}: found an array, expected None, since this rule does not keep it")
    address, _ = _check(name, array, count, writable=True, only=DType.F32)
    return address


def _check(name: str, array: Array, count: int, *, writable: bool, only: DType | None = None) -> tuple[int, DType]:
    """The address and dtype of a 1-d contiguous CPU array of ``count`` elements, or ValueError."""
    dtype = _DTYPES.get(array.dtype)
    if dtype is None or only not in (None, dtype):
        raise ValueError(f"{name}: found dtype {array.dtype}, expected float32{'' if only else ' or bfloat16'}")
    if tuple(array.shape) != (count,):
        raise ValueError(f"{name}: found shape {tuple(array.shape)}, expected ({count},)")
    if isinstance(array, torch.Tensor):
        if array.device.type != "cpu":
            raise ValueError(f"{name}: found a tensor on {array.device}, expected host memory")
        contiguous, address = array.is_contiguous(), array.data_ptr()
    else:
        contiguous, address = array.flags.c_contiguous, array.ctypes.data
        if writable and not array.flags.writeable:
            raise ValueError(f"{name}: found a read-only array, expected a writable one")
    if not contiguous:
        raise ValueError(f"{name}: found a strided array, expected a contiguous one")
    return address, dtype
