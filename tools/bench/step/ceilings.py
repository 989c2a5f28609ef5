"""What the machine does at best: matrix products of the model's shape, and the memory's rate. A worker of its own.

    cd tools && python -m bench.step.ceilings '{"tokens": 256, "width": 768, "elements": 33554432, "seconds": 0.2}'

Each line on standard input asks for one round.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from bench.step.worker import reply_channel, send

_REPEATS = 3  # within a round; the fastest counts, since a ceiling is what can be reached


def rate(run: Callable[[], object], work: float, at_least_seconds: float) -> float:
    """Best of a few repeats that last so long, in units of ``work`` per second."""
    run()
    best = 0.0
    for _ in range(_REPEATS):
        count, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < at_least_seconds or count == 0:
            run()
            count += 1
        best = max(best, count * work / seconds)
    return best


class Ceilings:
    """``tokens`` of a step times the block's widest product, width to 4 x width; triad on arrays of ``elements``."""

    def __init__(self, tokens: int, width: int, elements: int, seconds: float) -> None:
        import torch

        self._torch, self._seconds = torch, seconds
        self._operands = {
            name: (torch.randn(tokens, width, dtype=dtype), torch.randn(4 * width, width, dtype=dtype))
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        }
        self._flops = 2.0 * tokens * width * 4 * width
        self._arrays = [torch.ones(elements) for _ in range(3)]

    def round(self) -> dict[str, float]:
        """flop/s of both precisions, and bytes/s of a = b + s * c, counted as STREAM does: two reads and a write."""
        linear = self._torch.nn.functional.linear
        found = {
            f"matmul_{name}_flops": rate(
                lambda data=data, weight=weight: linear(data, weight), self._flops, self._seconds
            )  # type: ignore[misc]
            for name, (data, weight) in self._operands.items()
        }
        a, b, c = self._arrays
        triad = rate(lambda: self._torch.add(b, c, alpha=2.0, out=a), 12.0 * a.numel(), self._seconds)
        return {**found, "memory_bytes_per_s": triad}


def main() -> None:
    channel = reply_channel()
    ceilings = Ceilings(**json.loads(sys.argv[1]))
    send(channel, {})
    for _ in sys.stdin:
        send(channel, ceilings.round())


if __name__ == "__main__":
    main()
