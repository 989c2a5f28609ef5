"""Models that are built without their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from angelptm.config import Config
from angelptm.errors import ConfigError
from angelptm.heap import return_freed_blocks
from angelptm.model.folder import check_fits, prefix_of, read_config_json, refused_as_data
from angelptm.model.sources import ExistingValues, InitializedValues, SafetensorsValues, ValueSource

_SOURCE = "_angelptm_source"


@contextmanager
def init_on_meta() -> Iterator[None]:
    """Inside, parameters of every module that is built go to the meta device one by one; buffers stay real.

    So that a model of any size can be built: no more than one parameter is in memory at a time.
    """
    return_freed_blocks()  # each parameter is a block that comes and goes
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def materialize(
    source: Any, *, seed: int = 0, weights: str | Path | None = None, build: Callable[[Any], nn.Module] | None = None
) -> nn.Module:
    """A model without values that ``angelptm.initialize`` fills unit by unit: the whole is never in memory.

    ``source`` is a transformers config, a folder with ``config.json`` and safetensors (its weights are loaded), or a
    callable that returns the module. ``weights`` names a folder of safetensors to load instead of initializing;
    otherwise the model's own initialization runs in fp32, seeded with ``seed`` (see InitializedValues). ``build`` turns
    a transformers config into a module, by default ``AutoModelForCausalLM.from_config``, or the sequence-to-sequence
    one for encoder-decoder configs.

    A folder may come from others: no code from it or named in it runs, and its config.json must describe the weights
    beside it, else DataError, before anything of the size that it claims is allocated.
    """
    if isinstance(source, (str, Path)):
        weights = source if weights is None else weights
        content, path = read_config_json(Path(source)), Path(source) / "config.json"
        check_fits(lambda: (build or _auto_model)(_config_of(content)), SafetensorsValues(Path(weights)), path)
        with init_on_meta(), refused_as_data(path):
            model: nn.Module = (build or _auto_model)(_config_of(content))
    else:
        with init_on_meta():
            model = source() if callable(source) else (build or _auto_model)(source)
    values: ValueSource = InitializedValues(seed)
    if weights is not None:
        values = SafetensorsValues(Path(weights), prefix_of(model))
        values.load_buffers(model)
    setattr(model, _SOURCE, values)
    return model


def source_of(model: nn.Module) -> ValueSource:
    """Where ``initialize`` takes the values from, as ``materialize`` has set it: else from the model itself."""
    source: ValueSource = getattr(model, _SOURCE, None) or ExistingValues()
    return source


def build_model(config: Config) -> nn.Module:
    """The model that a config describes, materialized. Raises ConfigError for what transformers refuses."""
    architecture = config.model.architecture()
    if architecture is None and config.model.weights is None:
        raise ConfigError(
            "model", None, "a preset, a model_type or a folder of weights", "For example model: {preset: gpt2}."
        )
    try:
        if architecture is None:
            return materialize(config.model.weights, seed=config.training.seed)
        model_type, keys = architecture
        return materialize(
            _config_of({"model_type": model_type, **keys}), seed=config.training.seed, weights=config.model.weights
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            "model", config.model.preset or config.model.model_type, f"a model that transformers can build ({error})"
        ) from error


def _config_of(content: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    keys = dict(content)
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def _auto_model(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if not hasattr(config, "model_type"):
        raise TypeError(
            f"source: found {type(config).__name__}, expected a transformers config, a folder or a callable"
        )
    auto = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    model: nn.Module = auto.from_config(config, dtype=torch.float32)
    return model
