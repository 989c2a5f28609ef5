"""What a commit records besides pages: counters, groups, generators; and how they come back."""

from __future__ import annotations

import base64
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from angelptm.checkpoint.header import (
    BufferRecord,
    FileRecord,
    GroupRecord,
    Header,
    NumpyRecord,
    OptimizerRecord,
    RngRecord,
    units_from_layouts,
)
from angelptm.device import Device
from angelptm.errors import AngelPTMError, CheckpointError
from angelptm.plan import Plan
from angelptm.version import __version__


class Stateful(Protocol):
    """A scheduler, or a position in the data."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def state_of(what: Stateful | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if what is None:
        return None
    return dict(what) if isinstance(what, Mapping) else dict(what.state_dict())


def make_header(
    *,
    plan: Plan,
    module: nn.Module,
    store_id: str,
    files: Sequence[tuple[str, int]],
    step: int,
    config_hash: str,
    precision: str,
    optimizer_type: str,
    param_groups: Sequence[Mapping[str, Any]],
    steps_of: Mapping[str, int],
    buffers: Sequence[BufferRecord],
    buffer_bytes: int,
    rng: Sequence[RngRecord],
    scheduler: dict[str, Any] | None,
    data: dict[str, Any] | None,
    client: dict[str, Any] | None,
) -> Header:
    """The header of a commit of the state as it is now. ``param_groups`` are torch's, of parked parameters;
    ``rng`` the generators of every rank. Raises AngelPTMError for values that JSON cannot
    hold."""
    try:
        return Header(
            package_version=__version__,
            store_id=store_id,
            step=step,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            config_hash=config_hash,
            page_bytes=plan.page_bytes,
            precision=precision,  # type: ignore[arg-type]
            files=tuple(FileRecord(name=name, slot_count=count) for name, count in files),
            units=units_from_layouts([unit.layout for unit in plan.units]),
            buffers=tuple(buffers),
            buffer_bytes=buffer_bytes,
            optimizer=OptimizerRecord(
                type=optimizer_type,  # type: ignore[arg-type]
                steps=dict(steps_of),  # zeros too: they replace what a run that goes back has counted
                groups=tuple(
                    GroupRecord(
                        params=tuple(param.param_name for param in group["params"]),
                        options={key: _plain(value) for key, value in group.items() if key != "params"},
                    )
                    for group in param_groups
                ),
            ),
            scheduler=to_json(scheduler),
            rng=rng[0],
            rank_rng=tuple(rng) if len(rng) > 1 else (),
            data=to_json(data),
            model=_model_config(module),
            client=to_json(client),
        )
    except (ValidationError, TypeError, ValueError, RecursionError) as error:
        raise AngelPTMError(
            f"checkpoint: something that JSON cannot hold in param_groups, scheduler, data or client_state: {error}"
        ) from error


def _plain(value: Any) -> Any:
    """Tensors and numpy scalars as numbers, lists as tuples."""
    if isinstance(value, (torch.Tensor, np.generic)):
        return value.item()
    return tuple(_plain(one) for one in value) if isinstance(value, (list, tuple)) else value


_ITEMS, _FLOAT = "angelptm.items", "angelptm.float"


def to_json(value: Any) -> Any:
    """What JSON can hold of a state, and ``from_json`` makes the state of again: torch's schedulers have keys that are
    numbers (MultiStepLR) and infinities (ReduceLROnPlateau). Tuples become lists. Anything else that JSON cannot hold
    is left as it is, for the header to refuse."""
    value = _plain(value)
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and not value.keys() & {_ITEMS, _FLOAT}:
            return {key: to_json(one) for key, one in value.items()}
        return {_ITEMS: [[to_json(key), to_json(one)] for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        return [to_json(one) for one in value]
    return {_FLOAT: str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        if value.keys() == {_ITEMS}:
            return {
                tuple(key) if isinstance(key, list) else from_json(key): from_json(one) for key, one in value[_ITEMS]
            }
        return {key: from_json(one) for key, one in value.items()}
    return [from_json(one) for one in value] if isinstance(value, (list, tuple)) else value


def _model_config(module: nn.Module) -> Any:
    """The configuration of a transformers model; None for other modules."""
    config = getattr(module, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    content = json.loads(config.to_json_string(use_diff=False))  # type: ignore[union-attr]
    architectures = content.get("architectures") or [type(module).__name__]
    return {**content, "architectures": architectures}


def generator_states(device: Device) -> RngRecord:
    """Of Python's, numpy's and torch's global generators, and the device's own."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return RngRecord(
        python=(version, internal, gauss),
        numpy=NumpyRecord(
            keys=tuple(int(key) for key in keys),
            pos=int(position),
            has_gauss=int(has_gauss),
            cached_gaussian=float(cached),
        ),
        torch=_as_text(torch.get_rng_state()),
        device=None if (own := device.generator_state()) is None else _as_text(own),
    )


def _as_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def check_generator_states(states: RngRecord, path: str) -> None:
    """Refuses what ``set_generator_states`` could not use."""
    raw = base64.b64decode(states.torch)
    if len(raw) != torch.get_rng_state().numel():
        raise CheckpointError(path, f"a torch generator of {len(raw)} bytes", f"{torch.get_rng_state().numel()} bytes")
    try:
        torch.Generator().set_state(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    except RuntimeError as error:
        raise CheckpointError(path, f"a torch generator that torch refuses ({error})", "a valid state") from error


def set_generator_states(states: RngRecord, device: Device) -> None:
    """A device that had no part in the run before keeps the state that its generator has."""
    torch.set_rng_state(_from_text(states.torch))
    if states.device is not None:
        device.set_generator_state(_from_text(states.device))
    random.setstate((states.python[0], states.python[1], states.python[2]))
    numpy = states.numpy
    np.random.set_state(
        ("MT19937", np.array(numpy.keys, dtype=np.uint32), numpy.pos, numpy.has_gauss, numpy.cached_gaussian)
    )


def restore_groups(groups: Iterable[dict[str, Any]], saved: Sequence[GroupRecord]) -> bool:
    """Puts the saved options (lr, betas, ...) into the groups with the same members; False when the groups differ,
    which then keep what the config gave them."""
    mine = {frozenset(param.param_name for param in group["params"]): group for group in groups}
    theirs = {frozenset(group.params): group.options for group in saved}
    if mine.keys() != theirs.keys():
        return False
    for members, options in theirs.items():
        mine[members].update(options)
    return True
