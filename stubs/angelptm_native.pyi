# The native module. All addresses are integers; whoever calls owns the memory and keeps it alive.

# ---- kernels (csrc/bind/bind_kernels.cpp) ----

from collections.abc import Sequence
from enum import Enum

class DType(Enum):
    F32 = ...
    BF16 = ...

class Rule(Enum):
    ADAMW = ...
    SGD = ...
    LION = ...

class Isa(Enum):
    SCALAR = ...
    AVX2 = ...
    AVX512 = ...

class Hyper:
    rule: Rule
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    dampening: float
    nesterov: bool
    first_step: bool
    bias_correction1: float
    bias_correction2_sqrt: float
    grad_scale: float
    def __init__(self) -> None: ...

class GradStats:
    @property
    def sum_squares(self) -> float: ...
    @property
    def finite(self) -> bool: ...

GRAD_BLOCK: int

def moment_count(rule: Rule) -> int: ...
def step(
    hyper: Hyper,
    master: int,
    exp_avg: int,
    exp_avg_sq: int,
    grad: int,
    grad_dtype: DType,
    param: int,
    param_dtype: DType,
    count: int,
) -> None: ...
def memory_ceiling(
    master: int,
    exp_avg: int,
    exp_avg_sq: int,
    grad: int,
    grad_dtype: DType,
    param: int,
    param_dtype: DType,
    count: int,
    past_cache: bool,
) -> None: ...
def accumulate(
    dst: int, dst_dtype: DType, src: int, src_dtype: DType, count: int, add: bool, first_element: int
) -> GradStats: ...
def tree_sum(values: Sequence[float], first_index: int = 0) -> float: ...
def isa_name(isa: Isa) -> str: ...
def isa_supported(isa: Isa) -> bool: ...
def isa_in_use() -> Isa: ...
def use_isa(isa: Isa) -> None: ...

# ---- end of kernels ----
