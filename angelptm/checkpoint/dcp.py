"""A commit as a folder of torch.distributed.checkpoint: what other trainers read."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from angelptm.checkpoint.disk import PART_SUFFIX
from angelptm.checkpoint.export import values_of
from angelptm.checkpoint.header import ParamRecord
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import Kind, moment_kinds
from angelptm.errors import CheckpointError

_FILE_BYTES = 256 * 2**20
"""Tensors of one file; torch keeps those of the file that it writes in memory until the file is complete."""

_Load = Callable[[], torch.Tensor]
_NAMES = {Kind.EXP_AVG: "exp_avg", Kind.EXP_AVG_SQ: "exp_avg_sq"}


def export_dcp(reader: CommitReader, folder: Path) -> list[Path]:
    """Writes ``model.<name>`` (fp32 masters, every name of a tied parameter), ``optimizer.state.<name>.exp_avg`` and so
    on; ``optimizer.param_groups``, ``step``, ``scheduler``, ``data`` and ``client`` as objects. Returns the files.

    ``folder`` must be empty or not there: it appears when it is complete. Memory: as much as one file has, 256 MiB or
    the largest tensor. Raises CheckpointError, IoError.
    """
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(str(folder), "something there already", "a new or an empty folder")
    part = folder.with_name(folder.name + PART_SUFFIX)
    state, loads = _state(reader)
    made = [path for path in folder.parents if not path.exists()]
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
            save(state, storage_writer=_Writer(part), planner=_Planner(loads), no_dist=True)
        os.replace(part, folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        # torch wraps what a rank met, a stop by the user included.
        if isinstance(error, CheckpointException) and error.failures:
            raise next(iter(error.failures.values()))[0] from error
        raise
    return sorted(folder.iterdir())


class _Planner(DefaultSavePlanner):
    """Tensors of the state dict are on the meta device; their values are read when it is their turn."""

    def __init__(self, loads: dict[str, _Load]) -> None:
        super().__init__()
        self._loads = loads

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | BytesIO:
        load = self._loads.get(write_item.index.fqn)
        found: torch.Tensor | BytesIO = load() if load is not None else super().resolve_data(write_item)
        return found


class _Writer(FileSystemWriter):
    """Several files, so that torch lets go of tensors it has written."""

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[Any]]:
        results: list[Any] = []
        for index, items in enumerate(_files_of(plan)):
            storage = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{index}_")
            results += super().write_data(dataclasses.replace(plan, items=items, storage_data=storage), planner).wait()
        done: Future[list[Any]] = Future()
        done.set_result(results)
        return done


def _files_of(plan: SavePlan) -> Iterator[list[WriteItem]]:
    files: list[WriteItem] = []
    filled = 0
    for item in plan.items:
        size = 0
        if item.type != WriteItemType.BYTE_IO and item.tensor_data is not None:
            size = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        if files and filled + size > _FILE_BYTES:
            yield files
            files, filled = [], 0
        files.append(item)
        filled += size
    if files:
        yield files


def _state(reader: CommitReader) -> tuple[dict[str, Any], dict[str, _Load]]:
    """The state dict, and by the name that torch gives a tensor what loads it."""
    header = reader.manifest.header
    model: dict[str, Any] = {}
    states: dict[str, Any] = {}
    loads: dict[str, _Load] = {}
    for unit in header.units:
        for param in unit.params:
            names = [f"{module}.{attribute}" if module else attribute for module, attribute in param.owners]
            for name in dict.fromkeys([param.name, *names]):
                model[name] = torch.empty(param.shape, dtype=torch.float32, device="meta")
                loads[f"model.{name}"] = partial(_value, reader, param)
            if not param.trainable:
                continue
            states[param.name] = {"step": torch.tensor(float(header.optimizer.steps.get(param.name, 0)))}
            for kind in moment_kinds(header.optimizer.type):
                states[param.name][_NAMES[kind]] = torch.empty(param.shape, dtype=torch.float32, device="meta")
                loads[f"optimizer.state.{param.name}.{_NAMES[kind]}"] = partial(_moment, reader, param, kind)
    for buffer in header.buffers:
        dtype: torch.dtype = getattr(torch, buffer.dtype)
        model[buffer.name] = torch.empty(buffer.shape, dtype=dtype, device="meta")
        loads[f"model.{buffer.name}"] = partial(_buffer, reader, buffer.name, buffer.shape, dtype)
    groups = [{**group.options, "params": list(group.params)} for group in header.optimizer.groups]
    objects = {"step": header.step, "scheduler": header.scheduler, "data": header.data, "client": header.client}
    state = {"model": model, "optimizer": {"state": states, "param_groups": groups}}
    return {**state, **{name: value for name, value in objects.items() if value is not None}}, loads


def _filled(shape: tuple[int, ...], dtype: torch.dtype, parts: Iterator[Any]) -> torch.Tensor:
    value = torch.empty(shape, dtype=dtype)
    flat, at = value.reshape(-1).view(torch.uint8).numpy(), 0
    for part in parts:
        flat[at : at + part.nbytes] = part.view("u1")
        at += part.nbytes
    assert at == flat.nbytes, f"{at} of {flat.nbytes} bytes"
    return value


def _value(reader: CommitReader, param: ParamRecord) -> torch.Tensor:
    return _filled(param.shape, torch.float32, values_of(reader, param))


def _moment(reader: CommitReader, param: ParamRecord, kind: Kind) -> torch.Tensor:
    return _filled(param.shape, torch.float32, reader.parts(param.name, kind))


def _buffer(reader: CommitReader, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return _filled(shape, dtype, reader.parts(name, Kind.BUFFER))
