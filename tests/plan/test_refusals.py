"""What a refusal advises: each of its remedies, followed to the letter, leads to a plan that fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from angelptm.errors import CapacityError
from angelptm.plan import Budgets, CommitBudget, SsdBudget, SweepBudget
from angelptm.sizes import parse_bytes
from angelptm.states.formats import StateFormats

from .test_budget import FREE, PAGE, Case, budgets_of, cases, linear

ROUNDS = 3
Step = Callable[[Budgets, CapacityError, "re.Match[str]"], Budgets]


def changed(budgets: Budgets, changes: Mapping[str, Any]) -> Budgets:
    return replace(budgets, **changes)


def with_tier(budgets: Budgets, _error: CapacityError, match: re.Match[str]) -> Budgets:
    return changed(budgets, {f"{match[1]}_bytes": parse_bytes(match[2])})


def with_placement(budgets: Budgets, _error: CapacityError, match: re.Match[str]) -> Budgets:
    return changed(budgets, {name.removeprefix("placement."): "auto" for name in match[1].split(" and ")})


def without_ssd_homes(budgets: Budgets, instead: str = "auto") -> Budgets:
    homes = {name: getattr(budgets, name) for name in ("param", "grad", "states")}
    on_ssd = [name for name, home in homes.items() if home == "ssd" or (isinstance(home, float) and home < 1)]
    return changed(budgets, dict.fromkeys(on_ssd, instead))


def with_folder(budgets: Budgets, _error: CapacityError, _match: re.Match[str]) -> Budgets:
    return replace(budgets, ssd=(*budgets.ssd, SsdBudget("new", None, FREE)))


def with_space(budgets: Budgets, error: CapacityError, _match: re.Match[str]) -> Budgets:
    """On each disk as much as lacks on all together."""

    def freed(folder: SsdBudget) -> SsdBudget:
        return replace(folder, free_bytes=folder.free_bytes + error.needed_bytes - error.available_bytes)

    commits = budgets.commits and replace(budgets.commits, folder=freed(budgets.commits.folder))
    return replace(budgets, ssd=tuple(freed(folder) for folder in budgets.ssd), commits=commits)


def with_sizes(budgets: Budgets, _error: CapacityError, match: re.Match[str]) -> Budgets:
    """In parts that are no whole pages, as equal as the disks permit."""
    left = parse_bytes(match[1])
    count = sum(folder.size_bytes is not None for folder in budgets.ssd)
    sizes = [0] * len(budgets.ssd)
    for part in (left // count + PAGE // 3, left):
        for index, folder in enumerate(budgets.ssd):
            if folder.size_bytes is not None:
                more = min(part, folder.free_bytes - sizes[index], left)
                sizes[index], left = sizes[index] + more, left - more
    assert left == 0, "the disks have so much"
    ssd = [
        replace(folder, size_bytes=size) if folder.size_bytes else folder for folder, size in zip(budgets.ssd, sizes)
    ]
    return replace(budgets, ssd=tuple(ssd))


def with_space_for_sizes(budgets: Budgets, error: CapacityError, match: re.Match[str]) -> Budgets:
    ssd = [replace(folder, free_bytes=max(folder.free_bytes, parse_bytes(match[1]))) for folder in budgets.ssd]
    return with_sizes(replace(budgets, ssd=tuple(ssd)), error, match)


def with_smaller_sizes(budgets: Budgets, _error: CapacityError, _match: re.Match[str]) -> Budgets:
    ssd = [
        folder if folder.size_bytes is None else replace(folder, size_bytes=min(folder.size_bytes, folder.free_bytes))
        for folder in budgets.ssd
    ]
    return replace(budgets, ssd=tuple(ssd))


def with_fewer_commits(budgets: Budgets, _error: CapacityError, match: re.Match[str]) -> Budgets:
    assert budgets.commits is not None
    assert int(match[1]) == budgets.commits.keep > int(match[2]) >= 1
    return replace(budgets, commits=replace(budgets.commits, keep=int(match[2])))


def with_page_size(budgets: Budgets, _error: CapacityError, match: re.Match[str]) -> Budgets:
    page_bytes = parse_bytes(match[1])
    assert PAGE <= page_bytes < parse_bytes(match[2]) == budgets.page_bytes
    return replace(budgets, page_bytes=page_bytes)


STEPS: dict[str, Step] = {
    r"raise tiers\.(device|host) to (\d+MiB)": with_tier,
    r"set ((?:placement\.\w+(?: and )?)+) to auto": with_placement,
    r"set what is ssd in placement to (auto|host)": lambda budgets, _error, match: without_ssd_homes(budgets, match[1]),
    r"set update\.mode to sync": lambda budgets, _error, _match: replace(budgets, sweep=None),
    r"lower page_size to (.+) \(now (.+)\)": with_page_size,
    r"add tiers\.ssd: \[\{path: FOLDER\}\](?: to keep what does not fit on the SSD| on another disk)?": with_folder,
    r"add a folder(?: to tiers\.ssd)?": with_folder,
    r"raise tiers\.ssd\[\]\.size to (\d+MiB) in sum": with_sizes,
    r"lower tiers\.ssd\[\]\.size": with_smaller_sizes,
    r"free disk space": with_space,
    r"free disk space and raise tiers\.ssd\[\]\.size to (\d+MiB) in sum": with_space_for_sizes,
    r"raise tiers\.host to keep more in memory": lambda budgets, _error, _match: replace(budgets, host_bytes=FREE),
    r"lower checkpoint\.keep \(now (\d+)\) to (\d+)": with_fewer_commits,
}
ELSEWHERE = "name smaller units in units.classes"


def remedies(error: CapacityError) -> list[list[str]]:
    """The ways out that the refusal names, each as its steps."""
    found: list[list[str]] = []
    for way in re.split(r", or |\. Or |, (?!and )", error.remedy.removesuffix(".")):
        choice = re.search(r" to (\w+) or (\w+)", way)
        for text in [way.replace(choice[0], f" to {one}") for one in choice.groups()] if choice else [way]:
            found.append(
                [step[0].lower() + step[1:] for step in re.split(r",? and (?!placement|raise tiers\.ssd)", text)]
            )
    return [steps for steps in found if steps != [ELSEWHERE]]


def followed(budgets: Budgets, error: CapacityError, steps: list[str]) -> Budgets:
    for step in steps:
        matching = [(rule, match) for pattern, rule in STEPS.items() if (match := re.fullmatch(pattern, step))]
        assert len(matching) == 1, f"{step!r} is not one of the known steps, in {error.remedy!r}"
        rule, match = matching[0]
        budgets = rule(budgets, error, match)
    return budgets


def refusal(case: Case, budgets: Budgets) -> CapacityError | None:
    try:
        case.plan(budgets)
    except CapacityError as error:
        return error
    return None


def assert_says_all(error: CapacityError) -> None:
    assert error.tier in ("device", "host", "ssd")
    assert error.needed_bytes > error.available_bytes >= 0
    for part in (f"tier {error.tier}:", f"({error.needed_bytes} bytes)", f"({error.available_bytes} bytes)"):
        assert part in str(error)
    assert str(error).endswith(f" {error.remedy}")
    assert remedies(error)


def assert_remedies_help(case: Case, budgets: Budgets, error: CapacityError) -> None:
    """Each of them leads to a plan, by way of refusals for other tiers if need be."""
    for steps in remedies(error):
        now, again, tried = followed(budgets, error, steps), error, [str(error), str(steps)]
        for _ in range(ROUNDS):
            former, refused = again, refusal(case, now)
            if refused is None:
                break
            again = refused
            assert_says_all(again)
            tried.append(str(again))
            assert again.tier != former.tier, tried
            now = followed(now, again, remedies(again)[0])
        else:
            raise AssertionError(tried)


folders_of = st.builds(
    SsdBudget,
    path=st.sampled_from(["a", "b"]),
    size_bytes=st.one_of(st.none(), st.integers(1, 60 * PAGE)),
    free_bytes=st.one_of(st.just(FREE), st.integers(0, 60 * PAGE)),
    weight=st.sampled_from([1.0, 3.0]),
)
commits_of = st.builds(
    CommitBudget,
    keep=st.integers(1, 4),
    folder=st.builds(SsdBudget, st.just("commits"), st.none(), st.sampled_from([0, 20 * PAGE, FREE])),
    other_bytes=st.integers(0, 3 * PAGE),
)


@st.composite
def tight_budgets(draw: st.DrawFn) -> Budgets:
    """Budgets as a config may have them, and often too small."""
    budgets: Budgets = draw(budgets_of)
    sweep = draw(st.sampled_from([None, None, SweepBudget(1), SweepBudget(2)]))
    if sweep is not None:
        budgets = replace(
            budgets, param=draw(st.sampled_from(["auto", "host"])), grad=draw(st.sampled_from(["auto", "host"]))
        )
    ssd = tuple(draw(st.lists(folders_of, max_size=3)))
    if not ssd:
        budgets = without_ssd_homes(budgets)
    return replace(
        budgets,
        page_bytes=draw(st.sampled_from([PAGE, PAGE, 4 * PAGE])),
        ssd=ssd,
        host_bytes=draw(st.integers(1, 200)) * PAGE,
        commits=draw(st.one_of(st.none(), commits_of)),
        sweep=sweep,
        states_on_device=draw(st.booleans()),
        device_is_apart=draw(st.booleans()),
    )


@settings(max_examples=200, deadline=None)
@given(cases, tight_budgets())
def test_every_remedy_of_any_refusal_leads_to_a_plan(case: Case, budgets: Budgets) -> None:
    error = refusal(case, budgets)
    if error is not None:
        assert_says_all(error)
        assert_remedies_help(case, budgets, error)


def folders(*sizes_and_room: tuple[int | None, int]) -> tuple[SsdBudget, ...]:
    """(size, free) of each, in pages."""
    return tuple(
        SsdBudget(f"folder{index}", None if size is None else size * PAGE, free * PAGE)
        for index, (size, free) in enumerate(sizes_and_room)
    )


def commits(keep: int, free: int = FREE) -> CommitBudget:
    return CommitBudget(keep, SsdBudget("commits", None, free))


BLOCKS = linear(3)  # four units of 3 pages of parameters and gradients and 9 of states each
SSD = (SsdBudget("folder", None, FREE),)
HOST = {"param": "host", "grad": "host", "states": "host"}
ON_SSD = {"param": "ssd", "grad": "ssd", "states": "ssd"}
RECORDS = Case(((((8 * PAGE, True),),) * 3), 2, 4, 2, StateFormats("split", "int8", "int8"))


def of(device: int, host: int, ssd: tuple[SsdBudget, ...] = SSD, **others: Any) -> Budgets:
    """``device`` and ``host`` are pages."""
    return replace(Budgets(PAGE, device * PAGE, host * PAGE, ssd), **others)


REFUSED: dict[str, tuple[Case, Budgets, str, str]] = {
    "arena": (BLOCKS, of(2, 100), "device", "Raise tiers.device to 1MiB, or name smaller units in units.classes."),
    "param-device": (
        linear(5),
        of(19, 100, param="device"),
        "device",
        "Raise tiers.device to 2MiB, or set placement.param to auto.",
    ),
    "param-device-smaller-than-a-unit": (
        linear(20),
        of(19, 100, param="device"),
        "device",
        "Raise tiers.device to 5MiB, or set placement.param to auto and raise tiers.device to 2MiB.",
    ),
    "host": (BLOCKS, of(3, 6), "host", "Raise tiers.host to 1MiB."),
    "host-of-large-pages": (
        BLOCKS,
        of(12, 12, page_bytes=4 * PAGE),
        "host",
        "Raise tiers.host to 2MiB, or lower page_size to 64 KiB (now 256 KiB).",
    ),
    "host-of-records": (
        RECORDS,
        of(60, 40, page_bytes=8 * PAGE),
        "host",
        "Raise tiers.host to 4MiB, or lower page_size to 128 KiB (now 512 KiB).",
    ),
    "host-without-ssd": (
        BLOCKS,
        of(3, 30, ()),
        "host",
        "Raise tiers.host to 4MiB, or add tiers.ssd: [{path: FOLDER}] to keep what does not fit on the SSD.",
    ),
    "host-without-ssd-forced": (
        BLOCKS,
        of(3, 30, (), **HOST),
        "host",
        "Raise tiers.host to 4MiB, or add tiers.ssd: [{path: FOLDER}] to keep what does not fit on the SSD, and set "
        "placement.param and placement.grad and placement.states to auto.",
    ),
    "host-without-ssd-too-small-for-any": (BLOCKS, of(3, 3, ()), "host", "Raise tiers.host to 4MiB."),
    "host-forced": (
        BLOCKS,
        of(3, 20, param="host", grad="host"),
        "host",
        "Raise tiers.host to 2MiB, or set placement.param and placement.grad to auto.",
    ),
    "host-fraction": (
        BLOCKS,
        of(3, 20, states=0.9),
        "host",
        "Raise tiers.host to 3MiB, or set placement.states to auto.",
    ),
    "host-swept": (
        BLOCKS,
        of(12, 20, sweep=SweepBudget(1)),
        "host",
        "Raise tiers.host to 3MiB, or set update.mode to sync.",
    ),
    "host-swept-without-ssd": (
        BLOCKS,
        of(12, 40, (), sweep=SweepBudget(2), states="host"),
        "host",
        "Raise tiers.host to 5MiB, or add tiers.ssd: [{path: FOLDER}] to keep what does not fit on the SSD, and set "
        "placement.states to auto, and set update.mode to sync.",
    ),
    "host-commits": (BLOCKS, of(3, 7, commits=commits(2)), "host", "Raise tiers.host to 1MiB."),
    # 96 pages would do, but for one more that a pool of so many keeps for gradients on their way.
    "host-apart": (
        linear(1, count=18),
        of(4, 60, (), device_is_apart=True, update_threads=1, commits=commits(1), **HOST),
        "host",
        "Raise tiers.host to 7MiB, or add tiers.ssd: [{path: FOLDER}] to keep what does not fit on the SSD, and set "
        "placement.param and placement.grad and placement.states to auto.",
    ),
    "no-ssd-tier": (
        BLOCKS,
        of(3, 40, (), **ON_SSD),
        "ssd",
        "Add tiers.ssd: [{path: FOLDER}], or set what is ssd in placement to auto or host.",
    ),
    "size-above-the-disk": (
        BLOCKS,
        of(3, 40, folders((400, 300)), **ON_SSD),
        "ssd",
        "Free disk space, or lower tiers.ssd[].size.",
    ),
    "size-above-the-disk-and-too-small": (
        BLOCKS,
        of(3, 40, folders((40, 30), (20, 10)), **ON_SSD),
        "ssd",
        "Free disk space and raise tiers.ssd[].size to 7MiB in sum, or lower tiers.ssd[].size and add a folder.",
    ),
    "sizes": (
        BLOCKS,
        of(3, 40, folders((30, FREE), (20, FREE), (None, 8)), **ON_SSD),
        "ssd",
        "Raise tiers.ssd[].size to 7MiB in sum.",
    ),
    "sizes-and-disks": (
        BLOCKS,
        of(3, 40, folders((30, 30), (20, 25)), **ON_SSD),
        "ssd",
        "Free disk space and raise tiers.ssd[].size to 7MiB in sum, or add a folder to tiers.ssd.",
    ),
    "disk": (
        BLOCKS,
        of(3, 40, folders((None, 20))),
        "ssd",
        "Free disk space, add a folder to tiers.ssd, or raise tiers.host to keep more in memory.",
    ),
    "disk-forced": (
        BLOCKS,
        of(3, 40, folders((None, 20)), **ON_SSD),
        "ssd",
        "Free disk space, or add a folder to tiers.ssd.",
    ),
    "disk-with-commits": (
        BLOCKS,
        of(3, 40, folders((None, 160)), commits=commits(3)),
        "ssd",
        "Free disk space, or add a folder to tiers.ssd. Or lower checkpoint.keep (now 3) to 2.",
    ),
    "sizes-with-commits": (
        BLOCKS,
        of(3, 40, folders((160, FREE)), commits=commits(9), **ON_SSD),
        "ssd",
        "Raise tiers.ssd[].size to 27MiB in sum. Or lower checkpoint.keep (now 9) to 1.",
    ),
    "disk-of-commits": (
        BLOCKS,
        of(12, 100, (), commits=commits(4, free=100 * PAGE)),
        "ssd",
        "Free disk space, or add tiers.ssd: [{path: FOLDER}] on another disk. Or lower checkpoint.keep (now 4) to 1.",
    ),
}


@pytest.mark.parametrize(("case", "budgets", "tier", "remedy"), REFUSED.values(), ids=REFUSED.keys())
def test_refusal_says_what_helps_and_it_does(case: Case, budgets: Budgets, tier: str, remedy: str) -> None:
    error = refusal(case, budgets)
    assert error is not None
    assert (error.tier, error.remedy) == (tier, remedy)
    assert_says_all(error)
    assert_remedies_help(case, budgets, error)


def test_smaller_units_fit_an_arena_that_blocks_do_not(tmp_path: Path) -> None:
    from angelptm.config import load_config
    from angelptm.engine.setup import lay_out, plan_of

    from ..engine.models import GPT2

    model = GPT2.model()
    tiers = {"device": 3 * PAGE, "host": 64 * PAGE, "ssd": [{"path": str(tmp_path)}]}
    config = load_config({"page_size": PAGE, "tiers": tiers})
    with pytest.raises(CapacityError, match=rf"{ELSEWHERE}\.$") as refused:
        plan_of(*lay_out(model, config), config)
    assert (refused.value.tier, refused.value.needed_bytes) == ("device", 4 * PAGE)
    smaller = load_config({**config.model_dump(), "units": {"classes": ["GPT2Attention", "GPT2MLP"]}})
    assert plan_of(*lay_out(model, smaller), smaller).arena.peak_frames == 3


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize("folder_count", [0, 1, 2])
def test_free_space_is_shared_by_the_folders_that_take_slots_alone(
    folder_count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of commits holds their manifests where there is an SSD tier, and slots where there is none."""
    from angelptm.config import load_config
    from angelptm.engine.setup import budgets_of

    monkeypatch.setattr("angelptm.engine.setup.shutil.disk_usage", lambda _: Usage(90 * PAGE, 0, 90 * PAGE))
    tiers = {"device": "8MiB", "host": "8MiB", "ssd": [{"path": str(tmp_path / f"{i}")} for i in range(folder_count)]}
    budgets = budgets_of(load_config({"tiers": tiers, "checkpoint": {"folder": str(tmp_path / "commits")}}))
    assert [folder.free_bytes for folder in budgets.ssd] == [90 * PAGE // max(1, folder_count)] * folder_count
    assert budgets.commits is not None
    if folder_count == 0:
        assert budgets.commits.folder.free_bytes == 90 * PAGE
