"""How near the AdamW kernel comes to the memory's own speed, and to torch's fused AdamW.

    python tools/bench/kernels.py [--small] [--json] [--elements N] [--rounds N]

For each pair of gradient and parameter dtype, and for one and for all threads, every round runs in turn, on the same
arrays:

* ``step``: the kernel, publishing the parameters in the same pass;
* ``ceiling``: a loop that reads and writes the same arrays, with one addition for arithmetic (csrc/kernels/ceiling.h),
  once with ordinary stores to the parameters and once with stores past the cache. The faster of the two counts;
* ``torch fused``: torch's fused AdamW, float32 gradient, alone (it then publishes nothing but its master weights), and
  followed by a separate bf16 copy.

A byte is counted once for each time that an array must be read or written: AdamW reads master, both moments and the
gradient, and writes master, both moments and the parameters. Medians of the rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import angelptm_native as native
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from angelptm import kernels
from io_engine.machine import source_commit

BF16, F32 = native.DType.BF16, native.DType.F32
ITEMSIZE = {F32: 4, BF16: 2}
NAME = {F32: "fp32", BF16: "bf16"}
# torch's OpenMP threads go on spinning for a while after its kernel and take a core from whatever runs next: without
# the pause, two threads of the kernel that follows torch came out at 0.6 to 0.8 of the ceiling, and with it at 1.0.
_SETTLE_SECONDS = 0.25

CASES = [(F32, BF16), (BF16, BF16), (F32, F32), (BF16, F32)]  # gradient, parameters
HUGE_PAGE_BYTES = 2 << 20
CACHE_LINE_ELEMENTS = 32  # of bfloat16, so that every thread's part of every array starts on a line of 64 bytes


@dataclass(frozen=True)
class Result:
    """One row. ``ratio``: median rate over the median rate of this case's ceiling, both of the same bytes."""

    what: str
    grad: str
    param: str
    threads: int
    bytes: int
    median_seconds: float
    min_seconds: float
    max_seconds: float
    bytes_per_s: float
    ratio: float


class Arrays:
    """One span of states, with a gradient and parameters in both dtypes; numpy asks for huge pages by itself."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.count = count
        self.master = _aligned(count, np.float32)
        self.master[:] = rng.standard_normal(count, np.float32)
        self.exp_avg = _aligned(count, np.float32)
        self.exp_avg_sq = _aligned(count, np.float32)
        self.grads = {F32: _aligned(count, np.float32), BF16: _aligned(count, np.uint16)}
        self.params = {F32: _aligned(count, np.float32), BF16: _aligned(count, np.uint16)}
        self.refill()

    def refill(self) -> None:
        """Puts ordinary values back: the ceiling adds without end, and denormals or infinities would cost time."""
        self.exp_avg[:] = 1e-3
        self.exp_avg_sq[:] = 1e-6
        self.grads[F32][:] = 1e-3
        self.grads[BF16][:] = 0x3A83  # 1e-3


def _aligned(count: int, dtype: type) -> np.ndarray:
    """Zeros on a boundary of a huge page, every page touched.

    The huge page that is spent on aligning also keeps arrays of 128 MiB from lying 2^27 + 2^12 bytes apart, as malloc
    would place them: to the way predictor of AMD's L1 cache, which folds bit 27 of an address onto bit 12, all streams
    would then be one, and every loop here, the ceiling too, ran at 55 % of its speed.
    """
    nbytes = count * np.dtype(dtype).itemsize
    room = np.empty(nbytes + HUGE_PAGE_BYTES, np.uint8)
    start = -room.ctypes.data % HUGE_PAGE_BYTES
    array = room[start : start + nbytes].view(dtype)
    array[:] = 0
    return array


class Threads:
    """Runs ``part(begin, end)`` over the elements, cut in equal parts; the kernels release the GIL."""

    def __init__(self, count: int, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)
        cuts = [count * i // threads // CACHE_LINE_ELEMENTS * CACHE_LINE_ELEMENTS for i in range(threads)] + [count]
        self.parts = list(itertools.pairwise(cuts))
        list(self.pool.map(lambda _: time.sleep(0.001), range(threads)))  # Starts the threads.

    def __call__(self, part: Callable[[int, int], None]) -> None:
        if self.threads == 1:
            part(*self.parts[0])
            return
        for future in [self.pool.submit(part, *bounds) for bounds in self.parts]:
            future.result()


def kernel_runs(arrays: Arrays, threads: Threads, grad: native.DType, param: native.DType) -> dict[str, Callable]:
    hyper = kernels.adamw_hyper(1e-4, weight_decay=0.01, step=100)

    def addresses(begin: int) -> tuple[int, int, int, int, native.DType, int, native.DType]:
        return (
            arrays.master.ctypes.data + 4 * begin,
            arrays.exp_avg.ctypes.data + 4 * begin,
            arrays.exp_avg_sq.ctypes.data + 4 * begin,
            arrays.grads[grad].ctypes.data + ITEMSIZE[grad] * begin,
            grad,
            arrays.params[param].ctypes.data + ITEMSIZE[param] * begin,
            param,
        )

    return {
        "step": lambda: threads(lambda begin, end: native.step(hyper, *addresses(begin), end - begin)),
        "ceiling, stores": lambda: threads(
            lambda begin, end: native.memory_ceiling(*addresses(begin), end - begin, False)
        ),
        "ceiling, past cache": lambda: threads(
            lambda begin, end: native.memory_ceiling(*addresses(begin), end - begin, True)
        ),
    }


def torch_runs(arrays: Arrays) -> dict[str, Callable]:
    states = [torch.from_numpy(array) for array in (arrays.master, arrays.exp_avg, arrays.exp_avg_sq)]
    master, exp_avg, exp_avg_sq = states
    grad = torch.from_numpy(arrays.grads[F32])
    published = torch.from_numpy(arrays.params[BF16].view(np.int16)).view(torch.bfloat16)
    steps = torch.tensor(100.0)

    def fused() -> None:
        torch._fused_adamw_(
            [master],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [steps],
            lr=1e-4,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.01,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    def fused_and_copy() -> None:
        fused()
        published.copy_(master)

    return {"torch fused": fused, "torch fused + bf16 copy": fused_and_copy}


def measure(count: int, rounds: int, thread_counts: list[int], console: Console) -> list[Result]:
    arrays = Arrays(count)
    results = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        team = Threads(count, threads)
        for grad, param in CASES:
            console.print(f"{NAME[grad]} gradient, {NAME[param]} parameters, {threads} thread(s) ...", style="dim")
            runs = kernel_runs(arrays, team, grad, param)
            if (grad, param) == CASES[0]:
                runs |= torch_runs(arrays)
            results += _case(arrays, runs, grad, param, threads, rounds)
    return results


def _case(
    arrays: Arrays, runs: dict[str, Callable], grad: native.DType, param: native.DType, threads: int, rounds: int
) -> list[Result]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # The first warms up and is dropped.
        arrays.refill()
        names = list(runs)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # Nobody always follows the same.
            time.sleep(_SETTLE_SECONDS)
            begin = time.perf_counter()
            runs[name]()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    step_bytes = arrays.count * (6 * 4 + ITEMSIZE[grad] + ITEMSIZE[param])
    # torch alone publishes nothing, and its copy reads master once more; both are rated by the bytes of the task.
    task_bytes = dict.fromkeys(runs, step_bytes) | {"torch fused": arrays.count * (6 * 4 + ITEMSIZE[grad])}
    rates = {name: task_bytes[name] / statistics.median(seconds[name]) for name in runs}
    ceiling = max(rates["ceiling, stores"], rates["ceiling, past cache"])
    return [
        Result(
            what=name,
            grad=NAME[grad],
            param=NAME[param] if name != "torch fused" else "none",
            threads=threads,
            bytes=task_bytes[name],
            median_seconds=statistics.median(seconds[name]),
            min_seconds=min(seconds[name]),
            max_seconds=max(seconds[name]),
            bytes_per_s=rates[name],
            ratio=rates[name] / ceiling,
        )
        for name in runs
    ]


def machine() -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": len(names) or 1,
        "isa": native.isa_name(native.isa_in_use()),
        "torch": torch.__version__,
        "commit": source_commit(Path(__file__).parent),
    }


def show(results: list[Result], count: int, rounds: int, console: Console) -> None:
    about = machine()
    table = Table(
        title=f"AdamW, {count / 2**20:g} Mi elements, {rounds} rounds; {about['cpu']} ({about['cpus']} CPUs), "
        f"{about['isa']}, commit {about['commit']}"
    )
    for heading in ("threads", "gradient", "parameters", "what"):
        table.add_column(heading)
    for heading in ("median ms", "min", "max", "GB/s", "of ceiling"):
        table.add_column(heading, justify="right")
    for previous, row in zip([None, *results], results, strict=False):
        if previous and (previous.threads, previous.grad) != (row.threads, row.grad):
            table.add_section()
        times = [f"{1e3 * value:.1f}" for value in (row.median_seconds, row.min_seconds, row.max_seconds)]
        rate = [f"{row.bytes_per_s / 1e9:.1f}", f"{100 * row.ratio:.0f} %"]
        table.add_row(str(row.threads), row.grad, row.param, row.what, *times, *rate)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=32 << 20, help="of each array (default: 32 Mi)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--small", action="store_true", help="256 Ki elements, 2 rounds: does it run at all")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output instead of the table")
    options = parser.parse_args(arguments)
    count, rounds = (256 << 10, 2) if options.small else (options.elements, options.rounds)
    console = Console(stderr=True)
    all_threads = torch.get_num_threads()
    results = measure(count, rounds, sorted({1, all_threads}), console)
    if options.json:
        rows = [asdict(row) for row in results]
        print(json.dumps({"machine": machine(), "elements": count, "rounds": rounds, "results": rows}))
    else:
        show(results, count, rounds, Console())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
