"""Parameters whose values are elsewhere: what still works, and clear refusals of all that does not."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from angelptm.engine import Engine
from angelptm.errors import AngelPTMError, ParkedError

from .conftest import MakeEngine
from .models import GPT2, PLAIN, loss_of
from .training import assert_same_values, snapshot

NAME = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine(GPT2.model())


def parked(engine: Engine) -> nn.Parameter:
    return dict(engine.module.named_parameters())[NAME]


def test_metadata_is_there_without_values(engine: Engine) -> None:
    param = parked(engine)
    plain = dict(GPT2.model().named_parameters())[NAME]
    assert isinstance(param, nn.Parameter)
    assert (param.shape, param.dtype, param.numel()) == (plain.shape, plain.dtype, plain.numel())
    assert param.requires_grad
    assert param.is_leaf
    assert param.device == torch.device("cpu")
    assert NAME in repr(param)
    assert engine.module.num_parameters() == GPT2.model().num_parameters()  # type: ignore[operator]
    assert engine.module.dtype == torch.float32
    assert [name for name, _ in engine.module.named_parameters()] == [n for n, _ in GPT2.model().named_parameters()]


READS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda p: p.sum(),
    "add": lambda p: p + 1,
    "matmul": lambda p: torch.zeros(1, 64) @ p,
    "item": lambda p: p[0, 0].item(),
    "tolist": lambda p: p.tolist(),
    "numpy": lambda p: p.detach().numpy(),
    "asarray": lambda p: np.asarray(p.detach()),
    "data-norm": lambda p: p.data.norm(),
    "detached": lambda p: p.detach().clone(),
    "float": lambda p: p.double(),
    "clone": lambda p: p.clone(),
    "comparison": lambda p: bool((p == 0).all()),
    "fill": lambda p: nn.init.zeros_(p),
    "copy-to": lambda p: p.data.copy_(torch.zeros(p.shape)),
    "copy-from": lambda p: torch.zeros(p.shape).copy_(p.detach()),
    "data-pointer": lambda p: p.data_ptr(),
    "storage": lambda p: p.untyped_storage().data_ptr(),
    "assigned-data": lambda p: setattr(p, "data", torch.zeros(p.shape)),
    "cat": lambda p: torch.cat([p.detach().flatten(), torch.zeros(1)]),
    "parameters-to-vector": lambda p: nn.utils.parameters_to_vector([p]),
    "functional": lambda p: nn.functional.linear(torch.zeros(1, p.shape[1]), p),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_names_the_parameter_and_the_remedy(read: Callable[[Any], Any], engine: Engine) -> None:
    before = snapshot(engine.state_dict())
    with pytest.raises(ParkedError, match=rf"{NAME}.*engine\.gathered"):
        read(parked(engine))
    assert_same_values(engine.state_dict(), before)


def test_gradient_of_a_parked_parameter_is_refused_only_while_there_is_one(engine: Engine) -> None:
    param = parked(engine)
    assert param.grad is None
    loss_of(engine(**GPT2.batch(0))).backward()
    with pytest.raises(ParkedError, match=rf"{NAME}.*gradient_clipping.*clip_grad_norm_.*zero_grad"):
        _ = param.grad
    engine.optimizer.zero_grad()
    assert param.grad is None


def test_gradient_cannot_be_assigned(engine: Engine) -> None:
    parked(engine).grad = None
    with pytest.raises(ParkedError, match=NAME):
        parked(engine).grad = torch.zeros(parked(engine).shape)


def test_clipping_of_torch_does_not_silently_do_nothing(engine: Engine) -> None:
    loss_of(engine(**GPT2.batch(0))).backward()
    with pytest.raises(ParkedError, match=r"engine\.clip_grad_norm_"):
        nn.utils.clip_grad_norm_(engine.module.parameters(), 1.0)
    with pytest.raises(ParkedError, match=r"engine\.clip_grad_norm_"):
        nn.utils.clip_grad_value_(engine.module.parameters(), 1.0)
    with pytest.raises(ParkedError, match="zero_grad"):
        engine.module.zero_grad()


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model.state_dict(), io.BytesIO()),
}


@pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES.keys())
def test_copying_the_model_is_refused(copy_of: Callable[[nn.Module], Any], make_engine: MakeEngine) -> None:
    engine = make_engine(PLAIN.model())
    with pytest.raises(ParkedError, match=r"engine\.state_dict\(\).*export_safetensors"):
        copy_of(engine.module)


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "meta": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_converting_the_model_is_refused(convert: Callable[[nn.Module], Any], make_engine: MakeEngine) -> None:
    engine = make_engine(PLAIN.model())
    with pytest.raises(ParkedError):
        convert(engine.module)


def test_loading_into_the_model_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(PLAIN.model())
    before = snapshot(engine.state_dict())
    with pytest.raises(RuntimeError, match=r"engine\.gathered"):
        engine.module.load_state_dict(PLAIN.model().state_dict())
    assert_same_values(engine.state_dict(), before)


def test_state_of_the_optimizer_is_refused(engine: Engine) -> None:
    with pytest.raises(AngelPTMError, match=r"live in pages.*save_checkpoint"):
        engine.optimizer.state_dict()
    with pytest.raises(AngelPTMError, match="load_checkpoint"):
        engine.optimizer.load_state_dict({})


class Outside(nn.Module):
    """Reads a child's weight without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(96, 64)
        self.inner = nn.Linear(64, 64)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return nn.functional.linear(self.tokens(input_ids), self.inner.weight)


def test_use_outside_of_the_owner_is_a_clear_error(make_engine: MakeEngine) -> None:
    engine = make_engine(Outside())
    for _ in range(2):
        with pytest.raises(ParkedError, match=r"inner\.weight.*units\.classes"):
            engine(**PLAIN.batch(0))
    assert not any(leaves.placed for leaves in engine._leaves)


def test_parameters_are_parked_again_after_each_use(engine: Engine) -> None:
    from angelptm.engine.parked import ParkedParameter

    for run in (lambda: engine(**GPT2.batch(0)), lambda: engine.backward(loss_of(engine(**GPT2.batch(0))))):
        run()
        assert all(isinstance(param, ParkedParameter) for param in engine.module.parameters())
