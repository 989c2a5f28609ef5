"""The PyPI binding, whose wheel may hold instructions that the processor lacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import io_engine
from io_engine import liburing_queue


@pytest.fixture(autouse=True)
def fresh_verdict() -> Iterator[None]:
    liburing_queue.killed_by_first_ring.cache_clear()
    yield
    liburing_queue.killed_by_first_ring.cache_clear()


def test_binding_that_ends_its_process_is_refused_and_the_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liburing")
    monkeypatch.setattr(liburing_queue, "_FIRST_RING", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    found = io_engine.working_backends()
    assert "built for another processor" in found["liburing"]
    assert found["threads"] == found["aiofiles"] == ""


@pytest.mark.parametrize(
    ("script", "verdict"),
    [
        ("import os; os.abort()", "SIGABRT"),
        ("raise SystemExit(1)", None),  # it says so itself, and better
        ("import time; time.sleep(60)", None),
    ],
    ids=["signal", "error", "hangs"],
)
def test_verdict_of_the_first_ring(monkeypatch: pytest.MonkeyPatch, script: str, verdict: str | None) -> None:
    monkeypatch.setattr(liburing_queue, "_FIRST_RING", script)
    monkeypatch.setattr(liburing_queue, "_FIRST_RING_SECONDS", 2.0)
    assert liburing_queue.killed_by_first_ring() == verdict
