"""Where a run and its commits are, and how it goes on from one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from angelptm.checkpoint.folder import RUN_SUBFOLDER, locate
from angelptm.config import Config
from angelptm.data import TokenBatches
from angelptm.engine import Engine
from angelptm.engine.resume import Resumed
from angelptm.errors import ConfigError
from angelptm.train.progress import Reporter
from angelptm.train.result import RunResult


def choose_folders(config: Config, resume: bool, resume_from: Path | None) -> tuple[Config, Path | None]:
    """The config with its run folder and, where commits are wanted, their folder; and where to resume from."""
    run_dir = config.run_dir
    if resume_from is not None:
        locate(resume_from)  # refuses a path without commits
        if run_dir is None:
            run_dir = resume_from.parent if resume_from.name == RUN_SUBFOLDER else resume_from
    elif resume and run_dir is None:
        raise ConfigError(
            "run_dir",
            None,
            "the folder of the run that goes on",
            "Give it: --resume PATH, or --set run_dir=PATH --resume.",
        )
    run_dir = run_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    own = config.checkpoint.folder or run_dir / RUN_SUBFOLDER
    has_commits = bool(list(own.glob("commits/*.manifest")))
    config = _in_folders(config, run_dir, own if config.checkpoint.every or has_commits else None)
    if resume_from is not None:
        if has_commits and own.resolve() != locate(resume_from).resolve():
            raise ConfigError(
                "run_dir",
                str(run_dir),
                f"a folder without commits, or that of {resume_from}",
                "Choose another run_dir for the run that goes on from there.",
            )
        return config, resume_from
    if resume:
        return config, own if has_commits else None
    if has_commits:
        raise ConfigError(
            "run_dir",
            str(run_dir),
            "a folder without commits of an earlier run",
            "Add --resume to go on from the newest one, or choose another run_dir.",
        )
    return config, None


def as_trained(config: Config) -> Config:
    """The config with the folder that ``train`` would give its commits, so that a plan counts them."""
    if not config.checkpoint.every or config.checkpoint.folder is not None:
        return config
    run_dir = config.run_dir or Path("runs")
    return _in_folders(config, run_dir, run_dir / RUN_SUBFOLDER)


def _in_folders(config: Config, run_dir: Path, commits: Path | None) -> Config:
    checkpoint = config.checkpoint.model_copy(update={"folder": commits})
    return config.model_copy(update={"run_dir": run_dir, "checkpoint": checkpoint})


def go_on(
    engine: Engine,
    resumed: Resumed,
    former: list[dict[str, Any]],
    result: RunResult,
    training: TokenBatches,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: Config,
    reporter: Reporter,
) -> None:
    """Data, schedule and figures continue where the commit left them."""
    engine.restore_progress(scheduler=scheduler, data=training)
    steps = [line for line in former if "loss" in line]
    result.losses = [line["loss"] for line in steps]
    result.step_seconds = [line["seconds"] for line in steps]
    result.bytes = steps[-1]["bytes"] if steps else {}
    before = resumed.client_state.get("validation_loss_before")
    result.validation_loss_before = before if isinstance(before, float) else None
    pages = resumed.pages
    reporter.say(
        f"resumed after step {resumed.step} from {resumed.path}: {pages.adopted} pages adopted in place, "
        f"{pages.read} read and written anew"
    )
    for note in resumed.notes:
        reporter.say(f"  {note}")
    if resumed.config_hash != config.hash:
        reporter.say("  the config differs from the commit's; what it says now counts, but lr and the schedule's state")
