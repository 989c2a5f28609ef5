"""What a run folder holds about its steps. Only the timeline has to be there; what else is missing is said, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from angelptm.errors import DataError
from angelptm.foreign import parse_json, read_whole
from angelptm.timeline.data import Timeline
from angelptm.timeline.file import FILE_NAME, load

_LIMIT_BYTES = 64 << 20


@dataclass
class RunFiles:
    """``missing``: name of a file → why nothing of it is shown. Objects are empty where their file is missing."""

    folder: Path
    timeline: Timeline
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    prediction: dict[str, Any] = field(default_factory=dict)
    trace: Any = None
    schedule: Any = None
    missing: dict[str, str] = field(default_factory=dict)


def read_run(folder: Path) -> RunFiles:
    """Reads everything. DataError if there is no run folder, no timeline, or one that is malformed."""
    if not folder.is_dir():
        found = "no such folder" if not folder.exists() else "no folder"
        raise DataError(str(folder), found, "the folder of a run", "Name the run_dir that `angelptm train` printed.")
    path = folder / FILE_NAME
    if not path.exists():
        raise DataError(
            str(path),
            "no such file",
            "the timeline of a run",
            "Runs of earlier versions, and those that ended before a step was recorded, have none: "
            "train again, or name another run folder.",
        )
    run = RunFiles(folder, load(path))
    run.config = _object(run, "config.yaml")
    run.result = _object(run, "result.json")
    run.plan = _object(run, "plan.json")
    run.prediction = _object(run, "prediction.json")
    run.trace = _read(run, "trace.json")
    run.schedule = _read(run, "schedule.json")
    run.metrics = _metrics(run)
    return run


def number(value: object) -> float | None:
    """A finite number, or None for anything else that a file may hold."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value) if math.isfinite(value) else None
        except OverflowError:
            return None
    return None


def numbers(value: object) -> dict[str, float]:
    """The finite numbers of an object; empty for what is none."""
    if not isinstance(value, Mapping):
        return {}
    return {str(key): found for key, item in value.items() if (found := number(item)) is not None}


def tables(value: object) -> dict[str, dict[str, float]]:
    """An object of objects of numbers."""
    if not isinstance(value, Mapping):
        return {}
    return {str(key): found for key, item in value.items() if (found := numbers(item))}


def _read(run: RunFiles, name: str) -> Any:
    path = run.folder / name
    if not path.exists():
        run.missing[name] = "the run folder has no such file"
        return None
    try:
        content = read_whole(path, _LIMIT_BYTES, "a file of a run")
        if path.suffix == ".yaml":
            return yaml.safe_load(content.decode("utf-8"))
        return parse_json(content, path, "a JSON document")
    except DataError as error:
        run.missing[name] = f"found {error.found}, expected {error.expected}"
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        run.missing[name] = f"unreadable ({' '.join(str(error).split())[:200]})"
    return None


def _object(run: RunFiles, name: str) -> dict[str, Any]:
    found = _read(run, name)
    if isinstance(found, dict):
        return found
    run.missing.setdefault(name, "it holds no object")
    return {}


def _metrics(run: RunFiles) -> list[dict[str, Any]]:
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        run.missing[path.name] = "the run folder has no such file"
        return []
    try:
        content = read_whole(path, _LIMIT_BYTES, "the metrics of a run")
    except DataError as error:
        run.missing[path.name] = f"found {error.found}, expected {error.expected}"
        return []
    lines = []
    for line in content.decode("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut short when the process ended
        if isinstance(record, dict):
            lines.append(record)
    return lines
