"""AngelPTM."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from bench.step.training import LEARNING_RATE, MAX_NORM, SEED, WEIGHT_DECAY, Steps, Work


class Paged:
    """``config``: the keys in which the cases differ. A ``tiers.device`` of ``"smallest"``: as the plan asks."""

    def __init__(self, work: Work, folder: Path, clip: bool, config: dict[str, Any]) -> None:
        import angelptm

        tiers = {**config["tiers"], "ssd": [{"path": str(folder)}]}
        full = {
            **config,
            "tiers": tiers,
            "precision": work.precision,
            "optimizer": {
                "type": "adamw",
                "lr": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                **config.get("optimizer", {}),
            },
            "gradient_checkpointing": work.recompute,
            "gradient_clipping": MAX_NORM if clip else None,
        }
        if tiers["device"] == "smallest":
            tiers["device"] = self._smallest_device(work, full)
        self._engine = angelptm.initialize(angelptm.materialize(work.architecture(), seed=SEED), full)
        self._steps = Steps(work)

    @staticmethod
    def _smallest_device(work: Work, config: dict[str, Any]) -> int:
        """Bytes of the smallest arena, in whole pages, that the planner accepts."""
        import angelptm
        from angelptm.config import Config
        from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of
        from angelptm.errors import CapacityError, ConfigError
        from angelptm.sizes import parse_bytes

        page = parse_bytes(config["page_size"])
        model = angelptm.materialize(work.architecture(), seed=SEED)
        refused, accepted = 0, 64 * 2**30 // page
        while accepted - refused > 1:
            middle = (refused + accepted) // 2
            try:
                tried = Config(**{**config, "tiers": {**config["tiers"], "device": middle * page}})
                structure, layouts = lay_out(model, tried)
                plan_of(structure, layouts, tried, buffer_bytes_of(model))
                accepted = middle
            except (CapacityError, ConfigError):
                refused = middle
        return accepted * page

    def step(self) -> float:
        loss = self._engine(**self._steps.next()).loss
        value = float(loss.detach())
        self._engine.backward(loss)
        self._engine.step()
        return value

    def drain(self) -> None:
        self._engine.drain()

    def facts(self) -> dict[str, Any]:
        import torch

        engine = self._engine
        prediction = getattr(engine, "prediction", None)
        return {
            "parameters": sum(unit.layout.numel for unit in engine.plan.units),
            "torch": torch.__version__,
            "config_hash": engine.config.hash,
            "budget_bytes": {"device": engine.config.tiers.device, "host": engine.config.tiers.host},
            "peak_bytes": engine.peak_bytes(),
            "activation_bytes": engine.activation_bytes,
            "notes": engine.notes(),
            "prediction": prediction() if prediction is not None else None,
            "staleness": _summed(engine.staleness()),
            "gradients": engine.gradient_counts(),
        }

    def counters(self) -> dict[str, Any]:
        return {"bytes": self._engine.traffic(), "phase_seconds": self._engine.phase_seconds()}

    def close(self) -> None:
        self._engine.close()


def _summed(staleness: list[dict[int, int]]) -> dict[str, int]:
    """Of all units: gradients lacking → uses."""
    total: Counter[int] = Counter()
    for own in staleness:
        total.update(own)
    return {str(lag): count for lag, count in sorted(total.items())}


def config_problem(config: dict[str, Any]) -> str | None:
    """Why this version of AngelPTM does not take a section of a case's config; None when it does."""
    from angelptm.config import Config
    from angelptm.errors import ConfigError

    try:
        Config(tiers={"device": "1GiB", "host": "1GiB"}, **config)
    except ConfigError as error:
        return str(error)
    return None
