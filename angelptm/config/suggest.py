"""Near spellings for a key or name that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

# What other systems call it → the last part of our key.
_SYNONYMS = {
    "learning_rate": "lr",
    "batch_size": "micro_batch_size",
    "train_batch_size": "micro_batch_size",
    "seq_length": "sequence_length",
    "seq_len": "sequence_length",
    "block_size": "sequence_length",
    "max_steps": "steps",
    "gpu": "device",
    "cuda": "device",
    "cpu": "host",
    "dram": "host",
    "nvme": "ssd",
    "disk": "ssd",
    "nvme_path": "path",
    "num_threads": "threads",
    "thread_count": "threads",
    "max_grad_norm": "gradient_clipping",
    "grad_clip": "gradient_clipping",
    "page_bytes": "page_size",
    "output_dir": "run_dir",
    "dtype": "precision",
    "scheduler": "schedule",
}


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate closest to ``name``: same letters in another case, a known synonym, or a near spelling."""
    known = {candidate.lower(): candidate for candidate in candidates}
    lowered = name.lower().replace("-", "_")
    for exact in (lowered, _SYNONYMS.get(lowered)):
        if exact in known:
            return known[exact]
    close = difflib.get_close_matches(lowered, known, n=1, cutoff=0.6)
    return known[close[0]] if close else None


def nearest_key(name: str, siblings: Iterable[str], keys_by_path: Mapping[str, str]) -> str | None:
    """The key that ``name`` probably means: a near sibling, else a key of that name elsewhere.

    keys_by_path: dotted path → its last part, for every key there is.
    """
    sibling = nearest(name, siblings)
    if sibling is not None:
        return sibling
    wanted = {name.lower(), _SYNONYMS.get(name.lower(), name.lower())}
    return next((path for path, last in keys_by_path.items() if last in wanted), None)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A sentence for an error's remedy, empty when nothing is near."""
    found = nearest(name, candidates)
    return f"Did you mean {found!r}?" if found is not None else ""
