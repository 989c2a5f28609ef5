"""What a parser may do with one input: return, or raise what it says it raises. Anything else is a `Failure`.

It may not take longer than a deadline, ask for more memory than a limit, open a file outside its folder (links
followed), start a process, connect anywhere or unpickle.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

DEADLINE_SECONDS = 5.0
MEMORY_BYTES = 768 * 2**20
"""How much the address space may grow while inputs are run: several times what the largest honest seed needs."""

_FORBIDDEN = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec")
_ROOT = Path(__file__).resolve().parents[2]
_READABLE = tuple(
    f"{os.path.realpath(path)}/"
    for path in ("/proc", "/sys", str(_ROOT), sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())
)
_DEVICES = ("/dev/null", "/dev/urandom")


class Hang(BaseException):
    """The deadline passed. Not an Exception, so that no parser catches it."""


class Escape(BaseException):
    """Something was opened or started that is none of the input's business."""


@dataclass(frozen=True)
class Failure:
    """``kind`` is hang, memory, escape or exception; ``text`` says what happened, with the traceback."""

    kind: str
    text: str


class Guard:
    """Runs inputs one after another; use it as ``with guard: guard.run(...)``. Main thread only, one at a time."""

    def __init__(
        self, folder: Path, deadline_seconds: float = DEADLINE_SECONDS, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._inside = f"{os.path.realpath(folder)}/"
        self._deadline_seconds, self._memory_bytes = deadline_seconds, memory_bytes

    def __enter__(self) -> Guard:
        _install_hook()
        self._handler = signal.signal(signal.SIGALRM, _on_alarm)
        self._timer = signal.setitimer(signal.ITIMER_REAL, 0)
        self._limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space_bytes() + self._memory_bytes, self._limits[1]))
        return self

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._limits)
        signal.signal(signal.SIGALRM, self._handler)
        signal.setitimer(signal.ITIMER_REAL, *self._timer)

    def run(self, parse: Callable[[], bool], allowed: tuple[type[BaseException], ...]) -> bool | Failure:
        """Whether the input was accepted; or how the parser failed. ``parse`` may return False for refused."""
        try:
            with _watched(self._inside), _alarm(self._deadline_seconds):
                accepted = parse()
        except Hang:
            return Failure("hang", f"no answer after {self._deadline_seconds} s\n{traceback.format_exc(limit=-12)}")
        except Escape:
            pass
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if _is_memory(error):
                return Failure("memory", traceback.format_exc(limit=-12))
            if not isinstance(error, allowed):
                return Failure("exception", traceback.format_exc(limit=-12))
            accepted = False
        if _offences:
            return Failure("escape", "\n".join(_offences))
        return accepted


def _is_memory(error: BaseException | None) -> bool:
    """Whether somebody ran out of memory, wherever in the chain: a parser that wraps it has still asked for it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or "allocate memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _on_alarm(_signal: int, _frame: FrameType | None) -> None:
    raise Hang


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# An audit hook stays for the life of the process, so there is one, and it sleeps while no input runs.
_watching: str | None = None
_offences: list[str] = []
_installed = False


@contextmanager
def _watched(inside: str) -> Iterator[None]:
    global _watching
    _offences.clear()
    _watching = inside
    try:
        yield
    finally:
        _watching = None


def _install_hook() -> None:
    global _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    global _watching
    inside = _watching
    if inside is None or (event != "open" and event not in _FORBIDDEN):
        return
    _watching = None  # what follows may raise events of its own
    try:
        if event != "open":
            offence = f"{event} {arguments!r:.200}"
        elif _may_open(arguments[0], arguments[1], inside):
            return
        else:
            offence = f"open {arguments[0]!r} {arguments[1]!r}"
        _offences.append(offence)
        raise Escape(offence)
    finally:
        _watching = inside


def _may_open(path: Any, mode: Any, inside: str) -> bool:
    if isinstance(path, int):
        return True
    real = os.path.realpath(os.fsdecode(path))
    if f"{real}/".startswith(inside) or real in _DEVICES:
        return True
    return real.startswith(_READABLE) and (mode is None or not set("wax+") & set(str(mode)))
