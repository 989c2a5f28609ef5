"""Evaluation between steps, exceptions in forward and backward, losses and gradients that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from angelptm.engine import Engine
from angelptm.errors import AngelPTMError, NonFiniteError

from .conftest import MakeBoth, MakeEngine
from .models import FAMILIES, GPT2, LLAMA, PLAIN, T5, Family, loss_of
from .training import assert_same_parameters, assert_same_values, snapshot, train, train_both, train_step

CONTEXTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_evaluation_between_steps_changes_nothing(
    context: Callable[[], Any], family: Family, make_both: MakeBoth
) -> None:
    engine, reference = make_both(family.model())
    for step in range(5):
        # The first pass of all is one without gradients; later ones find updates under way.
        engine.module.eval()
        reference.model.eval()
        with context():
            found = loss_of(engine(**family.batch(50 + step)))
            expected = loss_of(reference.forward(**family.batch(50 + step)))
        assert torch.equal(found, expected), step
        engine.module.train()
        reference.model.train()
        train_both(engine, reference, family, 1, first=step)
    assert_same_parameters(engine, reference)


def test_evaluation_between_forward_and_backward(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model())
    for step in range(4):
        reference.train_step([GPT2.batch(step)])
        loss = loss_of(engine(**GPT2.batch(step)))
        with torch.no_grad():
            engine(**GPT2.batch(60))
        engine.backward(loss)
        engine.step()
    assert_same_parameters(engine, reference)


def test_evaluation_between_micro_batches(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model(), gradient_accumulation_steps=2)
    for step in range(4):
        batches = [GPT2.batch(2 * step), GPT2.batch(2 * step + 1)]
        reference.train_step(batches)
        for batch in batches:
            engine.backward(loss_of(engine(**batch)))
            with torch.no_grad():
                engine(**GPT2.batch(60))
            snapshot(engine.state_dict())
            engine.step()
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("family", [GPT2, LLAMA, T5], ids=lambda family: family.name)
def test_generate_between_steps(family: Family, make_both: MakeBoth) -> None:
    engine, reference = make_both(family.model())
    prompt = family.batch(0)["input_ids"][:1, :4]
    for step in range(3):
        train_both(engine, reference, family, 1, first=step)
        engine.module.eval()
        reference.model.eval()
        keys = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        # Updates of the step are still under way when the first token is computed.
        found, expected = engine.module.generate(prompt, **keys), reference.model.generate(prompt, **keys)
        assert torch.equal(found, expected)
        engine.module.train()
        reference.model.train()
    assert_same_parameters(engine, reference)


class Interrupted(Exception):
    """Raised by the hooks of this file."""


@contextmanager
def forward_fails_in(engine: Engine, name: str) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise Interrupted

    handle = engine.module.get_submodule(name).register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def backward_fails_in(engine: Engine, name: str) -> Iterator[None]:
    def fail_later(_module: Any, _args: Any, output: Any) -> None:
        def fail(_gradient: torch.Tensor) -> None:
            raise Interrupted

        output.register_hook(fail)

    handle = engine.module.get_submodule(name).register_forward_hook(fail_later)
    try:
        yield
    finally:
        handle.remove()


PLACES = ["tokens", "blocks.0.inner", "blocks.1", "blocks.1.norm", "head"]


@pytest.mark.parametrize("place", PLACES)
def test_exception_in_forward_leaves_the_engine_usable(place: str, make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model())
    train_both(engine, reference, PLAIN, 1)
    for step in range(1, 4):
        with forward_fails_in(engine, place), pytest.raises(Interrupted):
            engine(**PLAIN.batch(77))
        train_both(engine, reference, PLAIN, 1, first=step)
    assert_same_parameters(engine, reference)


def test_exception_in_forward_is_followed_by_a_step_at_once(make_both: MakeBoth) -> None:
    """The gradients of the pass before are taken although units were in use when the last forward broke off."""
    engine, reference = make_both(PLAIN.model())
    reference.train_step([PLAIN.batch(0)])
    engine.backward(loss_of(engine(**PLAIN.batch(0))))
    with forward_fails_in(engine, "blocks.0.inner"), pytest.raises(Interrupted):
        engine(**PLAIN.batch(77))
    engine.step()
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("style", ["engine", "torch"])
def test_exception_in_backward_leaves_the_engine_usable(style: str, place: str, make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model(), gradient_clipping=0.05)
    train_both(engine, reference, PLAIN, 1)
    for step in range(1, 4):
        backward = engine.backward if style == "engine" else torch.Tensor.backward
        with backward_fails_in(engine, place):
            loss = loss_of(engine(**PLAIN.batch(77)))
            with pytest.raises(Interrupted):
                backward(loss)
        if style == "torch":
            engine.optimizer.zero_grad()
        seconds = engine.phase_seconds()["backward"]
        train_both(engine, reference, PLAIN, 1, first=step)
        assert engine.phase_seconds()["backward"] > seconds, "the next backward pass has a beginning and an end"
        assert not any(leaves.placed for leaves in engine._leaves), "after a step every parameter is parked"
    assert_same_parameters(engine, reference)


def test_exception_in_backward_begins_the_accumulation_anew(make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model(), gradient_accumulation_steps=2)
    engine.backward(loss_of(engine(**PLAIN.batch(55))))
    with backward_fails_in(engine, "blocks.0"), pytest.raises(Interrupted):
        engine.backward(loss_of(engine(**PLAIN.batch(77))))
    train_both(engine, reference, PLAIN, 2)
    assert engine.global_step == 2
    assert_same_parameters(engine, reference)


def _moments(engine: Engine) -> list[int]:
    store = engine._store
    return [store.page_version(page) for page in range(store.page_count)]


def _states(engine: Engine) -> dict[str, torch.Tensor]:
    return {
        **{f"master.{name}": value.clone() for name, value in engine.state_dict(master=True).items()},
        **{f"param.{name}": value.clone() for name, value in engine.state_dict().items()},
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_loss_that_is_not_finite_changes_nothing(value: float, make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model(), gradient_accumulation_steps=2)
    train_both(engine, reference, GPT2, 2)
    engine.drain()
    before, versions = _states(engine), _moments(engine)
    engine.backward(loss_of(engine(**GPT2.batch(70))))
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is (nan|inf).*optimizer\.lr"):
        engine.backward(loss_of(engine(**GPT2.batch(71))) * value)
    assert_same_values(_states(engine), before)
    gradients = {page for unit in engine._gradients._pages for page in unit}
    assert all(a == b for page, (a, b) in enumerate(zip(_moments(engine), versions)) if page not in gradients)
    train_both(engine, reference, GPT2, 3, first=2)
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("style", ["engine", "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_gradient_that_is_not_finite_changes_nothing(value: float, style: str, make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model(), gradient_clipping=0.05)
    train_both(engine, reference, PLAIN, 2)
    engine.drain()
    before, versions = _states(engine), _moments(engine)

    def spoil(_module: Any, _args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * value)

    handle = engine.module.get_submodule("blocks.0").register_forward_hook(spoil)
    loss = loss_of(engine(**PLAIN.batch(70)))
    handle.remove()
    step = engine.step if style == "engine" else engine.optimizer.step
    (engine.backward if style == "engine" else torch.Tensor.backward)(loss)
    with pytest.raises(NonFiniteError, match="step 2: a gradient is inf or NaN"):
        step()
    assert_same_values(_states(engine), before)
    gradients = {page for unit in engine._gradients._pages for page in unit}
    assert all(a == b for page, (a, b) in enumerate(zip(_moments(engine), versions)) if page not in gradients)
    train_both(engine, reference, PLAIN, 3, first=2)
    assert_same_parameters(engine, reference)


def test_second_backward_through_a_retained_graph(make_both: MakeBoth) -> None:
    # Not tied: the reference adds what both owners of a parameter give in one pass first, the engine as it comes.
    engine, reference = make_both(PLAIN.model(tied=False))
    for step in range(3):
        expected = loss_of(reference.forward(**PLAIN.batch(step)))
        expected.backward(retain_graph=True)
        expected.backward()
        for name, param in reference.params.items():
            reference.gradients[name], param.grad = param.grad.flatten().clone(), None  # type: ignore[union-attr]
        reference.step()
        loss = loss_of(engine(**PLAIN.batch(step)))
        loss.backward(retain_graph=True)
        loss.backward()
        engine.optimizer.step()
    assert_same_parameters(engine, reference)


def test_backward_through_a_graph_from_before_the_step_is_refused(make_engine: MakeEngine) -> None:
    """torch refuses it too: the weights that the graph saved were changed in place."""
    engine = make_engine(PLAIN.model())
    loss = loss_of(engine(**PLAIN.batch(0)))
    loss.backward(retain_graph=True)
    engine.optimizer.step()
    with pytest.raises(AngelPTMError, match="updated since the forward"):
        loss.backward()
    engine.optimizer.zero_grad()
    train(engine, PLAIN, 1)


def test_gradient_of_a_gradient(make_engine: MakeEngine) -> None:
    """A gradient penalty: the second differentiation reaches the parameters through the first."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    torch.manual_seed(1)
    inputs = torch.randn(4, 8)

    def penalty(forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = inputs.clone().requires_grad_()
        (slope,) = torch.autograd.grad(forward(x).sum(), x, create_graph=True)
        return slope.square().sum()

    penalty(model).backward()
    expected = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    for param in model.parameters():
        param.grad = None
    engine = make_engine(model, optimizer={"type": "sgd", "lr": 1.0})
    before = snapshot(engine.state_dict())
    penalty(engine).backward()
    engine.optimizer.step()
    after = engine.state_dict()
    assert set(expected) == {"0.weight", "0.bias", "2.weight"}
    for name in before:
        wanted = before[name] - expected[name] if name in expected else before[name]
        assert torch.equal(after[name], wanted), name


def test_two_forward_passes_before_one_backward(make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model())
    for step in range(3):
        expected = loss_of(reference.forward(**PLAIN.batch(step))) + loss_of(reference.forward(**PLAIN.batch(40)))
        reference.backward(expected)
        reference.step()
        found = loss_of(engine(**PLAIN.batch(step))) + loss_of(engine(**PLAIN.batch(40)))
        engine.backward(found)
        engine.step()
        assert torch.equal(found, expected)
    # Two uses of a tied weight in each pass: autograd sums them in another order when its leaf is shared.
    names = [name for name in engine.parameter_names() if name != "tokens.weight"]
    values = engine.state_dict()
    for name in names:
        torch.testing.assert_close(values[name], dict(reference.model.named_parameters())[name].detach())


def test_training_goes_on_after_a_step_without_gradients(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model())
    engine.optimizer.step()
    train_both(engine, reference, GPT2, 2)
    assert_same_parameters(engine, reference)
    assert train_step(engine, [GPT2.batch(0)])
