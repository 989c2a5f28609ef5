"""For all tests."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# Programs that are started in the background of a shell inherit that interrupts are ignored, and so would those that
# tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Beside a second worker, two threads of torch wait for each other's core more than they compute. For the programs that
# tests start, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, so that a failure is the change's own. HYPOTHESIS_PROFILE=search draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
