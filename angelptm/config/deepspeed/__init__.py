"""A DeepSpeed configuration in our terms: each of its keys is mapped, or listed with the reason why it is not.

A key that changes what is computed and that we cannot honour is refused; one that tunes DeepSpeed's own machinery is
listed as ignored. Hugging Face's "auto" counts as not set. What DeepSpeed cannot say, such as the tiers' sizes, stands
in a block ``"angelptm": {...}`` of the same file, in our keys; it wins over what is mapped.

Reading order: keys (the tables), rules (the mapping), translation (the pass that makes sure nothing is dropped).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from angelptm.config.deepspeed.keys import MARKS, WEAK_MARKS
from angelptm.config.deepspeed.report import DeepSpeedReport, KeyReport
from angelptm.config.deepspeed.rules import RULES
from angelptm.config.deepspeed.translation import Translation
from angelptm.errors import ConfigError

__all__ = ["DeepSpeedReport", "KeyReport", "from_deepspeed", "is_deepspeed"]


def is_deepspeed(content: Mapping[str, Any]) -> bool:
    """Whether a mapping is in DeepSpeed's form, which its keys tell; ``params`` is how it nests what a type needs."""
    if MARKS & content.keys():
        return True
    nested = any(
        isinstance(content.get(key), Mapping) and "params" in content[key] for key in ("optimizer", "scheduler")
    )
    return "tiers" not in content and (nested or bool(WEAK_MARKS & content.keys()))


def from_deepspeed(content: Mapping[str, Any]) -> tuple[dict[str, Any], DeepSpeedReport]:
    """(mapping for Config, report). Raises ConfigError for unknown keys and for what cannot be honoured."""
    own = content.get("angelptm", {})
    if not isinstance(own, Mapping):
        raise ConfigError("angelptm", own, "a mapping of this package's keys, such as {'tiers': {...}}")
    keys = Translation({key: value for key, value in content.items() if key != "angelptm"})
    for rule in RULES:
        rule(keys)
    keys.finish()
    entries = [*keys.entries, *(KeyReport(f"angelptm.{key}", value, "mapped", key) for key, value in own.items())]
    return _merged(keys.result, own), DeepSpeedReport(entries)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result
