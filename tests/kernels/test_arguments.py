"""What does not fit raises ValueError that names the argument, and nothing is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from angelptm import kernels

ADAMW = kernels.adamw_hyper(1e-3, step=1)


def arguments() -> dict[str, torch.Tensor | np.ndarray | None]:
    return {name: torch.ones(8) for name in ("master", "exp_avg", "exp_avg_sq", "grad", "param")}


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("master", torch.ones(8, dtype=torch.bfloat16), "bfloat16"),
        ("master", torch.ones(2, 4), r"\(2, 4\)"),
        ("exp_avg", None, "None"),
        ("exp_avg_sq", torch.ones(9), r"\(9,\)"),
        ("exp_avg_sq", np.ones(8), "float64"),
        ("grad", torch.ones(8, dtype=torch.float16), "float16"),
        ("grad", torch.ones(16)[::2], "strided"),
        ("grad", np.ones(16, np.float32)[::2], "strided"),
        ("param", torch.ones(8, device="meta"), "meta"),
        ("param", np.frombuffer(bytes(32), np.float32), "read-only"),
    ],
)
def test_a_bad_array_is_refused_before_anything_is_written(name, value, found):
    given = arguments() | {name: value}
    with pytest.raises(ValueError, match=f"{name}: found .*{found}"):
        kernels.step(ADAMW, **given)
    assert all(bool((array == 1).all()) for other, array in given.items() if other != name)


def test_a_state_that_the_rule_does_not_keep_is_refused():
    with pytest.raises(ValueError, match="exp_avg_sq: found an array, expected None"):
        kernels.step(kernels.lion_hyper(1e-3), **arguments())
    with pytest.raises(ValueError, match="exp_avg: found an array, expected None"):
        kernels.step(kernels.sgd_hyper(1e-3, step=1), **(arguments() | {"exp_avg_sq": None}))


def test_accumulate_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"src: found shape \(3,\)"):
        kernels.accumulate(torch.zeros(4), torch.zeros(3), add=True)
    with pytest.raises(ValueError, match="dst: found a read-only array"):
        kernels.accumulate(np.frombuffer(bytes(16), np.float32), torch.zeros(4), add=True)
    with pytest.raises(ValueError, match="first_element: found -1"):
        kernels.accumulate(torch.zeros(4), torch.zeros(4), add=True, first_element=-1)


def test_bad_hyperparameters_are_refused():
    with pytest.raises(ValueError, match="step: found 0"):
        kernels.adamw_hyper(1e-3, step=0)
    with pytest.raises(ValueError, match="step: found 0"):
        kernels.sgd_hyper(1e-3, step=0)
    with pytest.raises(ValueError, match="nesterov: found momentum 0"):
        kernels.sgd_hyper(1e-3, nesterov=True, step=1)
    with pytest.raises(ValueError, match="first_index: found -1"):
        kernels.tree_sum([1.0], -1)


def test_numpy_and_torch_share_one_path():
    states = [[np.ones(5, np.float32) for _ in range(4)], [torch.ones(5) for _ in range(4)]]
    params = [np.zeros(5, np.uint16), torch.zeros(5, dtype=torch.bfloat16)]
    for arrays, param in zip(states, params, strict=True):
        kernels.step(ADAMW, *arrays, param)
    assert params[0].tobytes() == params[1].view(torch.int16).numpy().tobytes()
    assert all(a.tobytes() == b.numpy().tobytes() for a, b in zip(*states, strict=True))
