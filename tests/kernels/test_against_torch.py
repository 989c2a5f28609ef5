"""100 steps beside torch.optim, and a plain Lion; publication beside torch's own conversion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from angelptm import kernels

from .arrays import floats

COUNT = 4099
STEPS = 100


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units of the value, or of 1, the size that parameters start from, where it is smaller.

    Nearer to zero the rounding of the larger values that an element had before remains: without that floor torch's own
    fused AdamW is up to 2e-5 from its single-tensor one on this data. `norm_error` has no floor.
    """
    return float(((found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)).max())


def norm_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(found, expected) <= 1e-6
    assert norm_error(found, expected) <= 1e-7


def gradients(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-12, 3, (COUNT,), generator=generator).float())
    return [torch.randn(COUNT, generator=generator) * scale for _ in range(STEPS)]


def start(seed: int) -> torch.Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


def run_torch(optimizer_type: type[torch.optim.Optimizer], **options: object) -> torch.Tensor:
    parameter = torch.nn.Parameter(start(0))
    optimizer = optimizer_type([parameter], foreach=False, **options)
    for gradient in gradients(1):
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-3},
        {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-6},
        {"lr": 3e-3, "betas": (0.95, 0.98), "weight_decay": 0.1},
        {"lr": 1e-3, "betas": (0.0, 0.9)},
    ],
    ids=str,
)
def test_adamw_stays_within_1e_6_of_torch_after_100_steps(options):
    master, exp_avg, exp_avg_sq, param = start(0), torch.zeros(COUNT), torch.zeros(COUNT), torch.empty(COUNT)
    for number, gradient in enumerate(gradients(1), start=1):
        # The gradient comes scaled, as from a loss scale; powers of two are exact, so torch may see it unscaled.
        hyper = kernels.adamw_hyper(**options, step=number, grad_scale=1 / 128)
        kernels.step(hyper, master, exp_avg, exp_avg_sq, gradient * 128, param)
    assert_close(master, run_torch(torch.optim.AdamW, **options))
    assert torch.equal(param, master)


@pytest.mark.usefixtures("isa")
def test_without_memory_the_average_is_the_gradient_itself():
    exp_avg, gradient = torch.full((COUNT,), 1e6), gradients(1)[0]
    kernels.step(
        kernels.adamw_hyper(1e-3, (0.0, 0.9), step=2), start(0), exp_avg, torch.zeros(COUNT), gradient, start(0)
    )
    assert torch.equal(exp_avg, gradient)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.01},
        {"lr": 0.01, "weight_decay": 0.1},
        {"lr": 0.01, "momentum": 0.9},
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01},
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ],
    ids=str,
)
def test_sgd_stays_within_1e_6_of_torch_after_100_steps(options):
    master, param = start(0), torch.empty(COUNT)
    momentum = torch.full((COUNT,), float("nan")) if "momentum" in options else None  # Step 1 must not read it.
    for number, gradient in enumerate(gradients(1), start=1):
        kernels.step(kernels.sgd_hyper(**options, step=number), master, momentum, None, gradient, param)
    assert_close(master, run_torch(torch.optim.SGD, **options))


@pytest.mark.usefixtures("isa")
def test_lion_follows_its_paper_for_100_steps():
    lr, (beta1, beta2), decay = 1e-3, (0.9, 0.99), 0.1
    expected, average = start(0), torch.zeros(COUNT)
    master, exp_avg, param = start(0), torch.zeros(COUNT), torch.empty(COUNT)
    for gradient in gradients(1):
        expected.mul_(1 - lr * decay)
        expected.add_((average * beta1 + gradient * (1 - beta1)).sign_(), alpha=-lr)
        average.mul_(beta2).add_(gradient, alpha=1 - beta2)
        kernels.step(kernels.lion_hyper(lr, (beta1, beta2), decay), master, exp_avg, None, gradient, param)
    assert_close(master, expected)


@pytest.mark.usefixtures("isa")
def test_published_bf16_is_the_nearest_to_master():
    """torch's rounding but for ties, which go away from zero: a split master could not tell them apart otherwise."""
    rng = np.random.default_rng(2)
    master = floats(rng, 100_003)
    master[np.isnan(master)] = 1.0  # torch stores another NaN; ours is tested in test_parity.
    param = torch.empty(master.size, dtype=torch.bfloat16)
    zeros = [np.zeros_like(master) for _ in range(2)]
    kernels.step(kernels.sgd_hyper(0.0, 0.5, step=2), master, zeros[0], None, zeros[1], param)
    bits = master.view(np.uint32)
    found, expected = param.view(torch.int16).numpy().view(np.uint16), ((bits.astype(np.uint64) + 0x8000) >> 16)
    assert np.array_equal(found, expected.astype(np.uint16))
    ties = bits & 0xFFFF == 0x8000
    torchs = torch.from_numpy(master).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(found[~ties], torchs[~ties])


@pytest.mark.usefixtures("isa")
def test_a_bf16_gradient_counts_as_its_float32_value():
    gradient = torch.randn(COUNT, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    outcomes = []
    for grad in (gradient, gradient.float()):
        states = [start(0), torch.zeros(COUNT), torch.zeros(COUNT)]
        param = torch.empty(COUNT, dtype=torch.bfloat16)
        kernels.step(kernels.adamw_hyper(1e-3, step=1), *states, grad, param)
        outcomes.append([*(state.numpy().tobytes() for state in states), param.view(torch.int16).numpy().tobytes()])
    assert outcomes[0] == outcomes[1]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dst_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("src_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulate_adds_in_float32_and_rounds_once(add, dst_dtype, src_dtype):
    generator = torch.Generator().manual_seed(6)
    count = 3 * kernels.GRAD_BLOCK + 101
    dst = torch.randn(count, generator=generator).to(dst_dtype)
    src = (torch.randn(count, generator=generator) * 0.1).to(src_dtype)
    expected = ((dst.float() + src.float()) if add else src.float()).to(dst_dtype)
    stats = kernels.accumulate(dst, src, add=add)
    assert torch.equal(dst, expected)
    squares = float(dst.double().square().sum())
    assert stats.finite
    assert stats.sum_squares == pytest.approx(squares, rel=1e-12)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [0, 17, kernels.GRAD_BLOCK, 2 * kernels.GRAD_BLOCK + 8])
def test_one_value_that_is_not_finite_is_found(bad, dtype, place):
    src = torch.ones(2 * kernels.GRAD_BLOCK + 9, dtype=dtype)
    src[place] = bad
    assert not kernels.accumulate(torch.zeros_like(src), src, add=True).finite


@pytest.mark.usefixtures("isa")
def test_the_largest_floats_are_finite():
    src = torch.full((kernels.GRAD_BLOCK + 9,), torch.finfo(torch.float32).max)
    assert kernels.accumulate(torch.zeros_like(src), src, add=True).finite
    # What overflows in the addition is found, though both addends are finite.
    assert not kernels.accumulate(src.clone(), src, add=True).finite
    # So is what overflows only when rounded to bf16.
    assert not kernels.accumulate(torch.zeros(src.shape, dtype=torch.bfloat16), src, add=False).finite
