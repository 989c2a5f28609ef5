"""Devices that work on their own time give the same bits, and where the engine does not put in order what it must, that
is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import angelptm_native as native
import pytest
import torch

from angelptm.config import load_config
from angelptm.device import Device, LateDevice
from angelptm.engine import Engine
from angelptm.engine.residency import Residency
from angelptm.errors import AngelPTMError

from ..device.fake_cuda import FakeCuda
from .conftest import MakeBoth, MakeEngine
from .models import FAMILIES, GPT2, Family
from .training import assert_same_parameters, train, train_both

STEPS = 8
ROOMY = 8 * 2**20
IN_MEMORY = {"param": "device", "grad": "host", "states": "host"}
KEYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clipping": 0.05},
    "accumulated": {"gradient_accumulation_steps": 3},
    "recomputed": {"gradient_checkpointing": True},
    "in-memory": {"placement": IN_MEMORY},
    "swept": {
        "update": {"mode": "bounded", "max_staleness": 0},
        "placement": {"param": "host", "grad": "host", "states": "ssd"},
    },
    "int8": {"precision": "bf16", "optimizer": {"lr": 1e-2, "states": {"exp_avg": "int8", "exp_avg_sq": "int8"}}},
}
MAKERS: dict[str, Callable[[int, int], Device]] = {
    "late-0": lambda size, kept: LateDevice(size, kept, seed=0),
    "late-1": lambda size, kept: LateDevice(size, kept, seed=1),
    "fake-cuda": lambda size, kept: FakeCuda(size, kept, seed=2),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """Engines compute on a device that is apart. Those that were made."""
    made: list[Device] = []

    def make(name: str, size: int, kept: int) -> Device:
        assert name == "late"
        made.append(request.param(size, kept))
        return made[-1]

    monkeypatch.setenv("ANGELPTM_TEST_DEVICE", "late")
    monkeypatch.setattr("angelptm.engine.assembly.make_device", make)
    return made


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANGELPTM_TEST_DEVICE", "late")


@pytest.mark.parametrize("room", [0, ROOMY], ids=["tight", "roomy"])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
def test_bits_are_those_of_the_unpaged_reference(
    keys: dict[str, Any], room: int, make_both: MakeBoth, apart: list[Device]
) -> None:
    engine, reference = make_both(GPT2.model(), device=room, **keys)
    train_both(engine, reference, GPT2, STEPS)
    assert_same_parameters(engine, reference)
    assert len(apart) == 1
    params = sum(unit.layout.numel for unit in engine.plan.units) * engine.plan.param_itemsize
    traffic = engine.traffic()["device"]
    assert traffic["read"] > 0
    assert traffic["written"] >= params


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.usefixtures("late")
def test_every_family(family: Family, make_both: MakeBoth) -> None:
    engine, reference = make_both(family.model(), gradient_clipping=0.05)
    train_both(engine, reference, family, STEPS)
    assert_same_parameters(engine, reference)


@pytest.mark.usefixtures("late")
def test_no_page_lives_on_a_device_that_is_apart(make_engine: MakeEngine) -> None:
    engine = make_engine(GPT2.model(), device=ROOMY, placement={"param": "auto", "grad": "host", "states": "auto"})
    assert all(tiers["device"] == 0 for tiers in engine.plan.kind_bytes.values())
    assert engine.plan.readout_frames >= 2
    host = engine.plan
    assert host.ring_frames + host.home_frames + host.moving_frames + host.spare_frames <= host.host_frames
    train(engine, GPT2, 2)
    assert engine.peak_bytes()["host"] <= engine.config.tiers.host


def without_waiting_for_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Residency, "_computed", lambda _self: 0)


def without_waiting_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def arrived(_self: Residency, _unit: int, state: Any) -> None:
        state.arriving = None

    monkeypatch.setattr(Residency, "_await", arrived)


def with_a_mark_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark is taken, and then the unit in those frames computes."""
    former: list[int] = []
    true = Residency._computed

    def early(self: Residency) -> int:
        former.append(true(self))
        return former.pop(0) if len(former) > 1 else 0

    monkeypatch.setattr(Residency, "_computed", early)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (without_waiting_for_what_computes, "without waiting for the kernels that may still read them"),
        # Found on either side, as the fetcher's thread asks for the copy before the use begins, or after.
        (without_waiting_for_copies, "(is used while the copy to it .* has not run|copies to .*, which is in use)"),
        (with_a_mark_from_before, "without waiting for the kernels that may still read them"),
    ],
)
@pytest.mark.usefixtures("late")
def test_what_the_engine_does_not_put_in_order_is_found(
    broken: Callable[[pytest.MonkeyPatch], None], said: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(GPT2.model())
    broken(monkeypatch)
    with pytest.raises(native.DeviceError, match=said):
        train(engine, GPT2, 3)


def test_gradients_that_are_taken_before_they_came_are_found(
    make_both: MakeBoth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames that they come to hold something else by then."""
    monkeypatch.setenv("ANGELPTM_TEST_DEVICE", "late")
    monkeypatch.setattr("angelptm.engine.readout.ReadOut._await", lambda _self, _mark: None)
    engine, reference = make_both(GPT2.model())
    with pytest.raises((AssertionError, AngelPTMError, native.DeviceError)):
        train_both(engine, reference, GPT2, 4)


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaEventQuery", "cudaEventRecord"])
def test_device_that_fails_ends_the_step(call: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeCuda] = []

    def make(_name: str, size: int, kept: int) -> Device:
        made.append(FakeCuda(size, kept))
        return made[-1]

    monkeypatch.setenv("ANGELPTM_TEST_DEVICE", "late")
    monkeypatch.setattr("angelptm.engine.assembly.make_device", make)
    engine = make_engine(GPT2.model())
    train(engine, GPT2, 4)
    made[0].runtime.fail[call] = 719
    with pytest.raises(native.DeviceError, match=rf"{call} on device 0: .* \(error 719\)"):
        train(engine, GPT2, 2, first=4)


def test_cuda_where_there_is_none_says_what_to_do(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = load_config(
        {"device": "cuda", "tiers": {"device": "8MiB", "host": "64MiB", "ssd": [{"path": str(tmp_path)}]}}
    )
    with pytest.raises(AngelPTMError, match=r"device: cuda: torch \S+ sees no GPU .* or set device: cpu"):
        Engine(GPT2.model(), config)
    assert not list(tmp_path.iterdir())
