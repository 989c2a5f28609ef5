"""Names on the command line: of update modes, of formats of moments with sync, and of a library's 8-bit AdamW."""

from __future__ import annotations

import re
from typing import Any

LIBRARY_MODE = "torchao-int8"
DEFAULT_MODES = ("sync", "bounded-1", "bounded-4", "lock-free")
_NAME = re.compile(
    rf"{LIBRARY_MODE}|sync(?:-(?P<moments>bf16|int8|nudged))?|(?:bounded-(?P<bound>\d+)|lock-free)(?P<sum>-sum)?"
)


def state_keys(name: str) -> dict[str, Any]:
    """The config's ``optimizer.states`` section: both moments in the format that the name ends with."""
    moments = _match(name)["moments"]
    return {"exp_avg": moments, "exp_avg_sq": moments} if moments in ("bf16", "int8") else {}


def lr_factor(name: str) -> float:
    """``sync-nudged`` is sync with a learning rate that differs by a thousandth, about as much as rounding moments to
    bf16 changes updates: how far two runs come apart that differ by nothing that matters is what every other difference
    is to be held against."""
    return 1 + 1e-3 if name == "sync-nudged" else 1.0


def update_keys(name: str) -> dict[str, Any]:
    """The config's ``update`` section for ``sync``, ``bounded-K`` or ``lock-free``; the last two with ``-sum`` apply
    the sum of gradients that have gathered instead of their mean. Raises ValueError for another name."""
    match = _match(name)
    if name == LIBRARY_MODE or name.startswith("sync"):
        return {"mode": "sync"}
    gradients = {"gradients": "sum" if match["sum"] else "mean"}
    if match["bound"] is None:
        return {"mode": "lock_free", **gradients}
    return {"mode": "bounded", "max_staleness": int(match["bound"]), **gradients}


def _match(name: str) -> re.Match[str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is not a mode: sync, sync-bf16, sync-int8, sync-nudged, {LIBRARY_MODE}, bounded-K, "
            "lock-free, bounded-K-sum, lock-free-sum"
        )
    return match
