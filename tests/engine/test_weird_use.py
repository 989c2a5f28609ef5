"""Models that use their modules in ways that no plan foresees: slower perhaps, exact all the same."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from angelptm.errors import AngelPTMError, CapacityError, ParkedError
from angelptm.sizes import parse_bytes

from .conftest import MakeBoth, MakeEngine
from .models import GPT2, PLAIN, VOCABULARY, loss_of
from .training import PAGE, assert_same_parameters, assert_same_values, snapshot, train, train_both

STEPS = 5


class Body(nn.Module):
    """Embedding, something in the middle that the subclass decides, head; the middle's leaves share frames."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 64)
        self.make()
        self.head = nn.Linear(64, VOCABULARY)

    def make(self) -> None:
        raise NotImplementedError

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.middle(self.tokens(input_ids)))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())}


class CalledTwice(Body):
    def make(self) -> None:
        self.wide, self.narrow = nn.Linear(64, 256), nn.Linear(256, 64)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + self.narrow(torch.tanh(self.wide(x)))
        return x


class SharedSubmodule(Body):
    """One submodule under two parents, and once more as an element of a list that holds it three times."""

    def make(self) -> None:
        class Parent(nn.Module):
            def __init__(self, shared: nn.Module) -> None:
                super().__init__()
                self.own, self.shared = nn.Linear(64, 128), shared

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.tanh(self.shared(torch.tanh(self.own(x))))

        shared = nn.Linear(128, 64)
        self.first, self.second = Parent(shared), Parent(shared)
        self.layers = nn.ModuleList([nn.Linear(64, 64)] * 3)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + self.second(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class BorrowedBlock(Body):
    """Blocks of a list are called by another module than the list's owner."""

    def make(self) -> None:
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        class Caller(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate = nn.Linear(64, 64)

            def forward(self, x: torch.Tensor, block: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
                return torch.sigmoid(self.gate(x)) * torch.tanh(block(x))

        self.caller = Caller()

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.blocks, self.blocks[1]):
            x = x + self.caller(x, block)
        return x


class InsideOfAnother(Body):
    """A unit calls a unit that is not below it: both are on the device at once, which the plan did not foresee."""

    inner_width = 64

    def make(self) -> None:
        self.inner = nn.Sequential(nn.Linear(64, self.inner_width), nn.Linear(self.inner_width, 64))
        self.wide, self.narrow = nn.Linear(64, 512), nn.Linear(512, 64)

        class Calls(nn.Linear):
            def forward(self, x: torch.Tensor, inner: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
                return super().forward(torch.tanh(inner(x))) + x

        self.calls = Calls(64, 64)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.tanh(self.wide(self.calls(x, self.inner))))


class ReturnsItsParameter(Body):
    """A module that returns a view of its own weight, used after other units were fetched."""

    def make(self) -> None:
        class Positions(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(24, 64))

            def forward(self, length: int) -> torch.Tensor:
                return self.weight[:length]

        class Prompt(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(64))

            def forward(self) -> dict[str, Any]:
                return {"prompt": (self.weight, None)}

        self.positions, self.prompt = Positions(), Prompt()
        self.wide, self.narrow = nn.Linear(64, 256), nn.Linear(256, 64)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        positions, prompt = self.positions(x.shape[1]), self.prompt()["prompt"][0]
        x = self.narrow(torch.tanh(self.wide(x)))
        return x + positions * prompt


class Buffers(Body):
    def make(self) -> None:
        self.first, self.norm, self.second = nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 64)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)))


class Recurrent(Body):
    def make(self) -> None:
        self.lstm = nn.LSTM(64, 64, num_layers=2, batch_first=True)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class Attentive(Body):
    def make(self) -> None:
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.attention(x, x, x)[0]


class Parametrized(Body):
    def make(self) -> None:
        self.wide, self.narrow = weight_norm(nn.Linear(64, 256)), weight_norm(nn.Linear(256, 64))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.tanh(self.wide(x)))


class Views(Body):
    """Transposed, sliced and expanded views of weights are what autograd saves; and one of no elements at all."""

    def make(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(80, 2, 64) * 0.1)
                self.scale = nn.Parameter(torch.tensor(1.5))
                self.nothing = nn.Parameter(torch.zeros(0, 64))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                matrix = self.weight[8:72, 1, :].t()
                return (x @ matrix) * self.scale * self.weight[0, 0] + self.nothing.sum()

        self.odd, self.wide, self.narrow = Odd(), nn.Linear(64, 256), nn.Linear(256, 64)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.tanh(self.wide(self.odd(x))))


class InPlace(Body):
    """Outputs of modules are changed in place by their user."""

    def make(self) -> None:
        self.wide, self.narrow = nn.Linear(64, 256), nn.Linear(256, 64)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x).relu_()).add_(x).mul_(0.5)


class Branches(Body):
    """Parallel branches: autograd works through them in an order of its own."""

    def make(self) -> None:
        self.branches = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)) for name in "abc"}
        )

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = (self.branches[name](x) for name in "abc")
        return a * b + self.branches["a"](c)


MODELS = [
    CalledTwice,
    SharedSubmodule,
    BorrowedBlock,
    InsideOfAnother,
    ReturnsItsParameter,
    Buffers,
    Recurrent,
    Attentive,
    Parametrized,
    Views,
    InPlace,
    Branches,
]


@pytest.mark.parametrize(
    ("model", "mode"),
    [(model, "train") for model in MODELS] + [(Buffers, "eval"), (Attentive, "eval"), (Recurrent, "eval")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_unusual_model_equals_the_reference(model: type[Body], mode: str, make_both: MakeBoth) -> None:
    torch.manual_seed(11)
    built = model().train(mode == "train")
    engine, reference = make_both(built)
    train_both(engine, reference, PLAIN, STEPS)
    assert_same_parameters(engine, reference)
    for name, buffer in reference.model.named_buffers():
        assert torch.equal(dict(engine.module.named_buffers())[name], buffer), name


def test_units_that_do_not_fit_at_once_are_refused_by_name(make_engine: MakeEngine) -> None:
    """More in use at once than the plan foresaw, and no room for it: an error, and not the other unit's frames."""

    class TooMuch(InsideOfAnother):
        inner_width = 512

    engine = make_engine(TooMuch())
    for _ in range(2):
        with pytest.raises(CapacityError, match=r"unit inner\.0 beside calls.*in use at the same time.*tiers\.device"):
            engine(**PLAIN.batch(0))
    hidden = engine.module.wide(torch.zeros(1, 64))  # type: ignore[operator]
    engine.backward(engine.module.narrow(hidden).sum())  # type: ignore[operator]
    engine.step()


class PartsInParts(Body):
    """Parts that compute inside one another, which are neither above nor below each other. ``calls`` are run in turn:
    the first part of each calls the second."""

    def __init__(self, widths: Sequence[int], calls: Sequence[tuple[int, ...]]) -> None:
        self.widths, self.calls = widths, calls
        super().__init__()

    def make(self) -> None:
        class Part(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.wide, self.narrow = nn.Linear(64, width), nn.Linear(width, 64)

            def forward(self, x: torch.Tensor, *inner: nn.Module) -> torch.Tensor:
                hidden = torch.tanh(self.wide(x))
                for part in inner:
                    x = x + torch.tanh(part(x))
                return x + self.narrow(hidden)

        self.parts = nn.ModuleList(Part(width) for width in self.widths)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        for first, *inner in self.calls:
            x = self.parts[first](x, *(self.parts[part] for part in inner))
        return x


EARLY = {"param": "ssd", "grad": "host", "states": "ssd"}  # units are updated as their gradients complete
# Of each the fewest pages in which on demand there is room for every call.
IN_PARTS: dict[str, tuple[tuple[int, ...], list[tuple[int, ...]], int]] = {
    "scheduled": ((200, 200, 300, 300), [(1, 2), (1,), (0, 3), (3, 2)], 6),
    "no-schedule": ((200, 300, 100), [(2, 0), (0, 1), (2, 1)], 5),
    "twice": ((400, 500, 500), [(0, 1), (2, 0), (1,)], 8),
}


@pytest.mark.parametrize(("widths", "calls", "least"), IN_PARTS.values(), ids=IN_PARTS.keys())
@pytest.mark.parametrize("more", range(3))
def test_what_had_room_in_the_first_steps_has_it_in_all(
    widths: Sequence[int], calls: list[tuple[int, ...]], least: int, more: int, make_both: MakeBoth
) -> None:
    """Also where the places that units had on demand cannot be kept for a whole step."""
    torch.manual_seed(3)
    model = PartsInParts(widths, calls)
    engine, reference = make_both(model, device=(least + more) * PAGE, placement=EARLY)
    train_both(engine, reference, PLAIN, STEPS + 2)
    assert_same_parameters(engine, reference)
    assert engine.peak_bytes()["device"] <= engine.config.tiers.device


def test_units_that_no_schedule_has_room_for_move_on_demand_and_a_line_says_so(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    widths, calls, least = IN_PARTS["no-schedule"]
    engine = make_engine(PartsInParts(widths, calls), device=least * PAGE)
    with caplog.at_level("WARNING", logger="angelptm"):
        train(engine, PLAIN, STEPS)
    assert engine.prediction() is None
    [record] = [record for record in caplog.records if record.name == "angelptm"]
    assert "move on demand" in record.getMessage()
    assert "Raise tiers.device to" in record.getMessage()


@pytest.mark.parametrize("frames", [3, 4, 5])
def test_part_that_a_later_step_uses_at_two_places_is_updated_when_both_are_done(
    frames: int, make_both: MakeBoth
) -> None:
    """In the traced steps it had one place and one gradient, after which it could be updated."""
    torch.manual_seed(3)
    model = PartsInParts((200, 300, 100), [(2,), (1,), (0,)])
    engine, reference = make_both(model, device=frames * PAGE, placement=EARLY)
    train_both(engine, reference, PLAIN, 3)
    for one in (engine.module, reference.model):
        one.calls = [(2, 0), (1,), (0,)]  # type: ignore[assignment]
    train_both(engine, reference, PLAIN, 2, first=3)
    assert_same_parameters(engine, reference)


def test_refusal_of_units_in_use_at_once_names_what_is_enough(make_engine: MakeEngine) -> None:
    """However their frames lie: what is free may be enough, but not in a row."""
    widths, calls = (200, 600, 400, 100), [(0, 1), (2, 3), (1, 2), (3, 0)]

    def refusal(device: int) -> CapacityError | None:
        engine = make_engine(PartsInParts(widths, calls), device=device)
        try:
            train(engine, PLAIN, STEPS)
        except CapacityError as refused:
            return refused
        return None

    accepted = make_engine(PartsInParts(widths, calls)).plan.device_frames
    refused = [error for frames in range(accepted, 2 * accepted) if (error := refusal(frames * PAGE)) is not None]
    assert refused
    for error in refused:
        assert error.needed_bytes > error.available_bytes
        asked = re.search(r"Raise tiers\.device to (\d+MiB)\.$", str(error))
        assert asked is not None
        assert parse_bytes(asked[1]) >= error.needed_bytes
        assert refusal(parse_bytes(asked[1])) is None


@dataclasses.dataclass
class Output:
    """Not registered with torch's pytrees."""

    hidden: torch.Tensor
    note: str = ""


class Custom:
    """Nothing that any library could look into."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


SHAPES: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "tuple": (lambda h: (h, None, "text"), lambda o: o[0]),
    "list": (lambda h: [[h]], lambda o: o[0][0]),
    "dict": (lambda h: {"hidden": h}, lambda o: o["hidden"]),
    "dataclass": (lambda h: Output(h), lambda o: o.hidden),
    "tuple-of-dataclass": (lambda h: (Output(h, "x"),), lambda o: o[0].hidden),
    "custom-object": (lambda h: Custom(h), lambda o: o.hidden),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_of_every_shape(shape: str, checkpointing: bool, make_both: MakeBoth) -> None:
    wrap, unwrap = SHAPES[shape]

    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(64, 128), nn.Linear(128, 64)
            self.prompt = nn.Parameter(torch.ones(64))

        def forward(self, x: torch.Tensor) -> Any:
            return wrap(x + self.narrow(torch.tanh(self.wide(x))) * self.prompt)

    class Wrapped(Body):
        def make(self) -> None:
            self.blocks = nn.ModuleList(Wrapping() for _ in range(3))

        def middle(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = unwrap(block(x))
            return x

    torch.manual_seed(4)
    engine, reference = make_both(Wrapped(), gradient_checkpointing=checkpointing)
    if checkpointing and shape == "custom-object":
        # No hook finds the tensors in it, so nothing fetches the block before it is computed again.
        with pytest.raises(ParkedError, match=r"blocks\.2"):
            train_both(engine, reference, PLAIN, 1)
        return
    train_both(engine, reference, PLAIN, STEPS)
    assert_same_parameters(engine, reference)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "custom-object"])
def test_parameter_returned_in_an_output_is_a_copy(shape: str, make_engine: MakeEngine) -> None:
    wrap, unwrap = SHAPES[shape]

    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(64.0))

        def forward(self) -> Any:
            return wrap(self.weight)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt, self.wide, self.narrow = Prompt(), nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self) -> torch.Tensor:
            prompt = unwrap(self.prompt())
            self.narrow(self.wide(torch.zeros(1, 64)))
            return prompt

    engine = make_engine(Model())
    found = engine()
    for _ in range(2):
        engine()
    assert torch.equal(found, torch.arange(64.0))


def test_submodules_called_without_the_model(make_both: MakeBoth) -> None:
    """The user runs the trunk and the head himself; the model's own forward is never entered."""
    engine, reference = make_both(GPT2.model(), gradient_clipping=0.05)

    def loss_by_hand(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model.transformer(input_ids=batch["input_ids"]).last_hidden_state
        return nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), batch["labels"].flatten())

    for step in range(STEPS):
        expected = loss_by_hand(reference.model, GPT2.batch(step))
        reference.backward(expected)
        reference.step()
        found = loss_by_hand(engine.module, GPT2.batch(step))
        engine.backward(found)
        engine.step()
        assert torch.equal(found, expected), step
    assert_same_parameters(engine, reference)


def test_leaves_called_without_the_model_share_frames_safely(make_both: MakeBoth) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Linear(64, 96))
    engine, reference = make_both(model)
    assert engine.plan.arena.peak_frames < sum(unit.frame_count for unit in engine.plan.units)

    def loss_by_hand(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["input_ids"]
        for layer in model:
            x = layer(x)
        return nn.functional.cross_entropy(x.flatten(0, 1), batch["labels"].flatten())

    for step in range(STEPS):
        reference.backward(loss_by_hand(reference.model, PLAIN.batch(step)))
        reference.step()
        engine.backward(loss_by_hand(engine.module, PLAIN.batch(step)))
        engine.step()
    assert_same_parameters(engine, reference)


def test_embedding_alone_takes_two_steps_from_one_graph(make_engine: MakeEngine) -> None:
    """Its backward saves no weight and fetches nothing, so nothing but the engine keeps the second gradient from
    overwriting the one that the updater is reading."""
    engine = make_engine(nn.ModuleDict({"tokens": nn.Embedding(96, 64)}), optimizer={"type": "sgd", "lr": 1.0})
    before = engine.state_dict()["tokens.weight"].clone()
    out = engine.module["tokens"](torch.arange(96)).sum()  # type: ignore[index]
    for _ in range(3):
        out.backward(retain_graph=True)
        engine.optimizer.step()
    assert torch.equal(engine.state_dict()["tokens.weight"], before - 1 - 1 - 1)


def test_model_whose_parameters_are_all_frozen_is_refused_before_anything_is_made(
    make_engine: MakeEngine, tmp_path: Any
) -> None:
    model = PLAIN.model().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AngelPTMError, match=r"no parameter.*requires_grad"):
        make_engine(model)
    assert_same_values(model.state_dict(), before)
    assert not (tmp_path / "pages").exists()


def test_sparse_gradient_is_refused_with_the_remedy(make_engine: MakeEngine) -> None:
    engine = make_engine(nn.Sequential(nn.Embedding(96, 64, sparse=True), nn.Linear(64, 4)))
    with pytest.raises(AngelPTMError, match="sparse=False"):
        engine.backward(engine(torch.arange(5)).sum())
    with torch.no_grad():
        engine(torch.arange(5))


def test_user_hooks_on_saved_tensors_stay_in_charge(make_both: MakeBoth) -> None:
    engine, reference = make_both(PLAIN.model())
    packed = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor.clone()

    for step in range(3):
        reference.train_step([PLAIN.batch(step)])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(engine(**PLAIN.batch(step)))
        engine.backward(loss)
        engine.step()
    assert packed
    assert_same_parameters(engine, reference)


def test_two_engines_in_one_process(make_engine: MakeEngine) -> None:
    first, second = make_engine(GPT2.model()), make_engine(GPT2.model())
    for step in range(3):
        found = [loss_of(engine(**GPT2.batch(step))) for engine in (first, second)]
        assert torch.equal(found[0], found[1])
        for engine, loss in zip((second, first), reversed(found)):
            engine.backward(loss)
        first.step()
        second.step()
    assert_same_values(first.state_dict(), snapshot(second.state_dict()))


def test_forward_of_the_model_itself_works_like_the_engines(make_both: MakeBoth) -> None:
    engine, reference = make_both(GPT2.model())
    reference.train_step([GPT2.batch(0)])
    engine.backward(engine.module(**GPT2.batch(0)).loss)
    engine.step()
    assert_same_parameters(engine, reference)
