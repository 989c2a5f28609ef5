"""What the engine takes for granted of a device, for each of them. The GPU's is skipped where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator

import angelptm_native as native
import pytest
import torch

from angelptm.device import CudaDevice, Device, LateDevice, make_device
from angelptm.errors import AngelPTMError, CapacityError

from .fake_cuda import FakeCuda

ARENA = 1 << 20
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(
    params=["cpu", "late", "fake-cuda", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])],
)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    made = FakeCuda(ARENA) if request.param == "fake-cuda" else make_device(request.param, ARENA, 0)
    yield made
    made.close()


@pytest.fixture
def host(device: Device) -> Iterator[torch.Tensor]:
    """Host memory that the device may copy from and to: (64 KiB,) of bytes that all differ from their neighbours."""
    memory = (torch.arange(1 << 16) % 251).to(torch.uint8)
    device.use_host_memory(memory.data_ptr(), memory.numel())
    yield memory
    device.synchronize()


def wait(stream: native.CopyStream) -> None:
    mark, end = stream.mark(), time.monotonic() + 10
    while not stream.passed(mark):
        assert time.monotonic() < end
        time.sleep(1e-5)


def bring(device: Device, offset: int, source: torch.Tensor) -> None:
    if device.copies_in is None:
        native.copy_bytes(device.address(offset), source.data_ptr(), source.nbytes)
        return
    device.copies_in.wait_for(device.computed(device.copies_in))
    device.copies_in.copy(device.address(offset), source.data_ptr(), source.nbytes)
    wait(device.copies_in)


def test_view_shows_what_was_copied_there(device: Device, host: torch.Tensor) -> None:
    bring(device, 4096, host)
    seen = device.view(4096, (256, 128), (128, 1), torch.int16)
    assert seen.device == device.torch_device
    assert torch.equal(seen.cpu(), host.view(torch.int16).reshape(256, 128))
    turned = device.view(4096, (128, 256), (1, 128), torch.int16)
    assert torch.equal(turned.cpu(), host.view(torch.int16).reshape(256, 128).t())


def test_views_share_memory_and_no_version(device: Device) -> None:
    one = device.view(0, (8,), (1,), torch.float32)
    other = device.view(0, (8,), (1,), torch.float32)
    before = other._version
    one.fill_(3.0)
    assert other._version == before
    assert (other == 3).all()


def test_view_can_be_a_leaf(device: Device) -> None:
    weight = torch.nn.Parameter(device.view(512, (4, 4), (4, 1), torch.float32))
    (weight * 2).sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 2).all()
    assert device.offset_of(weight.grad) is None, "a gradient lies elsewhere"


def test_tensors_know_their_place_in_the_arena(device: Device) -> None:
    assert device.offset_of(device.view(12_288, (4,), (1,), torch.bfloat16)) == 12_288
    assert device.offset_of(device.view(12_288, (4,), (1,), torch.bfloat16)[2:]) == 12_292
    assert device.offset_of(torch.zeros(4)) is None
    assert device.offset_of(torch.zeros(4, device=device.torch_device)) is None
    assert device.address(64) - device.address(0) == 64


def test_gradients_come_out(device: Device, host: torch.Tensor) -> None:
    if device.copies_out is None:
        pytest.skip("they are in the CPU's memory")
    for step in range(5):
        gradient = torch.full((1 << 14,), float(step), device=device.torch_device) + 1
        device.copies_out.wait_for(device.computed(device.copies_out))
        device.copies_out.copy(host.data_ptr(), gradient.data_ptr(), gradient.nbytes)
        wait(device.copies_out)
        assert (host.view(torch.float32) == step + 1).all()


def test_synchronize_and_generator(device: Device) -> None:
    device.synchronize()
    state = device.generator_state()
    if state is None:
        return
    first = torch.rand(4, device=device.torch_device)
    device.set_generator_state(state)
    assert torch.equal(torch.rand(4, device=device.torch_device), first)


@pytest.mark.gpu
@needs_gpu
def test_arena_that_the_gpu_has_no_room_for_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"tier device: the arena on cuda:0 .* Lower tiers.device"):
        CudaDevice(1 << 50)


@pytest.mark.gpu
@needs_gpu
def test_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(AngelPTMError, match=r"device: cuda:99: this process sees \d+ GPUs"):
        make_device("cuda:99", ARENA, 0)


def test_seed_of_the_late_device_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANGELPTM_LATE_SEED", "7")
    device = LateDevice(ARENA)
    assert device.copies_in is not None
    device.copies_in.copy(device.address(0), 0, 64)
    wait(device.copies_in)
