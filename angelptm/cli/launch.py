"""``angelptm launch``: looks at the machine first, and trains until it is done, whatever ends the process meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from angelptm.cli.plan import RankCount, load_ranked, planned, show_plan
from angelptm.cli.report import collect_report
from angelptm.cli.train import ConfigPath, Overrides
from angelptm.config import Config, load_config
from angelptm.errors import AngelPTMError
from angelptm.memory import PROCESS_BYTES, read_text
from angelptm.sizes import format_bytes

_PCI_DEVICES = Path("/sys/bus/pci/devices")
_EXPLAINED = 2  # train's exit code for an error that its message explains: to try again would not help
_PAUSE_SECONDS = 1.0  # before a restart, doubled each time
_MOST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Finding:
    """``serious``: the run could not work. ``text`` says what was found, what is needed, and the remedy."""

    text: str
    serious: bool


def findings(config: Config, host_bytes: int, report: Mapping[str, Any], ranks: int = 1) -> list[Finding]:
    """What the machine lacks for a config whose plan takes ``host_bytes`` of host memory for each of ``ranks``.
    ``report`` as collect_report makes it of the SSD folders."""
    found = []
    memory = report["memory"]
    needed = ranks * (host_bytes + PROCESS_BYTES + (0 if config.device.startswith("cuda") else config.tiers.device))
    limits = {"available memory": memory["available_bytes"], "this control group's limit": memory["cgroup_limit_bytes"]}
    for name, limit in limits.items():
        if limit is not None and limit < needed:
            found.append(
                Finding(
                    f"tier host: {name} is {format_bytes(limit)}, and the plan with the process itself takes "
                    f"{format_bytes(needed)}. Lower tiers.host, or free memory.",
                    serious=True,
                )
            )
    if config.device.startswith("cuda"):
        found += _gpu_findings(config, ranks * host_bytes, report, ranks)
    for path in report["paths"] if config.tiers.ssd else ():
        if not path["o_direct"]:
            found.append(
                Finding(
                    f"tier ssd: {path['path']} ({path['file_system']}) does not do O_DIRECT ({path['o_direct_why']}): "
                    "pages go through the page cache, which is slower. Use a folder on ext4 or xfs.",
                    serious=False,
                )
            )
    if not report["io_uring"]["available"]:
        found.append(
            Finding(
                f"io: no io_uring here ({report['io_uring']['why']}); a thread pool reads and writes instead.", False
            )
        )
    if not config.checkpoint.every:
        found.append(Finding("checkpoint.every is 0: a run that dies starts anew. Set it, for example to 100.", False))
    return found


def _gpu_findings(config: Config, host_bytes: int, report: Mapping[str, Any], ranks: int) -> list[Finding]:
    gpu, locked = report["gpu"], report["memory"]["memlock_limit_bytes"]
    _, _, index = config.device.partition(":")
    found = []
    if not gpu["available"]:
        built = f"CUDA {gpu['cuda']}" if gpu["cuda"] else "no CUDA"
        found.append(
            Finding(f"device: {config.device}: torch sees no GPU (it is built with {built}). Look at nvidia-smi.", True)
        )
    elif ranks > 1 and (index or len(gpu["devices"]) < ranks):
        found.append(
            Finding(
                f"device: {config.device}: {ranks} ranks want a GPU each, and this process sees {len(gpu['devices'])}. "
                "Write device: cuda, and start as many ranks as there are GPUs.",
                True,
            )
        )
    elif index and int(index) >= len(gpu["devices"]):
        found.append(Finding(f"device: {config.device}: this process sees {len(gpu['devices'])} GPUs.", True))
    if locked is not None and locked < host_bytes:
        found.append(
            Finding(
                f"tier host: memory that may be locked is limited to {format_bytes(locked)}, and the pool of "
                f"{format_bytes(host_bytes)} is page-locked for the GPU. Raise it: ulimit -l unlimited.",
                serious=True,
            )
        )
    return found


def launch(
    config: ConfigPath,
    set_: Overrides = None,
    ranks: RankCount = 1,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="How often in a row to go on without a new commit in between.")
    ] = 3,
    cores: Annotated[
        str,
        typer.Option(
            "--cores", help="Cores for the run, for example 0-15,32: auto takes those next to the GPU, all means any."
        ),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the checks and the plan.")] = False,
) -> None:
    """Checks the machine, shows the plan, trains, and goes on from the last commit when the process dies."""
    console = Console()
    overrides = list(set_ or [])
    loaded = load_ranked(config, overrides, ranks)
    if loaded.run_dir is None:
        overrides.append(f"run_dir=runs/{time.strftime('%Y%m%d-%H%M%S')}")  # so that all its processes share it
        loaded = load_config(config, overrides)
    bound = chosen_cores(cores, loaded.device) if ranks == 1 or cores != "auto" else None
    _, plan = planned(loaded, ranks=ranks)
    show_plan(plan, console)
    if bound is not None:
        console.print(f"bound to {len(bound)} cores: {_written(bound)}", highlight=False)
    with console.status("looking at this machine"):
        found = findings(
            loaded, plan.host_frames * plan.page_bytes, collect_report([one.path for one in loaded.tiers.ssd]), ranks
        )
    for one in found:
        kind = "error" if one.serious else "note"
        console.print(f"{kind}: {one.text}", highlight=False, soft_wrap=True, markup=False)
    if any(one.serious for one in found):
        raise typer.Exit(_EXPLAINED)
    if dry_run:
        return
    if bound is not None:
        os.sched_setaffinity(0, bound)  # which the training process inherits
    raise typer.Exit(_supervise(config, overrides, loaded, restarts, console, ranks))


def chosen_cores(text: str, device: str) -> set[int] | None:
    """Cores to run on, None for any. Raises AngelPTMError for what names no core that this process may have."""
    allowed = os.sched_getaffinity(0)
    if text == "all":
        return None
    if text == "auto":
        near = _cores_near(device) & allowed
        return near if near and near != allowed else None
    cores = _listed(text)
    if not cores or not cores <= allowed:
        raise AngelPTMError(
            f"--cores: found {text!r}, expected cores of {_written(allowed)}, as in 0-3,8; or auto, or all."
        )
    return cores


def _cores_near(device: str) -> set[int]:
    """Those of the NUMA node that the GPU is attached to; none where the system does not say."""
    if not device.startswith("cuda"):
        return set()
    import torch

    if not torch.cuda.is_available():
        return set()
    of: Any = torch.cuda.get_device_properties(int(device.partition(":")[2] or 0))
    if not hasattr(of, "pci_bus_id"):  # before torch 2.5
        return set()
    name = f"{of.pci_domain_id:04x}:{of.pci_bus_id:02x}:{of.pci_device_id:02x}.0"
    return _listed(read_text(_PCI_DEVICES / name / "local_cpulist").strip()) or set()


def _listed(text: str) -> set[int] | None:
    """The cores of a list as the system writes them: 0-3,8. None for what is no such list."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return None
        found.update(range(int(first), int(last or first) + 1))
    return found


def _written(cores: set[int]) -> str:
    """As ``_listed`` reads it."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _supervise(
    path: Path, overrides: Sequence[str], config: Config, restarts: int, console: Console, ranks: int = 1
) -> int:
    """Runs ``angelptm train --resume`` until it ends by itself, under torchrun where there are several ranks; its exit
    code."""
    command = [sys.executable, "-m", "angelptm.cli.main", "train", str(path), "--resume"]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    for override in overrides:
        command += ["--set", override]
    tries, newest, pause = 0, _newest_commit(config), _PAUSE_SECONDS
    while True:
        code = _run(command)
        if code in (0, _EXPLAINED) or code == -signal.SIGINT:
            return 130 if code == -signal.SIGINT else code
        reached = _newest_commit(config)
        tries, pause = (tries + 1, pause * 2) if reached == newest else (1, _PAUSE_SECONDS)
        newest = reached
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = ". The system may have run out of memory: see dmesg" if code == -signal.SIGKILL else ""
        if tries > restarts:
            console.print(f"the training process {how}{hint}; no new commit in {restarts} restarts: giving up.")
            return 1
        where = "the newest commit" if reached else "the beginning, as there is no commit"
        console.print(f"the training process {how}{hint}; going on from {where} (try {tries} of {restarts})")
        time.sleep(min(pause, _MOST_PAUSE_SECONDS))


def _run(command: Sequence[str]) -> int:
    """The exit code. An interrupt is the child's too, which ends in its own way; a request to end is passed on."""
    child = subprocess.Popen(command)
    asked = False  # to end, by whoever: then it is not started again, however it ends

    def end(*_: object) -> None:
        nonlocal asked
        asked = True
        child.terminate()

    before = signal.signal(signal.SIGTERM, end)
    try:
        while True:
            try:
                code = child.wait()
            except KeyboardInterrupt:
                asked = True  # the terminal has told the child as well
                continue
            return -signal.SIGINT if asked or code == 130 else code
    finally:
        signal.signal(signal.SIGTERM, before)


def _newest_commit(config: Config) -> str | None:
    from angelptm.checkpoint.folder import RUN_SUBFOLDER

    assert config.run_dir is not None, "launch has chosen one"
    folder = config.checkpoint.folder or config.run_dir / RUN_SUBFOLDER
    return max((path.name for path in folder.glob("commits/*.manifest")), default=None)
