"""The header of a manifest: what the page records refer to, and everything of a commit that is not a page.

The models are strict and closed: an unknown key, a text where a number belongs, or NaN is an error. What depends on the
page records is checked in records.py.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from angelptm.checkpoint.json_value import check_json, check_text, problem
from angelptm.states.formats import FP32, MOMENT_COUNT, StateFormats
from angelptm.units.layout import ALIGN_ELEMENTS, ParamLayout, UnitLayout

FORMAT_VERSION = 1

_MAX_ELEMENTS = 2**56  # so that sums of byte offsets stay far below 2**63
_BUFFER_GAP_BYTES = 4096


def _checked_time(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text.removesuffix("Z") + "+00:00" if text.endswith("Z") else text)
    except ValueError as error:
        raise problem("not an ISO 8601 time") from error
    offset = moment.utcoffset()
    if offset is None or offset.total_seconds() != 0:
        raise problem("not a time in UTC")
    return text


def _checked_base64(text: str) -> str:
    try:
        base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise problem("not base64") from error
    return text


def _checked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    # Zeros count as ones: numpy and torch multiply the other sizes all the same.
    if math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise problem("more elements than 2**56")
    return shape


Count = Annotated[int, Field(ge=0, le=_MAX_ELEMENTS)]
Word = Annotated[int, Field(ge=0, le=2**32 - 1)]
Text = Annotated[str, AfterValidator(check_text)]
Name = Annotated[Text, Field(min_length=1, max_length=4096)]
JsonObject = Annotated[dict[str, Any], AfterValidator(check_json)]
# Lax only about the container: JSON has lists where we keep tuples. What is inside stays strict.
Shape = Annotated[
    tuple[Annotated[int, Field(ge=0, le=_MAX_ELEMENTS)], ...],
    Field(strict=False, max_length=16),
    AfterValidator(_checked_shape),
]
Owner = Annotated[tuple[Text, Text], Field(strict=False)]
Scalar = bool | int | float | str | None


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


class FileRecord(_Part):
    """A slot file: its name in whichever folder holds it, and how many pages it has room for."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
    slot_count: Word


class StatesRecord(_Part):
    """Formats of a parameter's optimizer states; the fields are those of ``angelptm.states.formats.StateFormats``."""

    master: Literal["fp32", "split"]
    exp_avg: Literal["fp32", "bf16", "int8"]
    exp_avg_sq: Literal["fp32", "bf16", "int8"]


class ParamRecord(_Part):
    """One parameter; the fields are those of ``angelptm.units.layout.ParamLayout``. ``states`` is left out where all
    of them are fp32."""

    name: Name
    shape: Shape
    offset: Count
    trainable: bool
    owners: Annotated[tuple[Owner, ...], Field(strict=False)]
    states: StatesRecord | None = None

    @property
    def formats(self) -> StateFormats:
        return FP32 if self.states is None else StateFormats(**dict(self.states))

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if self.states is None:
            del fields["states"]
        return fields

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class UnitRecord(_Part):
    """A unit and its parameters in order of offset; the fields are those of ``angelptm.units.layout.UnitLayout``."""

    name: Annotated[Text, Field(max_length=4096)]
    params: Annotated[tuple[ParamRecord, ...], Field(strict=False)]
    trainable_elements: Count
    frozen_offset: Count
    frozen_elements: Count

    @property
    def end(self) -> int:
        """Elements of the unit's space, both sections and what lies between them."""
        return self.frozen_offset + self.frozen_elements

    @model_validator(mode="after")
    def _packed(self) -> UnitRecord:
        """Gaps are bounded, so that the space of a unit is never much larger than what it holds."""
        if self.frozen_offset < self.trainable_elements:
            raise problem(f"frozen_offset {self.frozen_offset} lies in the trainable section")
        ends = {True: 0, False: self.frozen_offset}
        for param in self.params:
            if param.trainable and ends[False] > self.frozen_offset:
                raise problem(f"trainable parameter {param.name!r} comes after a frozen one")
            gap = param.offset - ends[param.trainable]
            if not 0 <= gap < ALIGN_ELEMENTS:
                raise problem(
                    f"parameter {param.name!r} at offset {param.offset}, expected it within {ALIGN_ELEMENTS} elements "
                    f"from {ends[param.trainable]}, where the one before it ends"
                )
            ends[param.trainable] = param.offset + param.numel
        for section, start, size in (
            (True, 0, self.trainable_elements),
            (False, self.frozen_offset, self.frozen_elements),
        ):
            if not 0 <= start + size - ends[section] < ALIGN_ELEMENTS:
                label = "trainable" if section else "frozen"
                raise problem(f"the {label} section ends at {start + size}, its last parameter at {ends[section]}")
        return self


class BufferRecord(_Part):
    """A module's buffer: ``offset`` counts bytes from the start of the buffer space. ``dtype`` as torch names it."""

    name: Name
    dtype: Literal[
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128",
        "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
    ]  # fmt: skip
    shape: Shape
    offset: Count

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


ITEMSIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8,
    "complex128": 16, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1,
    "bool": 1,
}  # fmt: skip
"""Bytes of an element of a buffer, by dtype."""


class GroupRecord(_Part):
    """A parameter group: the names in it and its options as torch.optim calls them."""

    params: Annotated[tuple[Name, ...], Field(strict=False)]
    options: dict[str, Scalar | Annotated[tuple[int | float, ...], Field(strict=False)]]

    @model_validator(mode="after")
    def _options_are_json(self) -> GroupRecord:
        check_json(dict(self.options))
        return self


class OptimizerRecord(_Part):
    """The optimizer: ``steps`` are the updates that each trainable parameter had; one that is missing had none."""

    type: Literal["adamw", "sgd", "lion"]
    steps: dict[Name, Annotated[int, Field(ge=0, le=2**63 - 1)]]
    groups: Annotated[tuple[GroupRecord, ...], Field(strict=False)]


class NumpyRecord(_Part):
    """State of numpy's legacy generator (MT19937)."""

    keys: Annotated[tuple[Word, ...], Field(strict=False, min_length=624, max_length=624)]
    pos: Annotated[int, Field(ge=0, le=624)]
    has_gauss: Annotated[int, Field(ge=0, le=1)]
    cached_gaussian: float


class RngRecord(_Part):
    """States of the generators of Python's random, numpy and torch; the last one as base64 of ``get_rng_state()``.
    ``device``: that of the GPU, as base64 of ``torch.cuda.get_rng_state()``, where the run computed on one."""

    python: Annotated[
        tuple[
            Annotated[int, Field(ge=3, le=3)],
            Annotated[tuple[Word, ...], Field(strict=False, min_length=625, max_length=625)],
            float | None,
        ],
        Field(strict=False),
    ]
    numpy: NumpyRecord
    torch: Annotated[str, Field(max_length=2**20), AfterValidator(_checked_base64)]
    device: Annotated[str, Field(max_length=2**20), AfterValidator(_checked_base64)] | None = None

    @model_validator(mode="after")
    def _position(self) -> RngRecord:
        if self.python[1][624] > 624:
            raise problem(f"python's generator at position {self.python[1][624]}, expected 624 or less")
        return self


class Header(_Part):
    """All of a manifest but its page records. Offsets in units are elements; in the buffer space, bytes. ``rng`` are
    the generators of the first rank; ``rank_rng``, left out where there is one, those of every rank in order."""

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
    package_version: Annotated[Text, Field(max_length=200)]
    store_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    step: Annotated[int, Field(ge=0, le=10**12 - 1)]
    created: Annotated[str, Field(max_length=40), AfterValidator(_checked_time)]
    config_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    page_bytes: Annotated[int, Field(ge=2**16, le=2**30)]
    precision: Literal["fp32", "bf16"]
    files: Annotated[tuple[FileRecord, ...], Field(strict=False)]
    units: Annotated[tuple[UnitRecord, ...], Field(strict=False)]
    buffers: Annotated[tuple[BufferRecord, ...], Field(strict=False)] = ()
    buffer_bytes: Count = 0
    optimizer: OptimizerRecord
    scheduler: JsonObject | None = None
    rng: RngRecord | None = None
    rank_rng: Annotated[tuple[RngRecord, ...], Field(strict=False, max_length=2**16)] = ()
    data: JsonObject | None = None
    model: JsonObject | None = None
    client: JsonObject | None = None

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if not self.rank_rng:
            del fields["rank_rng"]
        return fields

    @property
    def has_records(self) -> bool:
        """Whether states lie together in pages of STATES."""
        moments = MOMENT_COUNT[self.optimizer.type]
        params = (param for unit in self.units for param in unit.params if param.trainable)
        return any(param.formats.of_rule(moments) != FP32 for param in params)

    @model_validator(mode="after")
    def _consistent(self) -> Header:
        if self.page_bytes & (self.page_bytes - 1):
            raise problem(f"page_bytes {self.page_bytes} is not a power of two")
        names = [param.name for unit in self.units for param in unit.params]
        for label, found in (
            ("file", [file.name for file in self.files]),
            ("unit", [unit.name for unit in self.units]),
            ("parameter", names),
            ("buffer", [buffer.name for buffer in self.buffers]),
            ("parameter in optimizer.groups", [name for group in self.optimizer.groups for name in group.params]),
        ):
            if (twice := _first_repeated(found)) is not None:
                raise problem(f"{label} {twice!r} appears twice")
        self._check_units()
        self._check_buffers()
        trainable = {param.name for unit in self.units for param in unit.params if param.trainable}
        known = set(names)
        for name in self.optimizer.steps:
            if name not in trainable:
                raise problem(f"optimizer.steps: {name!r} is not a trainable parameter")
        for group in self.optimizer.groups:
            for name in group.params:
                if name not in known:
                    raise problem(f"optimizer.groups: {name!r} is not a parameter")
        return self

    def _check_units(self) -> None:
        page_elements = self.page_bytes // (2 if self.precision == "bf16" else 4)
        for unit in self.units:
            for param in unit.params:
                if param.formats.master == "split" and self.precision != "bf16":
                    raise problem(f"parameter {param.name!r} has a split master in {self.precision}")
            if unit.frozen_offset - unit.trainable_elements >= page_elements:
                raise problem(f"unit {unit.name!r}: frozen_offset {unit.frozen_offset} is a page away or more")
        if sum(unit.end for unit in self.units) > _MAX_ELEMENTS:
            raise problem("the units have more elements than 2**56")

    def _check_buffers(self) -> None:
        end = 0
        for buffer in self.buffers:
            if not 0 <= buffer.offset - end < _BUFFER_GAP_BYTES:
                raise problem(
                    f"buffer {buffer.name!r} at offset {buffer.offset}, expected it within {_BUFFER_GAP_BYTES} bytes "
                    f"from {end}, where the one before it ends"
                )
            end = buffer.offset + buffer.bytes
        if not 0 <= self.buffer_bytes - end < _BUFFER_GAP_BYTES:
            raise problem(f"buffer_bytes {self.buffer_bytes}, expected {end} or up to {_BUFFER_GAP_BYTES - 1} more")


def _first_repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def units_from_layouts(layouts: Sequence[UnitLayout]) -> tuple[UnitRecord, ...]:
    """The header's units for layouts in order of their index."""
    return tuple(
        UnitRecord(
            name=layout.name,
            params=tuple(
                ParamRecord(
                    name=param.name,
                    shape=tuple(param.shape),
                    offset=param.offset,
                    trainable=param.trainable,
                    owners=param.owners,
                    states=None if param.states == FP32 or not param.trainable else StatesRecord(**vars(param.states)),
                )
                for param in layout.params
            ),
            trainable_elements=layout.trainable_elements,
            frozen_offset=layout.frozen_offset,
            frozen_elements=layout.frozen_elements,
        )
        for layout in layouts
    )


def layouts_from_units(units: Sequence[UnitRecord]) -> tuple[UnitLayout, ...]:
    """The layouts that ``units_from_layouts`` was given."""
    return tuple(
        UnitLayout(
            unit.name,
            index,
            tuple(ParamLayout(p.name, p.shape, p.offset, p.trainable, p.owners, p.formats) for p in unit.params),
            unit.trainable_elements,
            unit.frozen_offset,
            unit.frozen_elements,
        )
        for index, unit in enumerate(units)
    )
