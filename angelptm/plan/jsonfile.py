"""JSON files of planning data: written whole, read with every field checked.

A file is an object with ``format`` (what it is) and ``version``. Whatever is wrong with one that is read becomes a
PlanFileError that names the file, the field and what was expected there.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from angelptm.errors import AngelPTMError

T = TypeVar("T")
_MOST_BYTES = 2**30


class PlanFileError(AngelPTMError):
    """A trace, rates or schedule file cannot be used. ``field`` is the dotted path of what is wrong in it."""

    def __init__(self, path: str, field: str, found: str, expected: str, remedy: str) -> None:
        self.path, self.field, self.found, self.expected, self.remedy = path, field, found, expected, remedy
        where = f"{path}: {field}" if field else path
        super().__init__(f"{where}: found {found}, expected {expected}. {remedy}")


class Fields:
    """One JSON object of a file; each method takes a field out of it or raises PlanFileError."""

    def __init__(self, data: object, path: str, remedy: str, where: str = "") -> None:
        self._path, self._remedy, self._where = path, remedy, where
        if not isinstance(data, Mapping):
            raise self.error("", data, "an object")
        self._data = data

    def error(self, name: str, found: object, expected: str) -> PlanFileError:
        field = ".".join(part for part in (self._where, name) if part)
        text = repr(found)
        shown = text if len(text) <= 80 else text[:77] + "..."
        return PlanFileError(self._path, field, shown, expected, self._remedy)

    def raw(self, name: str, expected: str) -> object:
        if name not in self._data:
            raise PlanFileError(
                self._path,
                ".".join(part for part in (self._where, name) if part),
                "nothing",
                expected,
                self._remedy,
            )
        return self._data[name]

    def whole(self, name: str, least: int = 0) -> int:
        value = self.raw(name, f"a whole number from {least} on")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(name, value, f"a whole number from {least} on")
        return value

    def number(self, name: str, *, positive: bool = False) -> float:
        expected = "a number greater than 0" if positive else "a number from 0 on"
        value = self.raw(name, expected)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value < 0
            or (positive and value == 0)
        ):
            raise self.error(name, value, expected)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw(name, "true or false")
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def text(self, name: str, among: tuple[str, ...] = ()) -> str:
        expected = f"one of {', '.join(among)}" if among else "a text"
        value = self.raw(name, expected)
        if not isinstance(value, str) or (among and value not in among):
            raise self.error(name, value, expected)
        return value

    def wholes(self, name: str, least: int = 0) -> tuple[int, ...]:
        expected = f"a list of whole numbers from {least} on"
        value = self.raw(name, expected)
        if not isinstance(value, list) or any(
            isinstance(one, bool) or not isinstance(one, int) or one < least for one in value
        ):
            raise self.error(name, value, expected)
        return tuple(value)

    def objects(self, name: str, read: Callable[[Fields], T]) -> tuple[T, ...]:
        """What ``read`` makes of each object of a list."""
        value = self.raw(name, "a list of objects")
        if not isinstance(value, list):
            raise self.error(name, value, "a list of objects")
        prefix = f"{self._where}.{name}" if self._where else name
        return tuple(
            read(Fields(one, self._path, self._remedy, f"{prefix}[{index}]")) for index, one in enumerate(value)
        )

    def free(self, name: str) -> dict[str, object]:
        value = self.raw(name, "an object")
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return value

    def has(self, name: str) -> bool:
        return name in self._data

    def inner(self, name: str) -> Fields:
        return Fields(
            self.raw(name, "an object"), self._path, self._remedy, f"{self._where}.{name}" if self._where else name
        )


def parse(text: str, path: str, kind: str, version: int, remedy: str) -> Fields:
    """The object in ``text``, after a check that it is a ``kind`` of this version. ``path`` is for messages."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanFileError(path, "", f"no JSON ({error})", f"a file of {kind}", remedy) from error
    fields = Fields(data, path, remedy)
    fields.text("format", (kind,))
    found = fields.whole("version", 1)
    if found != version:
        raise fields.error("version", found, f"{version}, the version that this program reads")
    return fields


def read_text(path: str | Path, kind: str, remedy: str) -> str:
    """The text of a file; a PlanFileError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise PlanFileError(str(path), "", f"more than {_MOST_BYTES} bytes", f"a file of {kind}", remedy)
        return content.decode("utf-8")
    except OSError as error:
        raise PlanFileError(str(path), "", error.strerror or str(error), f"a file of {kind}", remedy) from error
    except UnicodeDecodeError as error:
        raise PlanFileError(str(path), "", "bytes that are no UTF-8", f"a file of {kind}", remedy) from error


def dump(kind: str, version: int, data: Mapping[str, object]) -> str:
    return json.dumps({"format": kind, "version": version, **data}, allow_nan=False)


def write_text(path: str | Path, text: str) -> None:
    """Puts a whole file in place of what was there: a reader sees the former one or this one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
