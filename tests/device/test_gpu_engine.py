"""Training on a GPU: the same losses as on the CPU, and the same bits whatever the budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from angelptm.config import load_config
from angelptm.engine import Engine

from ..engine.models import FAMILIES, GPT2, Family
from ..engine.training import snapshot, tight_config, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
STEPS = 8


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def run(family: Family, folder: Path, **keys: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], Engine]:
    config = tight_config(family.model(), folder, **keys)
    engine = Engine(family.model(), config)
    try:
        losses = torch.stack(train(engine, family, STEPS)).cpu()
        return losses, snapshot(engine.state_dict(master=True)), engine
    finally:
        engine.close()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_losses_are_those_of_the_cpu(
    family: Family, precision: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANGELPTM_TEST_DEVICE", "cpu")
    expected, _, _ = run(family, tmp_path / "cpu", precision=precision)
    monkeypatch.setenv("ANGELPTM_TEST_DEVICE", "cuda")
    found, _, engine = run(family, tmp_path / "gpu", precision=precision)
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)
    peak = engine.peak_bytes()
    assert peak["device"] <= engine.config.tiers.device
    assert peak["host"] <= engine.config.tiers.host


@pytest.mark.parametrize("keys", [{}, {"gradient_clipping": 0.05}, {"gradient_accumulation_steps": 2}])
def test_budgets_do_not_change_bits(keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANGELPTM_TEST_DEVICE", "cuda")
    tight, values, _ = run(GPT2, tmp_path / "tight", **keys)
    in_memory = {"param": "host", "grad": "host", "states": "host"}
    roomy, others, _ = run(GPT2, tmp_path / "roomy", device=16 * 2**20, placement=in_memory, **keys)
    assert torch.equal(tight, roomy)
    assert values.keys() == others.keys()
    assert all(torch.equal(values[name], others[name]) for name in values)


def test_a_commit_of_the_gpu_resumes_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANGELPTM_TEST_DEVICE", "cuda")
    commits = {"checkpoint": {"folder": str(tmp_path / "commits")}}
    config = tight_config(GPT2.model(), tmp_path, **commits)
    engine = Engine(GPT2.model(), config)
    train(engine, GPT2, 3)
    engine.save_checkpoint(wait=True)
    saved = snapshot(engine.state_dict(master=True))
    engine.close()
    on_cpu = load_config({**config.model_dump(mode="json"), "device": "cpu"})
    resumed = Engine(GPT2.model(), on_cpu, resume=tmp_path / "commits")
    try:
        assert all(torch.equal(value, saved[name]) for name, value in snapshot(resumed.state_dict(master=True)).items())
        train(resumed, GPT2, 1, first=3)
    finally:
        resumed.close()
