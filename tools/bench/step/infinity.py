"""DeepSpeed ZeRO-3 with NVMe offload of parameters and optimizer states, on the CPU, in one process.

Runs in the interpreter that ``--deepspeed`` names; deepspeed.md says how to make one.

    cd tools && PYTHON -m bench.step.infinity '{"work": {...}, "folder": ..., "clip": false, "config": {...}}'
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from bench.step.training import LEARNING_RATE, MAX_NORM, WEIGHT_DECAY, Steps, Work
from bench.step.worker import reply_channel, serve


class Infinity:
    """``config``: DeepSpeed's own keys of ``zero_optimization`` and ``aio``, as in cases.py."""

    def __init__(self, work: Work, folder: Path, clip: bool, config: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        import deepspeed
        import torch

        deepspeed.init_distributed("gloo")
        zero = config["zero_optimization"]
        full = {
            "train_micro_batch_size_per_gpu": work.batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": MAX_NORM if clip else 0.0,
            "bf16": {"enabled": work.precision == "bf16"},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LEARNING_RATE, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": WEIGHT_DECAY},
            },
            "aio": config["aio"],
            "zero_optimization": {
                "stage": 3,
                **{key: value for key, value in zero.items() if not key.startswith("offload_")},
                "offload_param": {"device": "nvme", "nvme_path": str(folder), **zero["offload_param"]},
                "offload_optimizer": {"device": "nvme", "nvme_path": str(folder), **zero["offload_optimizer"]},
            },
            "steps_per_print": 10**9,
        }
        model = work.model()
        self._parameters = sum(param.numel() for param in model.parameters())
        self._engine, self._optimizer, *_ = deepspeed.initialize(model=model, config=full)
        self._steps = Steps(work)
        self._folder = folder
        self._torch, self._deepspeed, self._config = torch.__version__, deepspeed.__version__, full
        self._folder = folder

    def step(self) -> float:
        loss = self._engine(**self._steps.next()).loss
        value = float(loss.detach())
        self._engine.backward(loss)
        self._engine.step()
        return value

    def drain(self) -> None:
        """Nothing is left under way: DeepSpeed's step ends when all is written."""

    def facts(self) -> dict[str, Any]:
        files = [path.stat().st_size for path in self._folder.rglob("*") if path.is_file()]
        return {
            "parameters": self._parameters,
            "torch": self._torch,
            "deepspeed": self._deepspeed,
            "optimizer": type(self._optimizer).__name__,
            "config": json.loads(json.dumps(self._config).replace(str(self._folder), "FOLDER")),
            "swap_file_bytes": sum(files),
        }

    def counters(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._engine.destroy()


def main() -> None:
    channel = reply_channel()
    case = json.loads(sys.argv[1])
    serve(Infinity(Work(**case["work"]), Path(case["folder"]), case["clip"], case["config"]), channel)


if __name__ == "__main__":
    main()
