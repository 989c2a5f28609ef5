"""The table's runs: those that a file has already, and those that are missing, each kept as soon as it is over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.convergence.pace import Pace


class OtherSettings(Exception):
    """The file has runs that are not to be compared with the ones asked for."""


class Runs:
    """``all``: every run so far, as it was told; ``pace``: what was measured of the modes' own pace, or None. ``path``
    None keeps them in memory alone."""

    def __init__(self, settings: dict[str, Any], path: Path | None) -> None:
        """Raises OtherSettings, naming them."""
        self.settings, self._path = settings, path
        self.all: list[dict[str, Any]] = []
        self.pace: Pace | None = None
        if path is None or not path.exists():
            return
        found = json.loads(path.read_text())
        if differing := {key for key in settings if found["settings"].get(key) != settings[key]}:
            said = ", ".join(f"{key} {found['settings'].get(key)}, not {settings[key]}" for key in sorted(differing))
            raise OtherSettings(f"{path} is of {said}: name another file, or remove it")
        self.all = found["runs"]
        self.pace = Pace(**found["pace"]) if found.get("pace") else None

    def missing(self, modes: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """(mode, seed) of the runs that are still to be made, in their order: all modes of a seed one after the other,
        beginning one further with each seed, so that no mode has the machine's early hours in every seed."""
        there = {(run["mode"], run["seed"]) for run in self.all}
        return [one for one in _rotated(modes, seeds) if one not in there]

    def of(self, modes: Sequence[str]) -> list[dict[str, Any]]:
        return [run for run in self.all if run["mode"] in modes]

    def write(self, others: dict[str, Any]) -> None:
        """Replaces the file: whatever happens meanwhile, it is the former one or all of the new. ``others`` goes
        beside all runs."""
        if self._path is None:
            return
        beside = self._path.with_name(self._path.name + ".new")
        with beside.open("w") as file:
            file.write(json.dumps(self.content(others), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path)

    def content(self, others: dict[str, Any]) -> dict[str, Any]:
        pace = None if self.pace is None else asdict(self.pace)
        return {"settings": self.settings, **others, "pace": pace, "runs": self.all}


def _rotated(modes: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    for seed in seeds:
        first = (seed - 1) % len(modes)
        for mode in [*modes[first:], *modes[:first]]:
            yield mode, seed
