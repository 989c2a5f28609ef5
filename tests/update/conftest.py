"""Each backend of this host in turn."""

from __future__ import annotations

from ..pages.conftest import backend

__all__ = ["backend"]
