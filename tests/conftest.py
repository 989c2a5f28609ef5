"""For all tests."""

from __future__ import annotations

import signal

# Programs that are started in the background of a shell inherit that interrupts are ignored, and so would those that
# tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
