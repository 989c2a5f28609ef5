"""Which cases: every operation around one commit, every write inside it, and random ones over the whole run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from crash.case import Case, Reference
from crash.variants import STEPS
from crash.watch import Kill

MIDDLE = STEPS // 2
"""The commit around which every moment is tried; every variant makes one then."""


def operations_of_commit(reference: Reference, step: int) -> range:
    """Numbers of the metadata operations from a manifest's first write until its predecessor is retired."""
    manifest = f"step-{step:012}.manifest"
    first = next(index for index, name in enumerate(reference.operations) if manifest in name)
    later = [index for index, name in enumerate(reference.operations) if index > first and name.startswith("write ")]
    return range(first + 1, next((index for index in later if manifest not in reference.operations[index]), 0) + 1)


def writes_of_commit(reference: Reference, step: int) -> range:
    """Numbers of the native writes and syncs between the call for a commit and the call for the next one."""
    following = min(one for one in reference.commit_writes if one > step)
    return range(reference.commit_writes[step] + 1, reference.commit_writes[following] + 1)


def around_a_commit(variant: str, power_cut: bool, reference: Reference, seed: int, step: int) -> Iterator[Case]:
    """A kill before and one after each metadata operation of a commit and of the retirement of the one before."""
    for number in operations_of_commit(reference, step):
        for after in (False, True):
            yield Case(variant, power_cut, seed + number, (Kill("name", number, after),))


def at_both_ends(variant: str, power_cut: bool, reference: Reference, seed: int) -> Iterator[Case]:
    """The same for every operation before the first commit and after the last."""
    manifests = [index for index, name in enumerate(reference.operations) if ".manifest" in name]
    for number in [*range(1, manifests[0] + 1), *range(manifests[-1] + 1, len(reference.operations) + 1)]:
        for after in (False, True):
            yield Case(variant, power_cut, seed + number, (Kill("name", number, after),))


def inside_a_commit(variant: str, power_cut: bool, reference: Reference, seed: int, step: int) -> Iterator[Case]:
    """A kill at each native write and sync from one commit's beginning to the next one's."""
    for number in writes_of_commit(reference, step):
        yield Case(variant, power_cut, seed + number, (Kill("write", number),))


def at_random(references: dict[str, Reference], power_cut: bool, seed: int, count: int) -> Iterator[Case]:
    """All variants in turn. Every third run is killed again while it resumes, up to three times."""
    names: Sequence[str] = list(references)
    for index in range(count):
        generator = random.Random(f"{seed} {index} {power_cut}")
        variant = names[index % len(names)]
        kills = [_random_kill(references[variant], generator)]
        if index % 3 == 0:
            kills += [_random_kill(references[variant], generator) for _ in range(generator.randint(1, 3))]
        yield Case(variant, power_cut, generator.randrange(10**6), tuple(kills))


def _random_kill(reference: Reference, generator: random.Random) -> Kill:
    how = generator.choice(("timer", "timer", "write", "name"))
    if how == "timer":
        return Kill("timer", round(generator.uniform(0, reference.seconds * 1.05), 3))
    if how == "write":
        return Kill("write", generator.randint(1, reference.writes))
    return Kill("name", generator.randint(1, len(reference.operations)), generator.random() < 0.5)
