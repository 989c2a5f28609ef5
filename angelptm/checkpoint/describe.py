"""What there is to say about commits without reading a page: plain values, for tables and for programs."""

from __future__ import annotations

from typing import Any

import numpy as np

from angelptm.checkpoint.folder import CheckpointFolder
from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.records import EXTENT_BYTES, NONE, Array, Kind, content_bytes
from angelptm.errors import AngelPTMError


def stored_bytes(manifest: Manifest) -> int:
    """Bytes of all pages in slot files, which is what reading the commit reads."""
    return int(_extents(manifest).sum())


def list_commits(folder: CheckpointFolder) -> list[dict[str, Any]]:
    """One entry for each commit, oldest first; what is wrong with a manifest is its ``error``, None otherwise."""
    found = []
    for step in folder.commits():
        entry: dict[str, Any] = {"step": step}
        try:
            manifest = folder.load(step)
        except (AngelPTMError, OSError) as error:
            found.append({**entry, "error": str(error)})
            continue
        header = manifest.header
        found.append(
            {
                **entry,
                "created": header.created,
                "pages": len(manifest.pages),
                "stored_bytes": stored_bytes(manifest),
                "files": [file.name for file in header.files],
                "format_version": header.format_version,
                "package_version": header.package_version,
                "error": None,
            }
        )
    return found


def describe_commit(manifest: Manifest) -> dict[str, Any]:
    """The facts of a header and of the page records. Sizes are bytes."""
    header, pages = manifest.header, manifest.pages
    extents = _extents(manifest)
    params = [param for unit in header.units for param in unit.params]
    counters = [header.optimizer.steps.get(param.name, 0) for param in params if param.trainable]
    kinds = {}
    for kind in Kind:
        chosen = pages["kind"] == kind
        if chosen.any():
            kinds[kind.name] = {
                "pages": int(chosen.sum()),
                "never_written_pages": int((chosen & (pages["file"] == NONE)).sum()),
                "stored_bytes": int(extents[chosen].sum()),
            }
    return {
        "step": header.step,
        "created": header.created,
        "format_version": header.format_version,
        "package_version": header.package_version,
        "config_hash": header.config_hash,
        "store_id": header.store_id,
        "precision": header.precision,
        "page_bytes": header.page_bytes,
        "model_type": (header.model or {}).get("model_type"),
        "units": len(header.units),
        "parameters": len(params),
        "parameter_elements": sum(param.numel for param in params),
        "trainable_elements": sum(param.numel for param in params if param.trainable),
        "buffers": len(header.buffers),
        "optimizer": header.optimizer.type,
        "groups": [
            {"parameters": len(group.params), "options": dict(group.options)} for group in header.optimizer.groups
        ],
        "counters": {"min": min(counters, default=0), "max": max(counters, default=0)},
        "scheduler": header.scheduler,
        "data": header.data,
        "client": header.client,
        "random_generators": header.rng is not None,
        "kinds": kinds,
        "stored_bytes": int(extents.sum()),
        "files": [
            {
                "name": file.name,
                "slot_count": file.slot_count,
                "used_slots": int((pages["file"] == index).sum()),
            }
            for index, file in enumerate(header.files)
        ],
    }


def list_params(manifest: Manifest) -> list[dict[str, Any]]:
    """One entry for each parameter, in order of units."""
    steps = manifest.header.optimizer.steps
    return [
        {
            "name": param.name,
            "shape": list(param.shape),
            "elements": param.numel,
            "trainable": param.trainable,
            "unit": unit.name,
            "names": [f"{module}.{attribute}" if module else attribute for module, attribute in param.owners],
            "updates": steps.get(param.name, 0) if param.trainable else None,
        }
        for unit in manifest.header.units
        for param in unit.params
    ]


def _extents(manifest: Manifest) -> Array:
    """(pages,) int64: what each page takes in its slot; 0 for one that was never written."""
    content = content_bytes(manifest.pages).astype(np.int64)
    rounded: Array = -(-content // EXTENT_BYTES) * EXTENT_BYTES
    return np.where(manifest.pages["file"] == NONE, 0, rounded)
