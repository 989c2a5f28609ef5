"""The harness can fail: a parser with a defect is caught, for every target and every kind of defect."""

from __future__ import annotations

import mmap
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from angelptm.errors import AngelPTMError, CheckpointError, DataError

from .campaign import run_campaign
from .guard import Guard
from .mutations import Files, Link, mutated
from .targets import TARGETS, Content, Megatron, Target


class Broken(Target):
    """A target whose parser has a defect, but not for its seeds."""

    def __init__(self, target: Target, defect: Callable[[Path], object]) -> None:
        self.name, self.allowed, self.fields = target.name, target.allowed, target.fields
        self._target, self._defect, self._calls = target, defect, 0

    def seeds(self) -> list[Files]:
        return self._target.seeds()

    def run(self, folder: Path) -> bool:
        self._calls += 1
        if self._calls > len(self.seeds()):
            self._defect(folder)
        return True


def raise_key_error(_: Path) -> None:
    raise KeyError("shape")


def read_outside(folder: Path) -> None:
    (folder.parent / "secret").open().close()


class Unspoken(DataError, CheckpointError):
    """What every target may raise."""

    def __init__(self) -> None:
        AngelPTMError.__init__(self, "unspoken")


def read_outside_and_say_nothing(_: Path) -> None:
    try:
        Path("/etc/passwd").read_bytes()
    except BaseException:
        raise Unspoken from None


def hang(_: Path) -> None:
    while True:
        time.sleep(0.01)


def allocate(_: Path) -> None:
    bytearray(1 << 32)


def map_memory_and_wrap_the_error(_: Path) -> None:
    try:
        mmap.mmap(-1, 1 << 33)
    except OSError as error:
        raise Unspoken from error


def unpickle(_: Path) -> None:
    pickle.loads(pickle.dumps(DataError))


DEFECTS = {
    raise_key_error: "exception",
    read_outside: "escape",
    read_outside_and_say_nothing: "escape",
    hang: "hang",
    allocate: "memory",
    map_memory_and_wrap_the_error: "memory",
    unpickle: "escape",
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_defect_is_caught(target: Target, defect: Callable[[Path], object]) -> None:
    outcome = run_campaign(Broken(target, defect), 1, range(2), deadline_seconds=0.1)
    assert [failure.kind for failure in outcome.failures.values()] == [DEFECTS[defect]] * 2
    assert outcome.accepted == outcome.refused == 0


def test_link_that_leads_outside_is_followed_before_it_is_judged(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "inside").write_text("x")
    (folder / "good").symlink_to("inside")
    (folder / "bad").symlink_to("../secret")
    with Guard(folder) as guard:
        assert guard.run(lambda: bool((folder / "good").read_text()), ()) is True
        found = guard.run(lambda: bool((folder / "bad").read_text()), ())
    assert getattr(found, "kind", None) == "escape"
    assert (tmp_path / "secret").read_text() == "x", "once no input runs, nothing is refused"


def test_inputs_are_a_function_of_seed_and_index_and_differ() -> None:
    target = Megatron()

    def inputs(seed: int) -> list[Files]:
        return [mutated(seed, index, target.seeds(), target.fields, target.links()) for index in range(300)]

    assert inputs(1) == inputs(1)
    assert sum(one == other for one, other in zip(inputs(1), inputs(2))) < 10
    flat = {str(sorted(files.items(), key=str)) for files in inputs(1)}
    assert len(flat) > 280
    assert any(isinstance(content, Link) for files in inputs(1) for content in files.values())


def test_parser_of_bytes_is_a_target_in_a_few_lines() -> None:
    def parse(content: bytes) -> int:
        if not content.isdigit():
            raise DataError("number", "no digits", "digits")
        return int(content)

    target = Content(name="number", parse=parse, content_seeds=lambda: [b"1234"], allowed=(DataError,))
    outcome = run_campaign(target, 1, range(300))
    assert {failure.text.strip().splitlines()[-1][:10] for failure in outcome.failures.values()} <= {"ValueError"}
    assert outcome.accepted > 10
    assert outcome.refused > 10


def test_input_at_fault_is_named_and_repeats() -> None:
    def parse(content: bytes) -> None:
        assert len(content) < 4000, "too long"

    target = Content(name="short", parse=parse, content_seeds=lambda: [b"1234"], allowed=(DataError,))
    first = run_campaign(target, 5, range(400))
    assert first.failures
    index = next(iter(first.failures))
    again = run_campaign(target, 5, [index])
    assert list(again.failures) == [index]
    assert "too long" in again.failures[index].text
