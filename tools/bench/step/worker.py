"""A case's own process: it takes steps on command and tells what they took. Between commands it sleeps in a read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol, TextIO

from bench.step.training import Work, timed_steps

from angelptm.memory import peak_rss_bytes


class Trained(Protocol):
    """One case, ready for its first step."""

    def step(self) -> float:
        """Takes one step; returns its loss."""

    def drain(self) -> None:
        """Waits for what the steps left under way."""

    def facts(self) -> dict[str, Any]:
        """What does not change over the steps."""

    def counters(self) -> dict[str, Any]:
        """What grows: nested dicts of numbers."""

    def close(self) -> None: ...


def reply_channel() -> TextIO:
    """Standard output, for replies alone: whatever libraries print from here on goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def serve(trained: Trained, channel: TextIO) -> None:
    """Answers ``{"steps": n}`` until standard input ends."""
    try:
        send(channel, {"facts": trained.facts(), "peak_rss_bytes": peak_rss_bytes()})
        for line in sys.stdin:
            io_before, before = process_io(), trained.counters()
            block, seconds, losses = timed_steps(trained, json.loads(line)["steps"])
            io_after = process_io()
            send(
                channel,
                {
                    "seconds": block,
                    "step_seconds": seconds,
                    "losses": losses,
                    "counters": difference(trained.counters(), before),
                    "process_io": {key: io_after[key] - io_before[key] for key in io_after},
                    "peak_rss_bytes": peak_rss_bytes(),
                    "facts": trained.facts(),
                },
            )
    finally:
        trained.close()


def send(channel: TextIO, reply: dict[str, Any]) -> None:
    channel.write(json.dumps(reply) + "\n")
    channel.flush()


def difference(after: Any, before: Any) -> Any:
    if isinstance(after, dict):
        return {key: difference(after[key], before[key]) for key in after}
    return after - before


def process_io() -> dict[str, int]:
    """Bytes that this process had read from and written to drives, as the kernel counts them."""
    try:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return {"read": 0, "written": 0}
    return {"read": int(lines["read_bytes"]), "written": int(lines["write_bytes"])}


def main() -> None:
    channel = reply_channel()
    case = json.loads(sys.argv[1])
    work, folder = Work(**case["work"]), Path(case["folder"])
    if case["kind"] == "paged":
        from bench.step.paged import Paged as Kind
    else:
        from bench.step.resident import Resident as Kind  # type: ignore[assignment]
    serve(Kind(work, folder, case["clip"], case["config"]), channel)


if __name__ == "__main__":
    main()
