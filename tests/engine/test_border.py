"""A plan that says fits never fails later for memory: trained at the smallest budgets that are accepted, and above."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from angelptm.config import Config, load_config
from angelptm.engine import Engine
from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of
from angelptm.errors import CapacityError

from .models import GPT2, LLAMA, PLAIN, Family, gpt2, llama
from .training import EVERYTHING_ON_SSD, PAGE, assert_same_values, snapshot, train

STEPS = 5  # of which the first three are traced, and the others follow the schedule
COMMITS_AFTER = (2, 4)
ROOMY = 400  # pages


def half_frozen_gpt2(**keys: Any) -> nn.Module:
    model = gpt2(**keys)
    for name, param in model.named_parameters():
        param.requires_grad_(".h.0." not in name and not name.endswith("bias"))
    return model


def tied_llama(**keys: Any) -> nn.Module:
    return llama(tie_word_embeddings=True, **keys)


@dataclass(frozen=True)
class Case:
    """What is trained, and how: ``keys`` are those of the configuration."""

    family: Family
    keys: Mapping[str, Any] = field(default_factory=dict)
    commits: bool = False
    ssd: bool = True

    @property
    def is_exact(self) -> bool:
        """Whether the losses depend on nothing but the configuration's arithmetic."""
        update = self.keys.get("update", {})
        return bool(update.get("mode", "sync") == "sync" or update.get("max_staleness") == 0)

    def config(self, folder: Path, device: int, host: int) -> Config:
        """``device`` and ``host`` are pages."""
        keys = {
            "page_size": PAGE,
            "optimizer": {"lr": 1e-2},
            "device": os.environ.get("ANGELPTM_TEST_DEVICE", "cpu"),
            **self.keys,
        }
        ssd = [{"path": str(folder / "pages")}] if self.ssd else []
        keys["tiers"] = {"device": device * PAGE, "host": host * PAGE, "ssd": ssd}
        if self.commits:
            keys["checkpoint"] = {"folder": str(folder / "commits")}
        return load_config(keys)


class Planner:
    """Says which budgets a case is refused."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._folder = case, folder
        self._model = case.family.model()
        self._structure, self._layouts = lay_out(self._model, case.config(folder, ROOMY, ROOMY))

    def refusal(self, device: int, host: int) -> CapacityError | None:
        config = self._case.config(self._folder, device, host)
        try:
            plan_of(self._structure, self._layouts, config, buffer_bytes_of(self._model))
        except CapacityError as refused:
            return refused
        return None

    def least_device(self, host: int = ROOMY) -> int:
        return border(lambda device: self.refusal(device, host))

    def least_host(self, device: int) -> int:
        return border(lambda host: self.refusal(device, host))


INT8 = {"lr": 1e-2, "states": {"exp_avg": "int8", "exp_avg_sq": "int8", "int8_from_elements": 1024}}
PARTS = {"param": "host", "grad": "ssd", "states": 0.4}
HALF_FROZEN, TIED = Family("gpt2", half_frozen_gpt2), Family("llama", tied_llama)
CASES = {
    "auto": Case(GPT2),
    "auto-commits": Case(LLAMA, {"update": {"threads": 2}}, commits=True),
    "no-ssd": Case(LLAMA, commits=True, ssd=False),
    "all-ssd": Case(LLAMA, {"placement": EVERYTHING_ON_SSD, "update": {"threads": 2, "ring_depth": 1}}, commits=True),
    "parts": Case(TIED, {"placement": PARTS, "io": {"queue_depth": 1}}, commits=True),
    "one-in-flight": Case(PLAIN, {"update": {"threads": 1, "ring_depth": 1}, "gradient_accumulation_steps": 2}),
    "clipped": Case(PLAIN, {"gradient_clipping": 0.05, "placement": {"grad": "ssd"}}, commits=True),
    "frozen": Case(HALF_FROZEN, {"gradient_checkpointing": True}, commits=True),
    "int8": Case(TIED, {"precision": "bf16", "optimizer": INT8}, commits=True),
    "late": Case(GPT2, {"device": "late"}),
    "late-clipped": Case(LLAMA, {"device": "late", "precision": "bf16", "gradient_clipping": 0.05}, commits=True),
    "bounded": Case(GPT2, {"update": {"mode": "bounded", "max_staleness": 0, "threads": 1}}, commits=True),
    "late-bounded": Case(LLAMA, {"device": "late", "update": {"mode": "bounded"}, "gradient_clipping": 0.05}),
    "lock-free": Case(HALF_FROZEN, {"update": {"mode": "lock_free", "threads": 2}, "placement": {"states": 0.5}}),
}


def border(refusal: Callable[[int], CapacityError | None]) -> int:
    """The fewest pages that are accepted, where more are accepted too."""
    low, high = 1, ROOMY
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if refusal(middle) is None else (middle + 1, high)
    for pages in range(1, 2 * low + 4):
        refused = refusal(pages)
        assert (refused is None) == (pages >= low), f"{pages} pages, where {low} are enough: {refused}"
    return low


def from_border_up(border: int, draw: random.Random) -> Iterator[int]:
    yield from range(border, border + 4)
    yield from draw.sample(range(border + 4, max(2 * border, border + 5) + 1), 1 + (border > 4))


@dataclass(frozen=True)
class Trained:
    losses: torch.Tensor
    masters: Mapping[str, torch.Tensor]
    next_loss: torch.Tensor | None


def assert_within(engine: Engine) -> None:
    peak, tiers, plan = engine.peak_bytes(), engine.config.tiers, engine.plan
    assert peak["device"] <= tiers.device
    assert peak["host"] <= plan.host_frames * PAGE <= tiers.host
    assert engine._store.slot_peak_count <= plan.ssd_slots
    assert sum(slots for _, slots, _ in plan.ssd_slots_by_path) == plan.ssd_slots


def trained(case: Case, config: Config, *, resumed: bool = False) -> Trained:
    """Trains, and looks at every value; with ``resumed``, then goes on from the last commit with another engine."""
    engine = Engine(case.family.model(), config)
    try:
        losses = []
        for step in range(STEPS):
            losses += train(engine, case.family, 1, first=step)
            if case.commits and step + 1 in COMMITS_AFTER:
                engine.save_checkpoint()
        masters = snapshot(engine.state_dict(master=True))
        assert_within(engine)
        if resumed:
            engine.save_checkpoint(wait=True)
    finally:
        engine.close()
    next_loss = None
    if resumed:
        again = Engine(case.family.model(), config, resume=config.checkpoint.folder)
        try:
            next_loss = torch.stack(train(again, case.family, 1, first=STEPS))
            assert_within(again)
        finally:
            again.close()
    return Trained(torch.stack(losses), masters, next_loss)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_the_plan_accepts_trains_within_it(case: Case, tmp_path: Path) -> None:
    planner = Planner(case, tmp_path)
    draw = random.Random(f"{case.family.name} {case.keys}")
    resumed = case.commits and case.is_exact
    roomy = trained(case, case.config(tmp_path / "roomy", ROOMY, ROOMY), resumed=resumed)
    least = planner.least_device()
    larger = draw.randint(least + 1, 2 * least)
    hosts = {device: planner.least_host(device) for device in (least, larger)}
    for device, host in hosts.items():
        assert planner.least_device(host) <= device
    budgets = [(device, ROOMY) for device in from_border_up(least, draw)]
    budgets += [(least, host) for host in from_border_up(hosts[least], draw)]
    budgets += [(larger, hosts[larger])]

    for device, host in budgets:
        at = f"device {device}, host {host} pages"
        at_border = (device, host) in hosts.items()
        found = trained(case, case.config(tmp_path / at, device, host), resumed=resumed and at_border)
        if case.is_exact:
            assert torch.equal(found.losses, roomy.losses), at
            assert_same_values(found.masters, roomy.masters)
        if found.next_loss is not None:
            assert roomy.next_loss is not None
            assert torch.equal(found.next_loss, roomy.next_loss), at


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_page_less_is_refused_before_anything_is_allocated(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner(case, tmp_path)
    device = planner.least_device()
    host = planner.least_host(device)
    monkeypatch.setattr("angelptm.engine.engine.assemble", lambda *_, **__: pytest.fail("allocates"))
    monkeypatch.setattr("angelptm.engine.engine.open_durable", lambda *_, **__: pytest.fail("makes files"))
    for tier, less in (("host", (device, host - 1)), ("device", (device - 1, ROOMY))):
        if min(less) == 0:
            continue  # no page at all is refused with the configuration
        model = case.family.model()
        before = snapshot(model.state_dict())
        with pytest.raises(CapacityError) as refused:
            Engine(model, case.config(tmp_path, *less))
        assert refused.value.tier == tier
        assert refused.value.available_bytes == less[tier == "host"] * PAGE
        assert_same_values(model.state_dict(), before)
        assert not list(tmp_path.iterdir())
