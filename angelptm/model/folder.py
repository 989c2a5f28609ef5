"""A folder of weights with its config.json, which others may have written: a claim until the weights bear it out.

A config.json of 100 bytes can ask for a model of any size, or for code from the network. So it is cut down to what
describes an architecture; the model is first built without any memory, on the meta device; and only when every
parameter lies in the safetensors with the same shape is it built for use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from angelptm.errors import AngelPTMError, DataError
from angelptm.foreign import check_inside, parse_json, read_whole
from angelptm.model.sources import SafetensorsValues

_EXPECTED = "a transformers config.json"
_LIMIT_BYTES = 16 << 20
"""The largest ones in use list a label for each of some 20,000 classes, in about 1 MiB."""
_MAX_DEPTH = 32
_MAX_COUNT = 1 << 20
"""Of layers and labels, for which transformers writes lists before there is a model that could be compared."""
_BUFFERS_BYTES = 256 << 20
"""What buffers may take beyond the size of the weights: masks and tables that no file holds."""

# Code and kernels from elsewhere, and backbones that transformers would fetch by name.
_IGNORED = {"auto_map", "trust_remote_code", "custom_pipelines", "attn_implementation", "experts_implementation"}
_IGNORED |= {"backbone", "use_pretrained_backbone", "use_timm_backbone", "name_or_path"}


def read_config_json(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a weights folder, without what would run or fetch anything. Raises DataError."""
    path = folder / "config.json"
    check_inside(path, folder)
    content = parse_json(read_whole(path, _LIMIT_BYTES, _EXPECTED), path, _EXPECTED)
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise DataError(str(path), "no model_type", _EXPECTED)
    kept: dict[str, Any] = _architecture(content, path, 0)
    return kept


def _architecture(node: Any, path: Path, depth: int, key: str = "") -> Any:
    if depth > _MAX_DEPTH:
        raise DataError(str(path), f"more than {_MAX_DEPTH} levels", _EXPECTED)
    if isinstance(node, dict):
        # A leading underscore marks what transformers keeps for itself, the attention kernel among it.
        kept = {name: value for name, value in node.items() if name not in _IGNORED and not name.startswith("_")}
        return {name: _architecture(value, path, depth + 1, name) for name, value in kept.items()}
    if isinstance(node, list):
        return [_architecture(value, path, depth + 1, key) for value in node]
    if isinstance(node, (int, float)) and not _plausible(node, key):
        raise DataError(str(path), f"{key[:80]!r}: {str(node)[:40]}", "a number that a model can have")
    return node


def _plausible(number: float, key: str) -> bool:
    if any(part in key for part in ("layer", "label")):
        return abs(number) <= _MAX_COUNT  # False for NaN
    return isinstance(number, float) or abs(number) < 2**63


def check_fits(build: Callable[[], nn.Module], values: SafetensorsValues, path: Path) -> None:
    """Builds the model on the meta device and compares it with the weights. Raises DataError, naming ``path``, for a
    model that cannot be built, or the weights for what they do not bear out."""
    with torch.device("meta"), _parameters_limited(2 * len(values) + 64, path), refused_as_data(path):
        model = build()
    values.prefix = prefix_of(model)
    values.check_parameters(model)
    limit_bytes = values.size_bytes + _BUFFERS_BYTES
    buffers_bytes = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if buffers_bytes > limit_bytes:
        raise DataError(str(path), f"{buffers_bytes} bytes of buffers", f"at most {limit_bytes} beside these weights")


@contextmanager
def refused_as_data(path: Path) -> Iterator[None]:
    """Inside, a model is built from the config.json at ``path``: what the library of models raises for values that it
    did not expect, which can be anything, becomes a DataError."""
    try:
        yield
    except (AngelPTMError, MemoryError):
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DataError(str(path), text, "a model that transformers can build") from error


def prefix_of(model: nn.Module) -> str:
    """The name of the model inside the outer one with a dot ("transformer."), with or without which files are saved."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix else ""


@contextmanager
def _parameters_limited(limit: int, path: Path) -> Iterator[None]:
    """Inside, a model gives up at more parameters than the weights could fill: else a count of layers decides when."""
    register, left = nn.Module.register_parameter, limit

    def counted(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise DataError(
                str(path), f"a model of more than {limit} parameters", "one that the weights beside it fill"
            )
        register(module, name, param)

    nn.Module.register_parameter = counted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
