"""The cases of one run: what each is, what it is given, and why one is left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

MIB = 2**20
_STATE_BYTES = 12  # of one parameter: master and both moments, fp32
_PROCESS_BYTES = 640 * MIB  # Python, torch, transformers and activations, to guess what runs beside what

INSTALL = "tools/bench/step/deepspeed.md says how to install it; then pass --deepspeed PYTHON"


class BadArgument(Exception):
    """Something asked for on the command line cannot be done."""


@dataclass(frozen=True)
class Size:
    """What suits a preset: budgets of the AngelPTM cases, and how much each round measures by itself."""

    device: int
    host: int
    page: str
    batch: int
    sequence: int
    recompute: bool
    rounds: int
    steps: int
    file_bytes: int
    triad_elements: int
    ceiling_seconds: float


# Budgets of the two large ones as in tools/bench/memory.py.
SIZES = {
    "gpt2-demo": Size(24 * MIB, 64 * MIB, "1MiB", 1, 64, False, 2, 2, 64 * MIB, 1 << 20, 0.02),
    "gpt2": Size(256 * MIB, 512 * MIB, "4MiB", 1, 256, False, 5, 4, 1024 * MIB, 32 << 20, 0.2),
    "gpt2-medium": Size(256 * MIB, 512 * MIB, "4MiB", 1, 256, True, 5, 3, 1024 * MIB, 32 << 20, 0.2),
}


@dataclass(frozen=True)
class Case:
    """``kind``: paged (AngelPTM), resident (PyTorch in DRAM) or infinity (DeepSpeed). ``config``: what it is given
    besides the work. ``rounds_states``: its moments have fewer bits than fp32, so its losses are its own.
    ``expected_bytes``: a guess of its memory. ``left_out``: why it does not run."""

    name: str
    kind: str
    clip: bool
    expected_bytes: int
    config: dict[str, Any] = field(default_factory=dict)
    left_out: str | None = None
    rounds_states: bool = False


def all_cases(size: Size, facts: dict[str, int], precision: str, deepspeed: str | None) -> list[Case]:
    """``facts``: of the model (training.py)."""
    parameters = facts["parameters"]
    return [
        *_resident(parameters, precision),
        *_paged(size, parameters, precision),
        *_infinity(parameters, precision, deepspeed, facts["largest"]),
    ]


def selected(cases: list[Case], patterns: list[str]) -> list[Case]:
    """Those whose name matches one of the shell patterns. Raises BadArgument when a pattern matches none."""
    for pattern in patterns:
        if not any(fnmatch(case.name, pattern) for case in cases):
            raise BadArgument(f"--cases {pattern}: there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(fnmatch(case.name, pattern) for pattern in patterns)]


def check_sequence(preset: str, sequence: int) -> None:
    """Raises BadArgument for more tokens than the model has positions."""
    from angelptm.model.presets import PRESETS

    positions = PRESETS[preset]["config"].get("n_positions", 1024)
    if sequence > positions:
        raise BadArgument(f"--sequence {sequence}: {preset} has {positions} positions")


def _resident(parameters: int, precision: str) -> list[Case]:
    bytes_each = 16 if precision == "fp32" else 2 + 2 + 4 + 4 + 8
    expected = parameters * bytes_each + _PROCESS_BYTES
    return [
        Case("torch", "resident", False, expected),
        Case("torch clipped", "resident", True, expected),
    ]


def _paged(size: Size, parameters: int, precision: str) -> list[Case]:
    from bench.step.paged import config_problem

    params = parameters * (4 if precision == "fp32" else 2)
    states = parameters * _STATE_BYTES
    on_ssd = {"param": "ssd", "states": "ssd"}

    def case(
        name: str,
        *,
        clip: bool = False,
        device: int | str = size.device,
        host: int = size.host,
        placement: dict[str, Any] = on_ssd,
        sections: dict[str, Any] | None = None,
        rounds_states: bool = False,
    ) -> Case:
        config = {
            "tiers": {"device": device, "host": host},
            "page_size": size.page,
            "placement": placement,
            **(sections or {}),
        }
        problem = config_problem({**sections, "precision": precision}) if sections else None
        reason = (
            f"this version of AngelPTM does not take {json.dumps(sections)}: {problem.partition(';')[0]}"
            if problem
            else None
        )
        budgets = (device if isinstance(device, int) else size.device) + host
        return Case(name, "paged", clip, budgets + _PROCESS_BYTES, config, reason, rounds_states)

    def in_formats(name: str, **states: str) -> Case:
        rounds = set(states) != {"master"}
        return case(f"angelptm ssd {name}", sections={"optimizer": {"states": states}}, rounds_states=rounds)

    master = {"bf16": "split", "fp32": "fp32"}[precision]
    serial = {"execution": {"moves": "serial"}}
    return [
        case("angelptm ssd"),
        case("angelptm ssd clipped", clip=True),
        *([in_formats("fp32 states", master="fp32")] if precision == "bf16" else []),
        in_formats("bf16 moments", master=master, exp_avg="bf16", exp_avg_sq="bf16"),
        in_formats("int8 moments", master=master, exp_avg="int8", exp_avg_sq="int8"),
        # Host memory in which the updater can have read the states of the largest unit before its gradients come.
        case("angelptm ssd roomy", host=2 * size.host),
        case("angelptm ssd roomy clipped", host=2 * size.host, clip=True),
        case("angelptm half", host=size.host + states * 11 // 20, placement={"param": "ssd", "states": 0.5}),
        case(
            "angelptm host",
            device=size.device + params * 5 // 4,
            host=size.host + states * 11 // 10 + params * 5 // 4,
            placement={"param": "device", "states": "host"},
        ),
        case("angelptm tiny device", device="smallest"),
        case("angelptm ssd serial", sections=serial),
        case("angelptm ssd clipped serial", clip=True, sections=serial),
    ]


def _infinity(parameters: int, precision: str, python: str | None, largest: int) -> list[Case]:
    reason = deepspeed_problem(python)
    if reason is None and precision != "bf16":
        reason = "only bf16 is compared: its ZeRO-3 keeps fp32 masters besides in either precision"
    cases = []
    for name, lean in (("deepspeed best", False), ("deepspeed lean", True)):
        config = infinity_config(largest, lean=lean)
        buffers = 2 * largest * config["zero_optimization"]["offload_param"]["buffer_count"]
        # Gradients and four tensors of fp32 for each element of a group of the update.
        group = 4 * 4 * (largest if lean else parameters)
        cases.append(
            Case(name, "infinity", False, 6 * parameters + group + buffers + 2 * _PROCESS_BYTES, config, reason)
        )
    return cases


def infinity_config(largest: int, *, lean: bool) -> dict[str, Any]:
    """DeepSpeed's keys. deepspeed.md says how they were found."""
    group = largest if lean else 10**9
    return {
        "aio": {
            "block_size": 2**20 if lean else 8 * 2**20,
            "queue_depth": 8 if lean else 32,
            "intra_op_parallelism": 1 if lean else 2,
            "overlap_events": True,
            "single_submit": False,
        },
        "zero_optimization": {
            "sub_group_size": group,
            "stage3_prefetch_bucket_size": 0 if lean else 5 * 10**7,
            "stage3_max_live_parameters": 0 if lean else 10**9,
            "stage3_max_reuse_distance": 0 if lean else 10**9,
            "stage3_param_persistence_threshold": 0 if lean else 10**5,
            "offload_param": {
                "pin_memory": True,
                "buffer_count": 5 if lean else 24,
                "buffer_size": largest,
                "max_in_cpu": 0 if lean else 10**9,
            },
            "offload_optimizer": {
                "pin_memory": True,
                "buffer_count": 4,
                "pipeline_read": False,
                "pipeline_write": False,
            },
        },
    }


def deepspeed_problem(python: str | None) -> str | None:
    """Why DeepSpeed cannot run in that interpreter; None when it can."""
    if python is None:
        return f"no interpreter with DeepSpeed was named; {INSTALL}"
    program = "import json, deepspeed, torch, transformers; print(json.dumps(torch.__version__))"
    try:
        found = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    except OSError as error:
        raise BadArgument(f"--deepspeed {python}: no such program") from error
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        return f"{python} cannot import DeepSpeed ({last}); {INSTALL}"
    return None


def python_of(case: Case, deepspeed: str | None) -> tuple[str, str, dict[str, str]]:
    """Interpreter, module and environment of a case's worker."""
    if case.kind == "infinity":
        assert deepspeed is not None
        programs = [str(Path(deepspeed).absolute().parent), os.environ.get("PATH", os.defpath)]  # ninja is there
        return deepspeed, "bench.step.infinity", {"DS_ACCELERATOR": "cpu", "PATH": os.pathsep.join(programs)}
    return sys.executable, "bench.step.worker", {}


def worker_argument(case: Case, work: dict[str, Any], folder: Path) -> dict[str, Any]:
    argument = {"work": work, "folder": str(folder), "clip": case.clip, "config": case.config}
    return argument if case.kind == "infinity" else {"kind": case.kind, **argument}
