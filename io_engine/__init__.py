"""Asynchronous reads and writes of aligned buffers at file offsets, over four interchangeable backends.

::

    buffer = io_engine.AlignedBuffer(4 << 20)
    file = io_engine.open_file("/ssd/pages", create=True, allocate_bytes=1 << 30)
    with io_engine.open([file], backend="auto", depth=8, buffers=[buffer]) as engine:
        ticket = engine.write(0, buffer)
        ticket.wait(deadline_seconds=10)

Every result is read, short transfers are resumed, EINTR and EAGAIN are retried with a bound; anything else is an
``IoError`` in the ticket. Every wait has a deadline.
"""

from io_engine.backends import BACKENDS, working_backends
from io_engine.buffer import AlignedBuffer
from io_engine.driver import Counters
from io_engine.engine import Engine, Ticket, open
from io_engine.errors import IoError
from io_engine.faults import FaultPlan
from io_engine.file import File, open_file

__all__ = [
    "BACKENDS",
    "AlignedBuffer",
    "Counters",
    "Engine",
    "FaultPlan",
    "File",
    "IoError",
    "Ticket",
    "open",
    "open_file",
    "working_backends",
]
