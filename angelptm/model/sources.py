"""Where a model's first values come from: the model itself, its initialization, or safetensors files; unit by unit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from angelptm.errors import AngelPTMError, DataError
from angelptm.foreign import check_inside, regular_size_bytes
from angelptm.units import UnitLayout


class ValueSource(Protocol):
    """Gives the values of one unit at a time; ``values`` maps parameter names to CPU tensors of their shapes."""

    in_model: bool
    """Whether the values are in the model, which holds each until it is replaced; else it is on the meta device."""

    def values(self, model: nn.Module, unit: UnitLayout) -> Mapping[str, torch.Tensor]: ...


def _owner(model: nn.Module, owner: tuple[str, str]) -> tuple[nn.Module, str]:
    return model.get_submodule(owner[0]), owner[1]


class ExistingValues:
    """The values that the model holds now."""

    in_model = True

    def values(self, model: nn.Module, unit: UnitLayout) -> Mapping[str, torch.Tensor]:
        found = {}
        for param in unit.params:
            module, attribute = _owner(model, param.owners[0])
            value = getattr(module, attribute)
            if value.device.type == "meta":
                raise AngelPTMError(
                    f"parameter {param.name} is on the meta device and has no values. Build the model with "
                    "angelptm.materialize(config_or_folder), which initializes or loads it unit by unit."
                )
            found[param.name] = value.detach().cpu()
        return found


class InitializedValues:
    """The model's own initialization, in fp32, seeded for each unit by (seed, unit name).

    A unit's values so depend on nothing but the seed and the architecture; they differ from those of a whole model that
    is initialized in one go with the same seed. transformers models use their ``_init_weights``, called on every module
    of the unit and then on the modules around it; other models ``reset_parameters`` of each module that has parameters.
    The parameters of other units must be on the meta device meanwhile, where initializing them does nothing.
    """

    in_model = False

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def values(self, model: nn.Module, unit: UnitLayout) -> Mapping[str, torch.Tensor]:
        digest = hashlib.sha256(f"{self._seed}:{unit.name}".encode()).digest()
        with (
            _real_parameters(model, unit) as values,
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
        ):
            torch.manual_seed(int.from_bytes(digest[:8], "little"))
            for name, module in _modules_inside_out(model, unit):
                _initialize(model, name, module)
        return values


@contextmanager
def _real_parameters(model: nn.Module, unit: UnitLayout) -> Iterator[dict[str, torch.Tensor]]:
    """Puts real fp32 parameters into the unit's modules meanwhile, NaN until something initializes them."""
    values: dict[str, torch.Tensor] = {}
    before = []
    for param in unit.params:
        real = nn.Parameter(torch.full(param.shape, float("nan")))
        values[param.name] = real.data
        for owner in param.owners:
            module, attribute = _owner(model, owner)
            before.append((module, attribute, module._parameters[attribute]))
            module._parameters[attribute] = real
    try:
        yield values
    finally:
        for module, attribute, param_before in before:
            module._parameters[attribute] = param_before
    for name, value in values.items():
        if value.isnan().any():
            raise AngelPTMError(
                f"parameter {name}: nothing initializes it (no _init_weights or reset_parameters reaches it). "
                "Build the model with real values and pass that, or load weights."
            )


def _modules_inside_out(model: nn.Module, unit: UnitLayout) -> Iterator[tuple[str, nn.Module]]:
    """The modules that own the unit's parameters and all modules around them, each after those inside it."""
    names: set[str] = set()
    for param in unit.params:
        for module_name, _ in param.owners:
            parts = module_name.split(".") if module_name else []
            names |= {".".join(parts[:length]) for length in range(len(parts) + 1)}
    for name in sorted(names, key=lambda name: (-(name.count(".") + bool(name)), name)):
        yield name, model.get_submodule(name)


def _initialize(model: nn.Module, name: str, module: nn.Module) -> None:
    initializer: Any = None
    parts = name.split(".") if name else []
    for length in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:length]))
        if hasattr(around, "_init_weights"):
            initializer = around._init_weights
            break
    if initializer is not None:
        initializer(module)
    elif any(True for _ in module.parameters(recurse=False)):
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()


class SafetensorsValues:
    """Values from a folder of ``*.safetensors``, as transformers writes them; only one unit is in memory at a time.

    The headers are checked by the safetensors library (offsets in range, without holes or overlaps, at most 100 MB);
    links that lead out of the folder are refused, and a tensor's shape is compared before its bytes are touched.
    """

    in_model = False

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """Reads the files' headers. ``prefix`` is the name of the model inside the outer one ("transformer."), with or
        without which the files may have been saved. Raises DataError."""
        self._folder = folder
        self.prefix = prefix
        self.size_bytes = 0
        """Of all the files."""
        self._file_of: dict[str, Path] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise DataError(str(folder), "no *.safetensors file", "a folder of weights in safetensors format")
        for file in files:
            check_inside(file, folder)
            self.size_bytes += regular_size_bytes(file, "a safetensors file")
            with _opened(file) as content:
                self._file_of.update(dict.fromkeys(content.keys(), file))

    def __len__(self) -> int:
        """Tensors in the files."""
        return len(self._file_of)

    def _key(self, name: str) -> str | None:
        """What the files call a tensor of the model."""
        spellings = [name, self.prefix + name]
        if self.prefix and name.startswith(self.prefix):
            spellings.append(name.removeprefix(self.prefix))
        return next((spelling for spelling in spellings if spelling in self._file_of), None)

    def _key_of_parameter(self, names: Iterable[str]) -> str:
        """The key of a parameter that the model holds under one or several names."""
        names = list(names)
        key = next((key for key in map(self._key, names) if key is not None), None)
        if key is None:
            known = ", ".join(name[:80] if name.isprintable() else repr(name[:80]) for name in list(self._file_of)[:3])
            raise DataError(
                str(self._folder), f"no tensor {names[0]}", "every parameter of the model", f"It has: {known}, ..."
            )
        return key

    def _check_shape(self, content: Any, key: str, shape: tuple[int, ...]) -> None:
        found = content.get_slice(key).get_shape()
        if tuple(found) != shape:
            text = str(tuple(found[:8])) if len(found) <= 8 else f"{len(found)} dimensions"
            raise DataError(str(self._file_of[key]), f"{key} of shape {text}", f"shape {shape}")

    def _read(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        with _opened(self._file_of[key]) as content:
            self._check_shape(content, key, shape)
            value: torch.Tensor = content.get_tensor(key)
        if tuple(value.shape) != shape:  # packed types, two values a byte
            raise DataError(str(self._file_of[key]), f"{key} of type {value.dtype}", f"a tensor of shape {shape}")
        return value

    def check_parameters(self, model: nn.Module) -> None:
        """DataError unless the files hold every parameter of the model in its shape. Reads no values."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            names.setdefault(param, []).append(name)
        keys = {self._key_of_parameter(of_one): tuple(param.shape) for param, of_one in names.items()}
        for file in sorted({self._file_of[key] for key in keys}):
            with _opened(file) as content:
                for key, shape in keys.items():
                    if self._file_of[key] == file:
                        self._check_shape(content, key, shape)

    def load_buffers(self, model: nn.Module) -> None:
        """Copies the persistent buffers that the files have into the model, which keeps its own for the others."""
        params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, buffer in model.state_dict().items():
            if name not in params and isinstance(buffer, torch.Tensor) and (key := self._key(name)) is not None:
                buffer.copy_(self._read(key, tuple(buffer.shape)))

    def values(self, model: nn.Module, unit: UnitLayout) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        found: dict[str, torch.Tensor] = {}
        for param in unit.params:
            key = self._key_of_parameter(f"{module}.{name}" if module else name for module, name in param.owners)
            value = self._read(key, param.shape)
            if not value.is_floating_point():
                raise DataError(str(self._file_of[key]), f"{key} of type {value.dtype}", "floating point values")
            found[param.name] = value
        return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; what its library raises inside becomes a DataError."""
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise DataError(str(file), f"an unreadable file ({str(error)[:300]})", "a safetensors file") from error
