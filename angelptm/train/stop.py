"""Stopping on request: at the end of a step, with a commit, instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked the run to stop (Ctrl-C, or the SIGTERM of a scheduler)."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def stop_on_signals(say: Callable[[str], None], *, enabled: bool) -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM only asks; the second interrupts as it would have done before.

    Does nothing but give a request that nobody makes when not ``enabled``, or on a thread that may not handle signals.
    """
    request = StopRequest()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        if request.asked:
            signal.signal(number, former[signal.Signals(number)])
            signal.raise_signal(number)
            return
        request.asked = True
        del frame
        say("stopping at the end of this step, with a commit; a second signal stops at once")

    for number in former:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
