"""fp32 training agrees with torch.optim, which shares no code with the kernels."""

from __future__ import annotations

import copy

import pytest
import torch

from .conftest import MakeEngine
from .models import GPT2, LLAMA, PLAIN, T5, Family, loss_of
from .training import train_step

STEPS = 20
BOUND = 1e-6


def _has_zero_gradient(family: Family, name: str) -> bool:
    """Key biases shift all scores of a query by one number, which softmax ignores: their true gradient is exactly zero,
    so what is computed is rounding noise, and Adam scales noise up to steps of size lr. They are in c_attn.bias."""
    return family is GPT2 and name.endswith("attn.c_attn.bias")


@pytest.mark.parametrize("family", [LLAMA, GPT2, T5, PLAIN], ids=lambda family: family.name)
def test_adamw_is_within_1e_6_of_torch(family: Family, make_engine: MakeEngine) -> None:
    """Losses within 1e-6 relative, each parameter within 1e-6, all of them together within 1e-6 of their norm. Not each
    one relative to itself: where a gradient is small, Adam's quotient turns a last bit into a share of lr."""
    model = family.model()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    engine = make_engine(model, optimizer={"lr": 1e-3, "weight_decay": 0.1})
    for step in range(STEPS):
        batch = family.batch(step)
        expected = loss_of(plain(**batch))
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        (found,) = train_step(engine, [batch])
        assert float(found) == pytest.approx(expected.item(), rel=BOUND), f"loss of step {step}"
    values = engine.state_dict()
    difference = scale = 0.0
    for name, param in plain.named_parameters():
        if not _has_zero_gradient(family, name):
            delta = values[name] - param.detach()
            assert delta.abs().max() <= BOUND, name
            difference += float(delta.square().sum())
            scale += float(param.detach().square().sum())
    assert difference**0.5 <= BOUND * scale**0.5
