"""Names of update modes on the command line."""

from __future__ import annotations

import re
from typing import Any

DEFAULT_MODES = ("sync", "bounded-1", "bounded-4", "lock-free")
_NAME = re.compile(r"sync|(?:bounded-(?P<bound>\d+)|lock-free)(?P<sum>-sum)?")


def update_keys(name: str) -> dict[str, Any]:
    """The config's ``update`` section for ``sync``, ``bounded-K`` or ``lock-free``; the last two with ``-sum`` apply
    the sum of gradients that have gathered instead of their mean. Raises ValueError for another name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a mode: sync, bounded-K, lock-free, bounded-K-sum, lock-free-sum")
    if name == "sync":
        return {"mode": "sync"}
    gradients = {"gradients": "sum" if match["sum"] else "mean"}
    if match["bound"] is None:
        return {"mode": "lock_free", **gradients}
    return {"mode": "bounded", "max_staleness": int(match["bound"]), **gradients}
