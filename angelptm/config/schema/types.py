"""The base of every section, and the value types that sections share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationInfo, field_validator
from pydantic.functional_validators import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from angelptm.sizes import parse_bytes

_EXACT_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def expected(phrase: str, *, remedy: str = "", key: str = "", value: object = None) -> PydanticCustomError:
    """The error of one of our own rules. ``key`` and ``value`` name another place than the one being validated."""
    context = {"phrase": phrase, "remedy": remedy, "key": key, "value": value}
    return PydanticCustomError("expected", "expected {phrase}", context)


def exact_size(count: int) -> int | str:
    """The shortest text that parses back to the same count: 268435456 → '256MiB', 1000001 → 1000001."""
    for unit, scale in _EXACT_UNITS:
        if count and count % scale == 0:
            return f"{count // scale}{unit}"
    return count


def _size(value: Any) -> int:
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise expected("a size in bytes, such as 67108864, '512MiB' or '1.5TB'") from error


def _path(value: Any) -> Any:
    if value == "":
        raise expected("a path, not an empty text")
    if isinstance(value, str) and "\0" in value:
        raise expected("a path without a byte 0")
    return value


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise expected("a path whose ~ names a user of this machine") from error


Bytes = Annotated[int, BeforeValidator(_size), PlainSerializer(exact_size, when_used="json")]
"""A size: whole bytes, or text with a unit. Held as int, written as the shortest exact text."""


def _size_or_auto(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    try:
        size = parse_bytes(value)
    except ValueError:
        size = -1
    if size < 0:
        raise expected("'auto' or a size in bytes, such as 67108864, '512MiB' or '1.5TB'")
    return size


def _shown(value: int | str) -> int | str:
    return value if isinstance(value, str) else exact_size(value)


BytesOrAuto = Annotated[
    int | Literal["auto"], BeforeValidator(_size_or_auto), PlainSerializer(_shown, when_used="json")
]
"""A size of 0 bytes and more, or ``auto``."""

UserPath = Annotated[Path, BeforeValidator(_path), AfterValidator(_expanded)]
"""A path as the user wrote it, with ``~`` expanded; relative ones are relative to the working folder."""


def _mentions(annotation: Any, types: tuple[Any, ...]) -> bool:
    return annotation in types or any(_mentions(part, types) for part in get_args(annotation))


class Section(BaseModel):
    """A frozen group of keys. Unknown keys are errors, as are inf, NaN, and true or false where a number belongs."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            annotation = cls.model_fields[str(info.field_name)].annotation
            if _mentions(annotation, (int, float)) and not _mentions(annotation, (bool, Any)):
                raise expected("a number, not true or false")
        return value
