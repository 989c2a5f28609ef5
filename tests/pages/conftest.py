"""Each backend of this host in turn."""

from __future__ import annotations

from pathlib import Path

import angelptm_native as native
import pytest

from .pool import BACKENDS, works


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name.lower())
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> native.Backend:
    folder = tmp_path / "probe"
    folder.mkdir()
    if not works(request.param, folder):
        pytest.skip(f"{request.param.name.lower()} does not work on this host")
    return request.param
