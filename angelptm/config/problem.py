"""pydantic's errors as one ConfigError that names the key, what was found, what was expected, and a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from angelptm.config.suggest import did_you_mean, nearest_key
from angelptm.errors import ConfigError


class _Nothing:
    """What is found at a key that is missing."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


class UnknownKeyError(ConfigError):
    """A key that no section has. ``key`` is its dotted path, ``remedy`` the near spelling if there is one."""

    def __init__(self, key: str, value: object, suggestion: str | None, siblings: list[str]) -> None:
        remedy = f"did you mean {suggestion!r}?" if suggestion else f"known here: {', '.join(sorted(siblings))}."
        super().__init__(key, value, "a known key", remedy)
        self.args = (f"config: unknown key {key!r}; {remedy}",)


def config_error(error: ValidationError, root: type[BaseModel], prefix: str = "") -> ConfigError:
    """The first problem as the error's facts; the other ones are told in its text. ``prefix`` goes before each key."""
    # Unknown keys first: a misspelt key is usually why another one is missing.
    details = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    problems = [_explain(one, root, prefix) for one in details]
    first, rest = problems[0], problems[1:]
    if rest:
        also = " ".join(str(problem).removeprefix("config: ") for problem in rest)
        first.args = (f"{first} Also: {also}",)
    return first


def dotted(parts: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in parts)


def section_at(root: type[BaseModel], parts: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The section class that a dotted path leads to; None when it leads to a plain value."""
    found: type[BaseModel] | None = root
    for part in parts:
        if found is None:
            return None
        if isinstance(part, int):
            continue
        field = found.model_fields.get(part)
        found = _section_in(field.annotation) if field is not None else None
    return found


def key_paths(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, last part) of every key below ``root``; list indices are left out."""
    for name, field in root.model_fields.items():
        yield prefix + name, name
        section = _section_in(field.annotation)
        if section is not None:
            yield from key_paths(section, f"{prefix}{name}.")


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _explain(details: ErrorDetails, root: type[BaseModel], prefix: str) -> ConfigError:
    parts, kind, context = details["loc"], details["type"], details.get("ctx", {})
    key, value = prefix + dotted(parts), details["input"]
    if kind == "extra_forbidden":
        section = section_at(root, parts[:-1])
        siblings = list(section.model_fields) if section is not None else []
        suggestion = nearest_key(str(parts[-1]), siblings, dict(key_paths(root)))
        inside = dotted(parts[:-1])
        if suggestion is not None and suggestion in siblings and inside:
            suggestion = f"{inside}.{suggestion}"
        return UnknownKeyError(key, value, suggestion, siblings)
    if kind == "expected":
        if context["key"]:
            key = prefix + dotted((*parts, context["key"]))
            value = NOTHING if context["value"] is None else context["value"]
        return ConfigError(key, value, context["phrase"], context["remedy"])
    if kind == "missing":
        return ConfigError(key, NOTHING, _described(root, parts), "This key is required.")
    remedy = ""
    if kind == "literal_error" and isinstance(value, str):
        remedy = did_you_mean(value, context["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    return ConfigError(key, value, _phrase(details, root), remedy)


def _described(root: type[BaseModel], parts: tuple[int | str, ...]) -> str:
    section = section_at(root, parts[:-1])
    field = section.model_fields.get(str(parts[-1])) if section is not None else None
    return f"a value: {field.description}".rstrip(".") if field is not None else "a value"


def _phrase(details: ErrorDetails, root: type[BaseModel]) -> str:
    """What completes "expected ..." for pydantic's own rules."""
    kind, context = details["type"], details.get("ctx", {})
    bounds = {"greater_than": ("above", "gt"), "greater_than_equal": ("of at least", "ge")}
    bounds |= {"less_than": ("below", "lt"), "less_than_equal": ("of at most", "le")}
    if kind in bounds:
        word, name = bounds[kind]
        return f"a number {word} {context[name]:g}"
    if kind == "literal_error":
        return f"one of {context['expected']}" if " or " in context["expected"] else str(context["expected"])
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        section = section_at(root, details["loc"])
        return f"a mapping with the keys {', '.join(section.model_fields)}" if section else "a mapping"
    if kind == "too_short":
        return f"at least {context['min_length']} entries"
    if kind == "too_long":
        return f"at most {context['max_length']} entries"
    families = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text",
        "path": "a path",
        "list": "a list",
        "tuple": "a list of numbers",
        "finite": "a finite number",
    }
    return families.get(kind.split("_")[0], details["msg"])
