"""Runs a function of the tests in several processes that torch.distributed joins, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_SECONDS = 240
# What takes seconds to import is imported once, in a process that the ranks are forked from.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ranks.work"])
_stores: list[Any] = []  # of this process, for as long as it lives


class RanksFailed(AssertionError):
    """Processes that did not end well: their exit codes, None where one had to be killed, and what they wrote."""

    def __init__(self, codes: list[int | None], texts: list[str]) -> None:
        told = zip(codes, texts)
        super().__init__("\n".join(f"--- rank {rank}: {code}\n{text}" for rank, (code, text) in enumerate(told)))


def start_ranks(count: int, folder: Path, act: Callable[..., Any], *args: Any) -> list[ForkServerProcess]:
    """``act`` in ``count`` processes; what each returns and writes goes to files in ``folder``."""
    from torch.distributed import TCPStore

    folder.mkdir(parents=True, exist_ok=True)
    # As torchrun's agent has it: it outlives every rank.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)
    port, processes = store.port, []
    for rank in range(count):
        process = _CONTEXT.Process(target=_be_rank, args=(rank, count, port, folder, act, args))
        process.start()
        processes.append(process)
    return processes


def wait_for_ranks(processes: list[ForkServerProcess], folder: Path, seconds: float = _SECONDS) -> list[Any]:
    """What each returned. Raises RanksFailed where one ended otherwise, or not in time."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    if any(code != 0 for code in codes):
        raise RanksFailed(codes, [(folder / f"output-{rank}").read_text() for rank in range(len(codes))])
    return [result_of(folder, rank) for rank in range(len(codes))]


def result_of(folder: Path, rank: int) -> Any:
    return pickle.loads((folder / f"result-{rank}").read_bytes())


def run_ranks(count: int, folder: Path, act: Callable[..., Any], *args: Any) -> list[Any]:
    return wait_for_ranks(start_ranks(count, folder, act, *args), folder)


def _be_rank(rank: int, count: int, port: int, folder: Path, act: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    with open(folder / f"output-{rank}", "wb", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    numbers = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(act(*args)))
    sys.stdout.flush()
