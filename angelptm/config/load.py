"""From a file, dict or object, with overrides, to a checked Config."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from angelptm.config.deepspeed import DeepSpeedReport, from_deepspeed, is_deepspeed
from angelptm.config.problem import config_error
from angelptm.config.schema import Config
from angelptm.errors import ConfigError

_log = logging.getLogger("angelptm")

Source = Path | str | Mapping[str, Any] | Config


def load_config(source: Source, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration. Raises ConfigError, and nothing else, for anything the user can get wrong.

    source: path of a YAML or JSON file (ours or DeepSpeed's), a mapping of the same form, or a Config.
    overrides: ``"a.b=c"``, c being YAML; a number in the path is a list index (``tiers.ssd.0.path=/nvme``).
    They apply to our keys, also when the source is in DeepSpeed's form.
    """
    return load_config_with_report(source, overrides)[0]


def load_config_with_report(source: Source, overrides: Sequence[str] = ()) -> tuple[Config, DeepSpeedReport | None]:
    """``load_config``, and what became of each key if the source is in DeepSpeed's form."""
    if isinstance(source, Config) and not overrides:
        return source, None
    content, report = _content(source), None
    _require_text_keys(content, "")
    if is_deepspeed(content):
        content, report = from_deepspeed(content)
    for override in overrides:
        content = _overridden(content, override)
    if report is not None:
        _require_tiers(content)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise config_error(error, Config) from None
    if report is not None:
        _log.info("%s", report)
        for entry in report.of("approximated"):
            _log.warning("DeepSpeed configuration: %s", entry)
    return config, report


def _content(source: Source) -> dict[str, Any]:
    if isinstance(source, Config):
        return source.model_dump(exclude_unset=True)
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, (str, Path)):
        raise ConfigError("config", type(source).__name__, "a path, a mapping or a Config")
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("file", str(source), f"a readable YAML or JSON file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError("file", str(source), f"UTF-8 text (byte {error.start} is not)") from error
    except ValueError as error:  # a byte 0 in the path
        raise ConfigError("file", str(source), "the path of a YAML or JSON file") from error
    content = _parse_json(path, text) if path.suffix == ".json" else _parse_yaml(path, text)
    if not isinstance(content, dict):
        raise ConfigError(str(path), content, "a mapping of keys, such as 'tiers: {device: 256MiB, host: 1GiB}'")
    return content


def _require_text_keys(content: Any, prefix: str) -> None:
    """YAML and dicts may have numbers, or ``on``, for keys."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if not isinstance(key, str):
                raise ConfigError(f"{prefix}{key}", key, "a key that is text", "Quote it if it is meant to be one.")
            _require_text_keys(value, f"{prefix}{key}.")
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            _require_text_keys(value, f"{prefix}{index}.")


class _Loader(yaml.SafeLoader):
    """YAML in which a key occurs once in a mapping, and 1e-5 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is not text", problem_mark=key_node.start_mark)
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} occurs twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, reads 1e-5 as text for want of a dot and a signed exponent.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _parse_yaml(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"{path}, line {error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise ConfigError(line, error.problem or str(error), "valid YAML") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), " ".join(str(error).split()), "valid YAML") from error


def _parse_json(path: Path, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(str(path), f"key {key!r} twice in one object", "each key once")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}", error.msg, "valid JSON") from error
    except RecursionError as error:
        raise ConfigError(str(path), "too deep nesting", "valid JSON") from error


def _overridden(content: dict[str, Any], override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError("--set", override, "KEY=VALUE, such as optimizer.lr=3e-4 or tiers.ssd.0.path=/nvme")
    try:
        value = yaml.load(text, _Loader)
        _require_text_keys(value, f"{path}.")
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {path}", text, "a YAML value") from error
    result: dict[str, Any] = _with(content, parts, value, override)
    return result


def _with(content: Any, parts: Sequence[str], value: Any, override: str) -> Any:
    """A copy of ``content`` with the value at the path; mappings and one list entry past the end are created."""
    if not parts:
        return value
    part, rest = parts[0], parts[1:]
    if isinstance(content, BaseModel):
        content = content.model_dump(exclude_unset=True)
    if part.isdecimal() and (content is None or isinstance(content, (list, tuple))):
        entries, index = list(content or []), int(part)
        if index > len(entries):
            raise ConfigError("--set", override, f"a list index of at most {len(entries)}, which appends")
        inner = entries[index] if index < len(entries) else None
        entries[index : index + 1] = [_with(inner, rest, value, override)]
        return entries
    if content is not None and not isinstance(content, Mapping):
        raise ConfigError("--set", override, f"a key of a mapping, but {part!r} would be inside the value {content!r}")
    return {**(content or {}), part: _with((content or {}).get(part), rest, value, override)}


def _require_tiers(content: Mapping[str, Any]) -> None:
    """DeepSpeed has no key for the tiers' sizes, and guessing them would be a silent decision."""
    tiers = content.get("tiers")
    missing = [name for name in ("device", "host") if not isinstance(tiers, Mapping) or name not in tiers]
    if missing:
        raise ConfigError(
            " and ".join(f"tiers.{name}" for name in missing),
            None,
            "the bytes that the tier may hold, for which DeepSpeed has no key",
            'Add to the file: "angelptm": {"tiers": {"device": "8GiB", "host": "32GiB"}} with your sizes, '
            "or pass --set tiers.device=8GiB --set tiers.host=32GiB.",
        )
