"""Which gradients each update took and which parameters each step computed with: a file, to do the same again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from angelptm.errors import ConfigError

_FORMAT = "angelptm update events"
_MOST_BYTES = 2**30


class UpdateEvents:
    """``takes[span]``: the gradients of its updates, one after the other; ``uses[span]``: how many updates were
    published before each use. Spans are numbered through the units, of which ``spans_of_units`` has the counts."""

    def __init__(self, path: Path, spans_of_units: Sequence[int]) -> None:
        self.path = path
        self.spans_of_units = list(spans_of_units)
        self.takes: list[list[int]] = []
        self.uses: list[list[int]] = []

    def save(self) -> None:
        """Raises OSError. The file is whole or not there."""
        content = {"format": _FORMAT, "version": 1, "spans_of_units": self.spans_of_units}
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({**content, "takes": self.takes, "uses": self.uses}), encoding="utf-8")
        os.replace(unfinished, self.path)

    @classmethod
    def load(cls, path: Path, spans_of_units: Sequence[int]) -> UpdateEvents:
        """Raises ConfigError for a file of anything else, or of a model or page size with other spans."""
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError("it is larger than 1 GiB")
            content = json.loads(path.read_text(encoding="utf-8"))
            events = cls(path, _counts(content["spans_of_units"]))
            if content["format"] != _FORMAT or content["version"] != 1:
                raise ValueError("another format")
            events.takes = [_counts(span) for span in content["takes"]]
            events.uses = [_counts(span) for span in content["uses"]]
            if not len(events.takes) == len(events.uses) == sum(events.spans_of_units):
                raise ValueError("it does not have an entry for each span")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError("update.replay", str(path), f"a file that update.record made ({error})") from error
        if events.spans_of_units != list(spans_of_units):
            raise ConfigError(
                "update.replay",
                str(path),
                f"the events of {len(spans_of_units)} units of {sum(spans_of_units)} spans",
                "Replay with the model, precision and page_size that were recorded.",
            )
        return events


def _counts(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(one, int) and 0 <= one < 2**32 for one in values):
        raise ValueError("a list of counts is expected")
    return values
