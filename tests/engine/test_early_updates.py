"""Units that are updated inside ``engine.backward``: the same bits, and a clear word where a step cannot be taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from angelptm.engine import Engine
from angelptm.engine.planning import TRACED_STEPS
from angelptm.errors import AngelPTMError, NonFiniteError

from .conftest import MakeBoth, MakeEngine
from .models import FAMILIES, GPT2, LLAMA, PLAIN, T5, VOCABULARY, Family, loss_of
from .training import assert_same_parameters, train, train_both, train_step

STEPS = 10
HOST_GRADIENTS = {"param": "ssd", "grad": "host", "states": "ssd"}
EARLY: dict[str, Any] = {"execution": {"updates": "backward"}, "placement": HOST_GRADIENTS}


def early_count(engine: Engine) -> int:
    """Units that the step under way has updated so far."""
    return len(engine._stepping._submitted)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_early_updates_change_no_bit(family: Family, accumulation: int, make_both: MakeBoth) -> None:
    engine, reference = make_both(family.model(), gradient_accumulation_steps=accumulation, **EARLY)
    early = []
    for step in range(STEPS):
        for micro in range(accumulation):
            batch = family.batch(step * accumulation + micro)
            loss = loss_of(engine(**batch))
            expected = loss_of(reference.forward(**batch))
            assert torch.equal(loss, expected), step
            engine.backward(loss)
            reference.backward(expected)
            early.append(early_count(engine))
            engine.step()
        reference.step()
    assert max(early[: TRACED_STEPS * accumulation]) == 0, "computing has the machine to itself"
    assert min(early[accumulation - 1 :: accumulation][TRACED_STEPS:]) > 0
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("family", [GPT2, PLAIN], ids=lambda family: family.name)
@pytest.mark.parametrize("moves", ["planned", "demand"])
@pytest.mark.parametrize("placement", ["device", "host", "ssd"])
def test_early_updates_change_no_bit_wherever_pages_live(
    family: Family, moves: str, placement: str, make_both: MakeBoth
) -> None:
    homes = {"param": placement, "grad": "host", "states": "ssd" if placement == "ssd" else "host"}
    engine, reference = make_both(
        family.model(), execution={"updates": "backward", "moves": moves}, placement=homes, update={"threads": 2}
    )
    train_both(engine, reference, family, STEPS)
    assert_same_parameters(engine, reference)


class Pair(nn.Module):
    """One unit with a layer that every step uses and one that only some do."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.seldom = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, seldom: bool) -> torch.Tensor:
        x = x + torch.tanh(self.seldom(x)) if seldom else x
        return x + torch.tanh(self.always(x))


class Sometimes(nn.Module):
    """Layers that only some steps use, two losses, a layer called twice, and recomputation if asked for."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)) for _ in range(4))
        self.pairs = nn.ModuleList([Pair()])
        self.head = nn.Linear(64, VOCABULARY)
        self.other = nn.Linear(64, VOCABULARY)
        self.recompute = recompute  # reentrant or not; None: never

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.recompute is None or not torch.is_grad_enabled():
            return block(x)  # type: ignore[no-any-return]
        return checkpoint(block, x, use_reentrant=self.recompute)  # type: ignore[no-any-return]

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, seldom: bool = False, skip: int = -1, both: bool = False
    ) -> dict[str, torch.Tensor]:
        x = self.tokens(input_ids)
        for index, block in enumerate(self.blocks):
            if index != skip:
                x = x + self.run(block, x)
        x = x + self.run(self.blocks[1], x)
        x = self.pairs[0](x, seldom)

        def loss_by(head: nn.Module) -> torch.Tensor:
            return nn.functional.cross_entropy(head(x).flatten(0, 1), labels.flatten())

        loss = loss_by(self.head)
        return {"loss": loss + 0.5 * loss_by(self.other) if both else loss}


PATTERNS: dict[str, Callable[[int], dict[str, Any]]] = {
    "regular": lambda _: {},
    "unused-at-first": lambda step: {"seldom": step >= 3, "both": step >= 2},
    "unused-in-some": lambda step: {"seldom": step % 3 != 1, "both": step % 2 == 0},
    "skipped-layers": lambda step: {"skip": (-1, 0, 2, -1, 3)[step % 5]},
    "everything": lambda step: {"skip": step % 5 - 1, "seldom": step % 3 == 0, "both": step % 4 != 0},
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("recompute", [None, True, False], ids=["keep", "reentrant", "recompute"])
@pytest.mark.parametrize("moves", ["planned", "demand", "serial"])
def test_models_that_change_between_steps_stay_exact(
    pattern: Callable[[int], dict[str, Any]], recompute: bool | None, moves: str, make_both: MakeBoth
) -> None:
    torch.manual_seed(5)
    engine, reference = make_both(
        Sometimes(recompute), execution={"updates": "backward", "moves": moves}, placement=HOST_GRADIENTS
    )
    for step in range(STEPS):
        batch = {**PLAIN.batch(step), **pattern(step)}
        found, expected = train_step(engine, [batch]), reference.train_step([batch])
        assert torch.equal(found[0], expected[0]), step
    if recompute is not True:  # whose gradients autograd adds up in parts: the sum of a layer called twice differs
        assert_same_parameters(engine, reference)


@pytest.mark.parametrize("parts", [("ln_", "wpe"), (".c_fc.",), ("h.0.",)], ids=["some", "half", "whole"])
def test_frozen_parameters(parts: tuple[str, ...], make_both: MakeBoth) -> None:
    model = GPT2.model()
    for name, param in model.named_parameters():
        param.requires_grad_(not any(part in name for part in parts))
    engine, reference = make_both(model, **EARLY)
    train_both(engine, reference, GPT2, STEPS)
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("family", [GPT2, LLAMA, T5], ids=lambda family: family.name)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations(family: Family, reentrant: bool, make_both: MakeBoth) -> None:
    model = family.model(use_cache=False)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    engine, reference = make_both(model, **EARLY)
    train_both(engine, reference, family, STEPS)
    assert_same_parameters(engine, reference)


def ready(make_engine: MakeEngine, **keys: Any) -> Engine:
    """An engine that has taken the traced steps, and updates early in the next one."""
    engine = make_engine(PLAIN.model(), **{**EARLY, **keys})
    train(engine, PLAIN, TRACED_STEPS)
    return engine


def backward(engine: Engine, index: int = TRACED_STEPS) -> None:
    engine.backward(loss_of(engine(**PLAIN.batch(index))))


@pytest.mark.parametrize("factor", [1.0, float("nan")], ids=["finite", "nan"])
def test_second_backward_before_the_step_is_refused_and_the_step_can_be_taken(
    factor: float, make_both: MakeBoth
) -> None:
    engine, reference = make_both(PLAIN.model(), **EARLY)
    train_both(engine, reference, PLAIN, TRACED_STEPS)
    backward(engine)
    assert early_count(engine) > 0
    with pytest.raises(AngelPTMError, match=r"engine\.backward.*no step has taken.*execution\.updates: forward"):
        engine.backward(loss_of(engine(**PLAIN.batch(9))) * factor)
    assert engine.step()
    reference.train_step([PLAIN.batch(TRACED_STEPS)])
    assert_same_parameters(engine, reference)
    train_both(engine, reference, PLAIN, 2, first=TRACED_STEPS + 1)


def test_clipping_after_early_updates_is_refused_and_the_step_can_be_taken(make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model(), **EARLY)
    train_both(engine, reference, PLAIN, TRACED_STEPS)
    backward(engine)
    with pytest.raises(AngelPTMError, match=r"clip_grad_norm_.*gradient_clipping.*execution\.updates: forward"):
        engine.clip_grad_norm_(1.0)
    engine.step()
    reference.train_step([PLAIN.batch(TRACED_STEPS)])
    assert_same_parameters(engine, reference)


def test_lr_that_changes_after_early_updates_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = ready(make_engine, checkpoint={"folder": str(tmp_path / "commits")})
    engine.save_checkpoint(wait=True)
    backward(engine)
    engine.optimizer.param_groups[0]["lr"] *= 0.5
    with pytest.raises(AngelPTMError, match=r"changed between engine\.backward and step.*execution\.updates: forward"):
        engine.step()
    assert_refused_until_loaded(engine)


def assert_refused_until_loaded(engine: Engine) -> None:
    """Neither commits nor steps, until the commit of the traced steps is loaded; then the run goes on."""
    with pytest.raises(AngelPTMError, match="ended half way"):
        engine.save_checkpoint()
    with pytest.raises(AngelPTMError, match="ended half way"):
        backward(engine)
    with pytest.raises(AngelPTMError, match="ended half way"):
        engine.optimizer.step()
    engine.load_checkpoint()
    assert engine.global_step == TRACED_STEPS
    losses = train(engine, PLAIN, 3, first=TRACED_STEPS)
    engine.load_checkpoint()
    assert all(
        torch.equal(one, other) for one, other in zip(losses, train(engine, PLAIN, 3, first=TRACED_STEPS), strict=True)
    )


def spoil(engine: Engine, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Has a function change the gradient of a module's output."""
    module = engine.module.get_submodule(name)
    return module.register_forward_hook(lambda _module, _args, output: output.register_hook(change) and None)


def test_gradient_that_is_not_finite_after_early_updates_says_so(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = ready(make_engine, checkpoint={"folder": str(tmp_path / "commits")})
    engine.save_checkpoint(wait=True)
    handle = spoil(engine, "blocks.0", lambda gradient: gradient * float("nan"))
    backward(engine)
    handle.remove()
    assert early_count(engine) > 0
    with pytest.raises(NonFiniteError, match=r"Other units had been updated before it came, so load the last commit"):
        engine.step()
    assert_refused_until_loaded(engine)


def test_exception_in_backward_after_early_updates(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = ready(make_engine, checkpoint={"folder": str(tmp_path / "commits")})
    engine.save_checkpoint(wait=True)

    def fail(_gradient: torch.Tensor) -> torch.Tensor:
        raise KeyError("of the user's own hook")

    handle = spoil(engine, "tokens", fail)
    with pytest.raises(KeyError):
        backward(engine)
    handle.remove()
    assert_refused_until_loaded(engine)


def test_commit_between_backward_and_step_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Also where all units were updated already, and no gradient is left."""
    engine = ready(make_engine, checkpoint={"folder": str(tmp_path / "commits")})
    backward(engine)
    assert early_count(engine) == len(engine.plan.units)
    with pytest.raises(AngelPTMError, match=r"gradients that no step has taken.*Commit after step\(\)"):
        engine.save_checkpoint()
    engine.step()
    engine.save_checkpoint(wait=True)
    expected = train(engine, PLAIN, 2, first=TRACED_STEPS + 1)
    engine.load_checkpoint()
    assert engine.global_step == TRACED_STEPS + 1
    assert all(
        torch.equal(one, other)
        for one, other in zip(expected, train(engine, PLAIN, 2, first=TRACED_STEPS + 1), strict=True)
    )


def test_loops_in_torchs_style_never_update_early(make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model(), **EARLY)
    train_both(engine, reference, PLAIN, TRACED_STEPS)
    for step in range(TRACED_STEPS, TRACED_STEPS + 3):
        reference.train_step([PLAIN.batch(step)])
        loss_of(engine(**PLAIN.batch(step))).backward()
        assert early_count(engine) == 0
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    train_both(engine, reference, PLAIN, 2, first=TRACED_STEPS + 3)
    assert_same_parameters(engine, reference)


def test_pass_of_the_users_own_after_engine_backward_updates_nothing_early(make_engine: MakeEngine) -> None:
    """Only the gradients of the pass that the engine runs are known to be the last."""
    torch.manual_seed(5)
    engine = make_engine(Sometimes(), **EARLY)
    for step in range(TRACED_STEPS):
        train_step(engine, [{**PLAIN.batch(step), "both": True, "seldom": True}])
    engine.backward(loss_of(engine(**PLAIN.batch(TRACED_STEPS))))
    begun = early_count(engine)
    seldom = engine.module.get_submodule("other")
    seldom(torch.ones(1, 64)).sum().backward()
    assert early_count(engine) == begun
    seldom(torch.ones(1, 64)).sum().backward()
    engine.step()


@pytest.mark.parametrize("clipping", [None, 0.05])
def test_updates_wait_where_clipping_needs_all_gradients(clipping: float | None, make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model(), gradient_clipping=clipping, placement=HOST_GRADIENTS)
    train_both(engine, reference, PLAIN, TRACED_STEPS)
    backward(engine)
    assert (early_count(engine) > 0) == (clipping is None)
    engine.step()
    reference.train_step([PLAIN.batch(TRACED_STEPS)])
    assert_same_parameters(engine, reference)
