"""Saving and loading: what an engine is at one moment, put into a commit and taken out of one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.header import Header
from angelptm.checkpoint.reader import CommitReader
from angelptm.config import Config
from angelptm.engine.assembly import Parts
from angelptm.engine.commits import buffer_space
from angelptm.engine.optimizer import PagedOptimizer
from angelptm.engine.restore import Restorer
from angelptm.engine.resume import Resumed, check_buffers, open_commit, restore_buffers
from angelptm.engine.setup import persistent_buffers
from angelptm.engine.snapshot import (
    Stateful,
    check_generator_states,
    generator_states,
    make_header,
    restore_groups,
    set_generator_states,
    state_of,
)
from angelptm.errors import AngelPTMError, CheckpointError

_log = logging.getLogger("angelptm")


@dataclass
class Progress:
    """Counters: the updates of each trainable parameter, and the optimizer steps taken.

    ``half_done``: what ended half way and left parameters and states of different steps; empty otherwise.
    """

    steps_of: dict[str, int]
    global_step: int = 0
    half_done: str = ""

    def require_whole(self) -> None:
        if self.half_done:
            raise AngelPTMError(
                f"{self.half_done} ended half way, so parameters and states are not those of one step. Load a commit."
            )


class Durability:
    """Commits an engine's state, and puts a commit's state into it. See ``Engine.save_checkpoint`` and
    ``load_checkpoint``."""

    def __init__(
        self, parts: Parts, module: nn.Module, config: Config, optimizer: PagedOptimizer, progress: Progress
    ) -> None:
        self._parts = parts
        self._module = module
        self._config = config
        self._optimizer = optimizer
        self._progress = progress
        self.resumed: Resumed | None = None

    def save(
        self,
        save_dir: str | Path | None,
        *,
        client_state: Mapping[str, Any] | None,
        scheduler: Stateful | Mapping[str, Any] | None,
        data: Stateful | Mapping[str, Any] | None,
        before_publish: Callable[[], None] | None,
    ) -> None:
        self._progress.require_whole()
        commits, ranks = self._parts.commits, self._parts.ranks
        if self._config.checkpoint.folder is None:
            raise AngelPTMError(
                "save_checkpoint: the store has no folder to commit to. Set checkpoint.folder in the config that "
                "initialize gets, before training."
            )
        folder = self._config.checkpoint.folder.resolve()
        if save_dir is not None and Path(save_dir).resolve() != folder:
            raise AngelPTMError(
                f"save_checkpoint: {save_dir} is not checkpoint.folder ({folder}). A commit stays "
                "where the pages are; `angelptm checkpoint copy` copies one to another folder or drive."
            )
        self._parts.gradients.settle()
        if any(self._parts.gradients.params_with_gradient(unit) for unit in range(len(self._parts.leaves))):
            raise AngelPTMError(
                "save_checkpoint: there are gradients that no step has taken. Commit after step(), or drop them with "
                "optimizer.zero_grad()."
            )
        own_files: list[tuple[str, int]] = []
        if commits is not None:
            own_files = list(zip(commits.durable.files, self._parts.store.slot_counts))
        told = ranks.every((own_files, generator_states(self._parts.device)), "a commit")
        if commits is None:
            return  # the pages of another copy are in the commit
        records, content = buffer_space(persistent_buffers(self._module))
        header = make_header(
            plan=self._parts.plan,
            module=self._module,
            store_id=commits.durable.store_id,
            files=[file for files, _ in told for file in files],
            step=self._progress.global_step,
            config_hash=self._config.hash,
            precision=self._config.precision,
            optimizer_type=self._config.optimizer.type,
            param_groups=self._optimizer.param_groups,
            steps_of=self._progress.steps_of,
            buffers=records,
            buffer_bytes=len(content),
            rng=[generators for _, generators in told],
            scheduler=state_of(scheduler),
            data=state_of(data),
            client=state_of(client_state),
        )
        commits.begin(header, content, before_publish)

    def load(
        self,
        load_dir: str | Path | None,
        *,
        step: int | None,
        weights_only: bool,
        before_change: Callable[[], None],
    ) -> Resumed:
        """``before_change`` is called when nothing is left that could refuse the commit. On all ranks."""
        ranks = self._parts.ranks
        if load_dir is None:
            if self._config.checkpoint.folder is None:
                raise AngelPTMError("load_checkpoint: name a folder, as the config has no checkpoint.folder")
            load_dir = self._config.checkpoint.folder
        if self._parts.commits is not None:
            self._parts.commits.wait()
        folders = [one.path for one in self._config.tiers.ssd]
        with open_commit(Path(load_dir), step, self._parts.commits, folders, ranks) as (
            folder,
            manifest,
            reader,
            own_files,
        ):
            header = manifest.header

            def check() -> tuple[Restorer, list[str]]:
                restorer = self._restorer(folder, manifest, reader, own_files=own_files, weights_only=weights_only)
                if header.rng is not None and not weights_only:
                    check_generator_states(header.rng, str(folder))
                return restorer, check_buffers(self._module, header, str(folder))

            restorer, notes = ranks.together(check, "looking at a commit")
            before_change()
            self._progress.half_done = f"the load of the commit of step {header.step}"
            commits = self._parts.commits
            if commits is not None:
                commits.forget_device_pages()
            for unit in range(len(self._parts.leaves)):
                self._parts.residency.expire(unit)
            pages = ranks.together(restorer.weights if weights_only else restorer.pages, "reading a commit")
            restore_buffers(
                self._module, ranks.of_first(reader.buffers() if ranks.is_first else {}, "the buffers of a commit")
            )
            if commits is not None and not weights_only and folder.resolve() == commits.folder.resolve():
                commits.come_from(header.step)
        notes += self._start_anew() if weights_only else self._go_on(header)
        self._progress.half_done = ""
        for note in notes:
            _log.warning("%s", note)
        self.resumed = Resumed(
            folder,
            header.step,
            header.data,
            header.scheduler,
            None if weights_only else header.optimizer.groups,
            header.client or {},
            header.config_hash,
            pages,
            tuple(notes),
        )
        return self.resumed

    def _restorer(
        self, folder: Path, manifest: Manifest, reader: CommitReader, *, own_files: range, weights_only: bool
    ) -> Restorer:
        """Refuses a commit of another model or optimizer."""
        parts, mine, theirs = self._parts, self._config.optimizer.type, manifest.header.optimizer.type
        if not weights_only and theirs != mine:
            raise CheckpointError(
                str(folder),
                f"states of {theirs}",
                f"those of {mine}",
                "Set optimizer.type, or load the weights only.",
            )
        return Restorer(
            manifest,
            reader,
            own_files=own_files,
            weights_only=weights_only,
            store=parts.store,
            plan=parts.plan,
            catalogue=parts.catalogue,
            values=parts.values,
            device=parts.device,
            dtype=parts.dtype,
            path=str(folder),
        )

    def _start_anew(self) -> list[str]:
        for name in self._progress.steps_of:
            self._progress.steps_of[name] = 0
        self._progress.global_step = 0
        return ["the optimizer starts anew: masters are formed from the loaded weights, moments are zero"]

    def _go_on(self, header: Header) -> list[str]:
        for name in self._progress.steps_of:
            self._progress.steps_of[name] = header.optimizer.steps.get(name, 0)
        self._progress.global_step = header.step
        notes = []
        if header.rng is not None:
            notes = self._set_generators(header)
        if restore_groups(self._optimizer.param_groups, header.optimizer.groups):
            return notes
        return [*notes, "the parameter groups differ from the commit's: they keep what the config says"]

    def _set_generators(self, header: Header) -> list[str]:
        """Of as many ranks as there were, each gets its own; one that was not there gets numbers of its own."""
        ranks, saved = self._parts.ranks, header.rank_rng or (header.rng,)
        own = saved[ranks.index] if ranks.index < len(saved) else header.rng
        assert own is not None, "the caller has looked"
        set_generator_states(own, self._parts.device)
        if len(saved) == ranks.count:
            return []
        if ranks.index >= len(saved):
            torch.manual_seed(int(torch.randint(2**62, ()).item()) + ranks.index)
        return [f"{ranks.count} ranks go on from {len(saved)}: random numbers, as of dropout, are not those of before"]

    def restore_progress(self, scheduler: Stateful | None, data: Stateful | None) -> None:
        if self.resumed is None:
            raise AngelPTMError("restore_progress: no commit was loaded")
        if scheduler is not None and self.resumed.scheduler is not None:
            scheduler.load_state_dict(self.resumed.scheduler)
            if self.resumed.groups is not None:
                restore_groups(self._optimizer.param_groups, self.resumed.groups)
        if data is not None and self.resumed.data is not None:
            data.load_state_dict(self.resumed.data)
