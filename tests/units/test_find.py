"""Units and sites of real models, unmodified, and of modules that are awkward to divide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from angelptm.errors import ConfigError
from angelptm.units import Structure, find_structure

TINY = {
    "gpt2": {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32},
    "llama": {
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "vocab_size": 50,
    },
    "t5": {
        "num_layers": 2,
        "d_model": 16,
        "d_kv": 8,
        "num_heads": 2,
        "d_ff": 32,
        "vocab_size": 50,
        "decoder_start_token_id": 0,
    },
}


def transformer(kind: str) -> nn.Module:
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model: nn.Module = auto.from_config(AutoConfig.for_model(kind, **TINY[kind]))
    return model


def run(model: nn.Module) -> None:
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=tokens, labels=tokens)


def names(structure: Structure) -> list[str]:
    return [unit.name for unit in structure.units]


class Transposed(nn.Module):
    """Uses a list of parameters, and a layer inside a container of different children."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4)) for _ in range(2)])
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.zeros(4))})
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x * self.scales[0] * self.scales[1] + self.shifts["a"])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x)[0]
        return self.head(self.layer(self.recurrent(x)[0]))


class Shared(nn.Module):
    """One module under two names, and a parameter tied between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.again = self.one
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.one(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    **{kind: (lambda kind=kind: transformer(kind), run) for kind in TINY},
    "transposed": (Transposed, lambda model: model(torch.ones(2, 4))),
    "attending": (Attending, lambda model: model(torch.ones(2, 3, 8))),
    "attention alone": (lambda: nn.MultiheadAttention(8, 2), lambda model: model(*[torch.ones(3, 2, 8)] * 3)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2),
        lambda model: model(torch.ones(2, 3, 8)),
    ),
    "shared": (Shared, lambda model: model(torch.ones(2, 4))),
    "linear": (lambda: nn.Linear(3, 2), lambda model: model(torch.ones(1, 3))),
    "sequence": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), lambda model: model(torch.ones(1, 3))),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    make, use = MODELS[request.param]
    return make(), use


def test_every_parameter_is_in_one_unit_with_all_its_owners(
    case: tuple[nn.Module, Callable[[nn.Module], object]],
) -> None:
    model, _ = case
    structure = find_structure(model)
    seen: dict[int, set[tuple[str, str]]] = {}
    for unit in structure.units:
        for first, owners in unit.params.items():
            values = {id(getattr(model.get_submodule(module), attribute)) for module, attribute in owners}
            assert len(values) == 1
            assert id(model.get_parameter(first)) in values
            (value,) = values
            assert value not in seen
            seen[value] = {(id(model.get_submodule(module)), attribute) for module, attribute in owners}  # type: ignore[misc]
    for module in model.modules():
        for attribute, param in module._parameters.items():
            if param is not None:
                assert (id(module), attribute) in seen[id(param)]


@pytest.mark.parametrize("training", [True, False])
def test_parameters_are_read_only_inside_a_site_that_names_their_unit(
    case: tuple[nn.Module, Callable[[nn.Module], object]], training: bool
) -> None:
    """What the engine relies on: outside its sites a unit's parameters may be anywhere."""
    model, use = case
    model.train(training)
    structure = find_structure(model)
    present = [0] * len(structure.units)
    home = {
        (id(model.get_submodule(module)), attribute): (model.get_submodule(module), attribute, index)
        for index, unit in enumerate(structure.units)
        for owners in unit.params.values()
        for module, attribute in owners
    }
    real = {key: getattr(module, attribute) for key, (module, attribute, _) in home.items()}
    absent = {key: nn.Parameter(value.detach().to("meta")) for key, value in real.items()}

    def show() -> None:
        for key, (module, attribute, index) in home.items():
            module._parameters[attribute] = (real if present[index] else absent)[key]
            if isinstance(module, nn.RNNBase):
                module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]

    def change(by: int, units: tuple[int, ...]) -> None:
        for unit in units:
            present[unit] += by
        show()

    for site in structure.sites:
        module = model.get_submodule(site.module_name)
        module.register_forward_pre_hook(lambda *_, units=site.units: change(1, units))
        module.register_forward_hook(lambda *_, units=site.units: change(-1, units))
    show()
    with torch.no_grad():
        use(model)  # a parameter on the meta device would make it fail
    assert present == [0] * len(structure.units)


@pytest.mark.parametrize("kind", TINY)
def test_blocks_of_transformers_are_units(kind: str) -> None:
    model = transformer(kind)
    stacks = {"gpt2": ["transformer.h"], "llama": ["model.layers"], "t5": ["encoder.block", "decoder.block"]}[kind]
    structure = find_structure(model)
    for stack in stacks:
        blocks = [f"{stack}.{index}" for index in range(len(model.get_submodule(stack)))]  # type: ignore[arg-type]
        assert [name for name in names(structure) if name.startswith(stack)] == blocks
        assert [s.module_name for s in structure.sites if s.module_name.startswith(stack)] == blocks
    assert not any(
        unit.name.count(stack + ".") and unit.name.count(".") > stack.count(".") + 1
        for unit in structure.units
        for stack in stacks
    )


def test_tied_head_of_gpt2_belongs_to_the_embedding() -> None:
    model = transformer("gpt2")
    structure = find_structure(model)
    embedding = names(structure).index("transformer.wte")
    assert "lm_head" not in names(structure)
    assert structure.units[embedding].params["transformer.wte.weight"] == [
        ("transformer.wte", "weight"),
        ("lm_head", "weight"),
    ]
    (head,) = [site for site in structure.sites if site.module_name == "lm_head"]
    assert head.units == (embedding,)


def test_site_inside_a_module_that_owns_parameters_is_deeper() -> None:
    structure = find_structure(Transposed())
    assert [(site.module_name, site.depth) for site in structure.sites] == [("", 0), ("body.0", 1), ("body.2", 1)]
    assert names(structure) == ["Transposed", "body.0", "body.2"]
    assert list(structure.units[0].params) == ["scales.0", "scales.1", "shifts.a"]


def test_modules_that_read_their_childrens_parameters_are_not_divided() -> None:
    structure = find_structure(Attending())
    assert names(structure) == ["attention", "recurrent", "layer", "head"]
    assert "attention.out_proj.weight" in structure.units[0].params


def test_named_classes_are_the_units() -> None:
    model = transformer("gpt2")
    structure = find_structure(model, ["GPT2MLP"])
    assert [name for name in names(structure) if name.endswith(".mlp")] == [f"transformer.h.{i}.mlp" for i in range(3)]
    assert "transformer.h.0" not in names(structure)
    assert "transformer.h.0.attn.c_attn" in names(structure)


def test_attention_stays_whole_beside_named_classes() -> None:
    structure = find_structure(Attending(), ["LSTM"])
    assert names(structure)[:2] == ["attention", "recurrent"]
    assert "attention.out_proj.weight" in structure.units[0].params


def test_class_that_the_model_does_not_have_is_refused_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match="GPT2Block") as refused:
        find_structure(transformer("gpt2"), ["GPT2Blok"])
    assert refused.value.key == "units.classes"
    with pytest.raises(ConfigError):
        find_structure(Attending(), ["Conv2d"])


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="parameters"):
        find_structure(nn.Sequential(nn.ReLU()))
