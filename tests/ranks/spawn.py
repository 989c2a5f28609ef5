"""Runs a function of the tests in several processes that torch.distributed joins, as torchrun would start them."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 240


class RanksFailed(AssertionError):
    """Processes that did not end well; ``codes`` are their exit codes, ``texts`` what they wrote."""

    def __init__(self, codes: list[int | None], texts: list[str]) -> None:
        self.codes, self.texts = codes, texts
        shown = "\n".join(
            f"--- rank {rank}, exit code {code}\n{text}" for rank, (code, text) in enumerate(zip(codes, texts))
        )
        super().__init__(shown)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def start_ranks(
    count: int, folder: Path, act: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """``act``, a function of a module of the tests, in ``count`` processes; what each returns goes to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "call").write_bytes(pickle.dumps((act.__module__, act.__name__, args)))
    port = str(free_port())
    processes = []
    for rank in range(count):
        own = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **(environment or {}),
        }
        with open(folder / f"output-{rank}", "wb") as output:
            command = [sys.executable, "-m", "tests.ranks.spawn", str(folder)]
            processes.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
    return processes


def wait_for_ranks(processes: list[subprocess.Popen[bytes]], folder: Path, seconds: float = _SECONDS) -> list[Any]:
    """What each returned. Raises RanksFailed where one ended otherwise, or not in time."""
    deadline = time.monotonic() + seconds
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
            process.kill()
            process.wait()
    if any(codes):
        raise RanksFailed(codes, [(folder / f"output-{rank}").read_text() for rank in range(len(codes))])
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(len(codes))]


def run_ranks(count: int, folder: Path, act: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    return wait_for_ranks(start_ranks(count, folder, act, *args, **options), folder)


def _main(folder: Path) -> None:
    import importlib

    module, name, args = pickle.loads((folder / "call").read_bytes())
    result = getattr(importlib.import_module(module), name)(*args)
    (folder / f"result-{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
