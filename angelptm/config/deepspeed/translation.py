"""One pass over a DeepSpeed configuration: keys are taken out one by one, and each taken key is reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from angelptm.config.deepspeed.keys import (
    IGNORED,
    MAPPED,
    OPEN,
    REFUSED,
    REFUSED_SECTIONS,
    SCALARS,
    SECTIONS,
    SWITCHED_SECTIONS,
    TOP_LEVEL,
    TRUE_ONLY,
)
from angelptm.config.deepspeed.report import KeyReport, Outcome
from angelptm.config.problem import UnknownKeyError
from angelptm.config.schema import Config
from angelptm.config.suggest import nearest
from angelptm.errors import ConfigError

_AUTO = "Hugging Face's trainer would fill it in"


class Translation:
    """``result`` grows into the mapping for Config, ``entries`` into the report."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        """Raises ConfigError for a key that DeepSpeed does not have, or that has the wrong form."""
        self.result: dict[str, Any] = {}
        self.entries: list[KeyReport] = []
        self._left = _leaves(content)
        self._order = {key: index for index, key in enumerate(self._left)}
        for key, value in self._left.items():
            _check_known(key, value)

    def take(self, key: str) -> Any:
        """The key's value and out with it; None if it is absent, null, empty or "auto"."""
        if key not in self._left:
            return None
        value = self._left.pop(key)
        if value is None or value == {} or value == "auto":
            self.note(key, value, "not set", why=_AUTO if value == "auto" else "")
            return None
        return value

    def take_number(self, key: str, kind: type, least: float) -> Any:
        """Like take; ConfigError unless it is a number of that kind and at least ``least``."""
        value = self.take(key)
        if value is None:
            return None
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else _parsed(value)
        if number is None or not number >= least or (kind is int and not float(number).is_integer()):
            noun = "a whole number" if kind is int else "a number"
            raise ConfigError(key, value, f"{noun} of at least {least:g}, or 'auto'")
        return kind(number)

    def take_flag(self, key: str) -> bool | None:
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(key, value, "true, false or 'auto'")
        return value

    def put(self, target: str, value: Any) -> None:
        section = self.result
        *above, last = target.split(".")
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value

    def map(self, key: str, value: Any, target: str, result: Any, why: str = "") -> None:
        """Puts the result and reports the key as mapped; with a reason, as approximated."""
        self.put(target, result)
        self.note(key, value, "approximated" if why else "mapped", target, why)

    def note(self, key: str, value: Any, outcome: Outcome, target: str = "", why: str = "") -> None:
        self.entries.append(KeyReport(key, value, outcome, target, why))

    def finish(self) -> None:
        """Refuses or ignores what no rule took, then puts the report into the file's order."""
        for key in list(self._left):
            section = _section(key)
            value = self.take(key)
            if value is None:
                continue
            if section in REFUSED_SECTIONS and value is not False:
                raise ConfigError(key, value, "no such section", REFUSED_SECTIONS[section])
            if key in REFUSED and value not in (False, 0):
                raise ConfigError(key, value, *REFUSED[key])
            if key in TRUE_ONLY and value is not True:
                raise ConfigError(key, value, "true", TRUE_ONLY[key])
            self.note(key, value, "ignored", why=_why_ignored(key, section))
        self.entries.sort(key=lambda entry: self._order[entry.key])


def _why_ignored(key: str, section: str) -> str:
    if key in MAPPED:
        return f"no effect without {key.split('.')[0]}.type"
    return IGNORED.get(key) or OPEN.get(section) or "it is the default, or off"


def _parsed(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _leaves(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value; empty sections stay as they are."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            found.update(_leaves(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _section(key: str) -> str:
    """The section of SECTIONS that holds the key, or is it; empty if there is none."""
    return next((section for section in SECTIONS if key == section or key.startswith(section + ".")), "")


def _check_known(key: str, value: Any) -> None:
    section = _section(key)
    if key in SCALARS or (section and (section not in SWITCHED_SECTIONS or key != section)):
        return
    inside = sorted({known[len(key) + 1 :].split(".")[0] for known in SCALARS if known.startswith(key + ".")})
    if inside:
        if value is None or value == {}:
            return
        raise ConfigError(key, value, f"a mapping with the keys {', '.join(inside)}")
    parent, _, last = key.rpartition(".")
    while parent and parent not in SCALARS and not any(known.startswith(parent + ".") for known in SCALARS):
        parent, _, last = parent.rpartition(".")
    if parent in SCALARS:
        raise ConfigError(parent, "a mapping", "a single value")
    dotted = f"{parent}." if parent else ""
    siblings = (
        {known[len(dotted) :].split(".")[0] for known in SCALARS if known.startswith(dotted)}
        if parent
        else set(TOP_LEVEL)
    )
    if not parent and last in Config.model_fields:
        raise ConfigError(
            last, value, "a key of DeepSpeed", f'Keys of this package go into a block: "angelptm": {{"{last}": ...}}.'
        )
    near = nearest(last, siblings)
    raise UnknownKeyError(dotted + last, value, near and dotted + near, sorted(siblings))
