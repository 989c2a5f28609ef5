"""The engine: one model, trained through the tiers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import angelptm_native as native
import torch
from torch import nn

from angelptm.checkpoint.disk import Disk
from angelptm.config import Config, load_config
from angelptm.engine.assembly import Parts, assemble
from angelptm.engine.dtypes import TORCH_DTYPES
from angelptm.engine.durability import Durability, Progress
from angelptm.engine.durable import open_durable, remove_new_slot_files
from angelptm.engine.export import LazyState, export_safetensors
from angelptm.engine.hooks import Hooks
from angelptm.engine.leaves import put
from angelptm.engine.optimizer import PagedOptimizer
from angelptm.engine.parked import ParkedParameter
from angelptm.engine.planning import Planning
from angelptm.engine.resume import Resumed
from angelptm.engine.scheduler import Scheduler
from angelptm.engine.setup import buffer_bytes_of, checkpoint_blocks, lay_out, param_groups, parameter, plan_of
from angelptm.engine.snapshot import Stateful
from angelptm.engine.stepping import Stepping
from angelptm.engine.timeline import Recording
from angelptm.engine.traffic import Traffic
from angelptm.errors import AngelPTMError, NonFiniteError
from angelptm.model.materialize import source_of
from angelptm.plan import Plan
from angelptm.ranks import Ranks, join
from angelptm.units import ParamLayout, Structure


class Engine:
    """Trains ``module``, the user's own model, whose parameters are in pages from here on.

    Made by :func:`angelptm.initialize`. Use it in either style::

        loss = engine(**batch).loss          loss = engine(**batch).loss
        engine.backward(loss)                loss.backward()
        engine.step()                        engine.optimizer.step()
                                             engine.optimizer.zero_grad()

    Not thread-safe: one thread drives it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        groups: Sequence[dict[str, Any]] | None = None,
        resume: str | Path | None = None,
        resume_step: int | None = None,
        faults: native.FaultPlan | None = None,
        disk: Disk | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """``resume``: the checkpoint folder, or the run folder, whose commit fills the pages; ``resume_step``: which
        one, the newest if None. ``faults`` and ``disk`` are for tests: what goes wrong below, and who watches.
        ``ranks``: who trains this model together, as ``angelptm.ranks.join`` finds them where it is None."""
        self.module = model
        self.config = config
        self.ranks = ranks or join(config)
        try:
            self._build(model, config, groups, resume, resume_step, faults, disk)
        except BaseException as error:
            self.ranks.leave(error)
            raise

    def _build(
        self,
        model: nn.Module,
        config: Config,
        groups: Sequence[dict[str, Any]] | None,
        resume: str | Path | None,
        resume_step: int | None,
        faults: native.FaultPlan | None,
        disk: Disk | None,
    ) -> None:
        structure, layouts = lay_out(model, config)
        self.plan: Plan = self.ranks.together(
            lambda: plan_of(structure, layouts, config, buffer_bytes_of(model), party=self.ranks.party), "planning"
        )
        self._params: dict[str, tuple[int, ParamLayout]] = {
            param.name: (layout.index, param) for layout in layouts for param in layout.params
        }
        self._first_name = {
            f"{module}.{attribute}" if module else attribute: param.name
            for _, param in self._params.values()
            for module, attribute in param.owners
        }
        trainable = [name for name, (_, param) in self._params.items() if param.trainable]
        names_by_id = {id(parameter(model, param.owners[0])): name for name, (_, param) in self._params.items()}
        named_groups = param_groups(trainable, config, groups, names_by_id)

        # Nothing was allocated until here.
        durable, slot_files = None, None
        if config.checkpoint.folder is not None and self.ranks.commits_pages:
            folders = [one.path for one in config.tiers.ssd]
            durable, slot_files = open_durable(
                config.checkpoint.folder, folders, self.plan, disk or Disk(), self.ranks.committing
            )
        with ExitStack() as undo:
            if durable is not None:
                undo.callback(durable.close)
                undo.callback(remove_new_slot_files, durable)
            parts = assemble(model, config, self.plan, durable, slot_files, faults, self._take_gradient, self.ranks)
            self._wire(parts, structure, named_groups)
            undo.callback(self._hooks.remove)
            if resume is None:
                self._fill(model)
            else:
                self._fill_from(Path(resume), resume_step)
            _move_buffers(model, self._device.torch_device)
            self._device.begin_steps()
            undo.pop_all()

    def _wire(self, parts: Parts, structure: Structure, named_groups: Sequence[dict[str, Any]]) -> None:
        """Puts the parts to work on the module."""
        self._store, self._device, self._updates = parts.store, parts.device, parts.updates
        self._gradients, self._values, self._commits = parts.gradients, parts.values, parts.commits
        self._catalogue, self._fetcher = parts.catalogue, parts.fetcher
        self._leaves, self._residency, self._swept = parts.leaves, parts.residency, parts.swept
        self._gatherer = parts.gatherer
        if self.config.gradient_checkpointing:
            checkpoint_blocks(self.module, structure)
        scheduler = Scheduler(structure.sites, parts.pages, parts.residency, parts.updates, parts.fetcher)
        compute_dtype = TORCH_DTYPES[self.config.precision]
        self._hooks = Hooks(self.module, structure.sites, self._residency, compute_dtype, scheduler, self._device)
        self._traffic = Traffic(self._store, self._device, self._updates, parts.fetcher, self._commits)
        parked = {name: self._leaves[unit].parked[name] for name, (unit, _) in self._params.items()}
        self.optimizer = PagedOptimizer(
            [{**group, "params": [parked[name] for name in group["params"]]} for group in named_groups],
            self.config.optimizer,
            self._take_step,
            self._drop_gradients,
            seed=self.config.training.seed,
        )
        self._progress = Progress({name: 0 for name, (_, param) in self._params.items() if param.trainable})
        self._planning = Planning(self.config, parts, structure.sites, self._hooks, scheduler, self.peak_bytes)
        self._stepping = Stepping(
            self.config,
            self.plan,
            self._leaves,
            self._gradients,
            self._updates,
            self._residency,
            self._commits,
            self.optimizer,
            self._progress,
            scheduler,
            self._gradient_came,
            lambda: self._planning.is_tracing,
            parts.swept,
            self.ranks,
        )
        self._durability = Durability(parts, self.module, self.config, self.optimizer, self._progress)
        self._recording: Recording | None = None
        self._record = partial(
            Recording, self.config, parts, structure.sites, self._hooks, self._planning, lambda: self.global_step
        )
        self._micro_step = 0
        self._max_norm: float | None = None
        self.grad_norm: float | None = None
        """The global gradient norm before clipping at the last step; None when nothing asked for it."""

    @property
    def device(self) -> torch.device:
        """Where the model computes. Inputs of the model are moved there."""
        return self._device.torch_device

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, those of the runs that this one goes on from included."""
        return self._progress.global_step

    def _fill_from(self, path: Path, step: int | None) -> None:
        """Instead of ``_fill``: a commit has the values."""
        for leaves in self._leaves:
            leaves.park()
        self.load_checkpoint(path, step=step)

    def _fill(self, model: nn.Module) -> None:
        """Moves the values into pages one unit at a time, and parks the parameters: each unit at once when the model
        holds its values, and all at the end when they are on the meta device, where an initialization may touch them.
        """
        source = source_of(model)
        for unit, leaves in enumerate(self._leaves):
            self._values.fill(unit, source.values(model, leaves.layout))
            if source.in_model:
                leaves.park()
        for leaves in self._leaves:
            leaves.park()

    # The training loop.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. Inputs are moved to the device; in bf16, floating-point ones are cast."""
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """``loss`` divided by ``gradient_accumulation_steps``, back through the model.

        Refused, with nothing changed, when it is called again before ``step`` and updates have begun. Raises
        NonFiniteError, with nothing changed, when the loss is inf or NaN. Whatever else it raises, the gradients are
        dropped, those of earlier micro-batches too, and the next call is the first of a new step.
        """
        last = self.config.gradient_accumulation_steps - 1
        self._stepping.require_none_begun(
            "engine.backward",
            f"Call step() after {last + 1} backward passes, set gradient_accumulation_steps, or execution.updates: "
            "forward.",
        )
        finite = bool(torch.isfinite(loss.detach()).all())
        if self.ranks.any(not finite, "whether the loss is finite"):
            self._drop_gradients()
            found = "not finite on another rank" if finite else str(float(loss.detach().float().mean()))
            raise NonFiniteError(
                f"step {self.global_step}: the loss is {found}. Parameters and states "
                "are those of the last good step. Lower optimizer.lr, set gradient_clipping, or look at the batch."
            )
        self._stepping.begin_backward(step_follows=self._micro_step == last)
        try:
            (loss / self.config.gradient_accumulation_steps).backward()  # type: ignore[no-untyped-call]
        except BaseException:
            self._hooks.abandon_backward()
            self._drop_gradients()
            raise
        self._stepping.end_backward()
        self._micro_step += 1

    def step(self) -> bool:
        """Takes the optimizer step if ``gradient_accumulation_steps`` backward passes are done; says whether it did."""
        if self._micro_step < self.config.gradient_accumulation_steps:
            return False
        self.optimizer.step()
        return True

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Lets the next step scale the gradients to a global L2 norm of at most ``max_norm``; returns the norm now.

        Refused when updates have begun inside ``backward``, whose gradients are gone.
        """
        self._stepping.require_none_begun(
            "clip_grad_norm_",
            "Set gradient_clipping, or execution.updates: forward, which updates nothing before step().",
        )
        self._max_norm = max_norm
        self._gradients.settle()
        return self._gradients.norm()

    def _take_gradient(self, unit: int, leaf: int, param: ParamLayout, gradient: torch.Tensor) -> None:
        self._stepping.take_gradient(unit, leaf, param, gradient)
        self._device.look_at_memory()  # gradients are the largest blocks that come and go

    def _gradient_came(self, unit: int, size: int, seconds: float) -> None:
        self._planning.gradient(unit, size, seconds)
        if self._recording is not None:
            self._recording.gradient(unit, size, seconds)

    def _drop_gradients(self) -> None:
        self._micro_step = 0
        self._max_norm = None
        self._stepping.drop()
        self._planning.drop()
        if self._recording is not None:
            self._recording.drop()

    def _take_step(self) -> None:
        self._stepping.begin_step()
        self._micro_step = 0
        max_norm = self._max_norm if self._max_norm is not None else self.config.gradient_clipping
        self._max_norm = None
        start = time.perf_counter()
        self.grad_norm = self._stepping.take_step(max_norm)
        self._planning.end_step()
        self._stepping.end_step()
        if self._recording is not None:
            self._recording.end_step(start)
            if self._recording.done:
                self._recording = None

    def drain(self) -> None:
        """Waits until every gradient of the steps so far is applied and published; raises what went wrong in an
        update. The next use of each unit sees its newest parameters."""
        self._updates.drain()
        self._residency.renew()

    # Durable states.

    @property
    def resumed(self) -> Resumed | None:
        """What the commit loaded last says besides values; None when none was."""
        return self._durability.resumed

    def save_checkpoint(
        self,
        save_dir: str | Path | None = None,
        *,
        client_state: Mapping[str, Any] | None = None,
        scheduler: Stateful | Mapping[str, Any] | None = None,
        data: Stateful | Mapping[str, Any] | None = None,
        before_publish: Callable[[], None] | None = None,
        wait: bool = False,
    ) -> None:
        """Commits the state after the last step: parameters, optimizer states and counters, buffers, generators, and
        what it is given. No state page is copied, and training may go on at once.

        ``scheduler`` and ``data`` are anything with ``state_dict``, or dicts; ``client_state`` is the caller's own; all
        of it must be JSON. Without ``wait`` the call returns while a thread completes the commit, whose error the next
        call of this engine that needs it raises; with it, when the commit survives a power cut. ``before_publish`` runs
        on that thread just before the commit appears. ``save_dir`` may only name the folder that the config gives:
        `angelptm checkpoint copy` makes copies elsewhere. Raises AngelPTMError between a backward pass and its step.
        """
        self._stepping.require_none_begun("save_checkpoint", "Commit after step().")
        self._durability.save(
            save_dir,
            client_state=client_state,
            scheduler=scheduler,
            data=data,
            before_publish=before_publish,
        )
        if wait:
            self.wait_for_checkpoint()

    def load_checkpoint(
        self,
        load_dir: str | Path | None = None,
        *,
        step: int | None = None,
        weights_only: bool = False,
        scheduler: Stateful | None = None,
        data: Stateful | None = None,
    ) -> tuple[Path, dict[str, Any]]:
        """Goes on from a commit: as if the run had never stopped, bit by bit. Returns (its folder, its client_state).

        ``load_dir``: a checkpoint folder or a run folder, this run's own if None; ``step`` which commit, the newest if
        None. Page size, tiers and budgets may differ from those of the run that made it. With ``weights_only`` the
        masters are formed from the commit's values and the optimizer starts anew: counters and moments are zero, the
        groups keep the options that they have.
        ``engine.resumed`` says the rest. Raises CheckpointError, with nothing changed, for a commit of another model,
        and CorruptPageError for a damaged one.
        """
        self.drain()
        self._updates.recall()
        resumed = self._durability.load(
            load_dir, step=step, weights_only=weights_only, before_change=self._drop_gradients
        )
        if not weights_only:
            self.restore_progress(scheduler=scheduler, data=data)
        return resumed.path, resumed.client_state

    def restore_progress(self, *, scheduler: Stateful | None = None, data: Stateful | None = None) -> None:
        """Puts a scheduler and a data position, built after the load, where the loaded commit has them.

        To build a torch scheduler sets the optimizer's lr to that of its first step, so loading the scheduler's own
        state is not enough: the groups get their options back too.
        """
        self._durability.restore_progress(scheduler, data)

    def wait_for_checkpoint(self) -> None:
        """Returns when the commit in the making, if there is one, survives a power cut; raises its error."""
        if self._commits is not None:
            self._commits.wait()

    @property
    def checkpoint_seconds(self) -> float:
        """Wall-clock seconds that the last completed commit took, on its own thread."""
        return self._commits.seconds if self._commits is not None else 0.0

    # Access to values.

    @contextmanager
    def gathered(
        self, params: str | torch.Tensor | Iterable[str | torch.Tensor], *, modify: bool = False
    ) -> Iterator[dict[str, nn.Parameter]]:
        """Real values of parameters, by name, and in their modules' attributes, inside the ``with`` block.

        ``params``: names, or the parameters that ``named_parameters`` gives. A tied one comes under its first name,
        whichever it was asked for by. The values are copies in compute precision;
        with ``modify`` they are the fp32 masters, and what they are at the end of the block is written back to both.
        """
        given = [params] if isinstance(params, (str, torch.Tensor)) else list(params)
        asked = [param if isinstance(param, str) else getattr(param, "param_name", "") for param in given]
        for name in asked:
            if name not in self._first_name:
                raise AngelPTMError(f"gathered: {name or 'a tensor'!r} is not a parameter of this engine's model")
        names = list(dict.fromkeys(self._first_name[name] for name in asked))
        real: dict[str, nn.Parameter] = {}
        for name in names:
            unit, param = self._params[name]
            value = self._values.read(unit, param, master=modify)
            real[name] = nn.Parameter(value, requires_grad=param.trainable)
            for module_name, attribute in param.owners:
                put(self.module.get_submodule(module_name), attribute, real[name])
        try:
            yield real
        finally:
            for name in names:
                unit, param = self._params[name]
                for module_name, attribute in param.owners:
                    put(self.module.get_submodule(module_name), attribute, self._leaves[unit].parked[name])
        if modify:
            for name, value in real.items():
                unit, param = self._params[name]
                self._updates.wait_for(unit)
                if self._commits is not None and not param.trainable:
                    self._commits.settle()  # it may be writing the parameter from the device
                    self._commits.forget_device_pages()
                if self._commits is not None:
                    self._commits.before_change(unit)
                self._values.write(unit, param, value)
                self._residency.expire(unit)

    def state_dict(self, *, master: bool = False) -> LazyState:
        """The model's parameters and buffers as a mapping that reads each value when it is asked for.

        ``dict(engine.state_dict())`` has them all in memory. With ``master``, trainable parameters come in fp32.
        """
        return LazyState(self.module, self._params, self._first_name, self._values, master=master)

    def export_safetensors(
        self, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9, master: bool = False
    ) -> list[Path]:
        """Writes the parameters as safetensors that transformers' ``from_pretrained`` loads; returns the files.

        One parameter at a time is in memory. ``config.json`` is written too where the model has a config. The folder
        gets complete files or none.
        """
        return export_safetensors(self.module, self.state_dict(master=master), Path(folder), max_shard_bytes)

    def parameter_names(self) -> list[str]:
        """Names of all parameters, each tied one once."""
        return list(self._params)

    # What happened.

    def traffic(self) -> dict[str, dict[str, int]]:
        """Bytes read from and written to each tier so far: ``{"device": {"read": ..., "written": ...}, ...}``."""
        return self._traffic.bytes()

    def peak_bytes(self) -> dict[str, int]:
        """Most bytes of each tier in use at once so far, in whole pages.

        On the SSD: pages that live there, and the slots that are kept free for updates in flight. What only commits
        hold comes on top of that.
        """
        page = self.plan.page_bytes
        return {
            "device": (self._residency.peak_frames + self.plan.device_state_frames) * page,
            "host": self._store.host_peak_count * page,
            "ssd": (self._store.ssd_page_peak_count + self.plan.update_slots) * page,
        }

    def prediction(self) -> dict[str, Any] | None:
        """What the plan says that a steady step takes, and the rates that it was made with, measured on this machine;
        None before enough steps were traced. In JSON: ``step_seconds``; ``busy_seconds`` by channel; ``stall_seconds``
        by cause; ``traffic_bytes`` by kind of page and link; ``peak_bytes`` by tier; ``bottleneck`` and
        ``second_bottleneck``, channels; ``rates``."""
        return self._planning.facts()

    @property
    def activation_bytes(self) -> int:
        """Most bytes that autograd kept for backward in any one forward pass."""
        return self._hooks.activation_bytes

    def phase_seconds(self) -> dict[str, float]:
        """Seconds spent so far, by phase; later ones lie inside the earlier ones or beside them on other threads."""
        update = self._updates.utilisation()
        return {
            "forward": self._hooks.forward_seconds,
            "backward": self._hooks.backward_seconds,
            "step": self._stepping.seconds,
            "fetch": self._residency.fetch_seconds,
            "gradient_copy": self._gradients.copy_seconds,
            "update_gate": self._updates.gate_seconds,
            "update_compute": update["compute_seconds"],
            "update_io_wait": update["wait_seconds"],
        }

    def gradient_counts(self) -> dict[str, int]:
        """Gradients of spans so far: ``produced`` by steps, ``taken`` by updating threads, ``applied`` with the states
        written; ``waiting`` are produced and not applied. All 0 in the synchronous mode, where none waits."""
        if self._swept is None:
            return dict.fromkeys(("produced", "taken", "applied", "waiting"), 0)
        counts = self._swept.facts().gradients
        return {**counts, "waiting": counts["produced"] - counts["applied"]}

    def staleness(self) -> list[dict[int, int]]:
        """For each unit: how often a step computed with parameters that lacked how many of its gradients, as
        {gradients: steps}. Empty in the synchronous mode, where none is ever lacking."""
        return [dict(counts) for counts in self._swept.staleness] if self._swept is not None else []

    def record_timeline(
        self, path: str | Path | None = None, *, steps: int = 3, tokens_per_step: int | None = None
    ) -> Recording:
        """Records the timeline of the next ``steps`` steps for `angelptm trace`, and saves it to ``path``; without one
        the caller saves the returned recording when it is ``done``. Ends a recording that is still under way."""
        if self._recording is not None:
            self._recording.stop()
        where = Path(path) if path is not None else None
        self._recording = self._record(steps=steps, tokens_per_step=tokens_per_step, path=where)
        return self._recording

    def notes(self) -> list[str]:
        """Sentences that say which I/O backend runs and why, and what makes it slower than it could be."""
        return list(self._store.notes)

    def close(self) -> None:
        """Waits for the updates and stops the updater's threads, also when an update failed, which it raises.

        The model's parameters stay parked.
        """
        with ExitStack() as last:
            last.callback(self.ranks.close)
            last.callback(self._device.close)
            if self._gatherer is not None:
                last.callback(self._gatherer.close)
            last.callback(self._residency.settle)  # fetches for a step that will not come
            last.callback(self._updates.close)
            last.callback(self._hooks.remove)
            if self._recording is not None:
                last.callback(self._recording.stop)
            if self._commits is not None:
                last.callback(self._commits.close)
            self._updates.prepare_close()
            self._updates.drain()


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, value in module._buffers.items():
            if value is not None and value.device != device:
                module._buffers[name] = value.to(device)


def initialize(
    model: nn.Module,
    config: Config | Mapping[str, Any] | str | Path,
    *,
    param_groups: Sequence[dict[str, Any]] | None = None,
    overrides: Sequence[str] = (),
    resume: str | Path | None = None,
) -> Engine:
    """Takes a model over: its parameters move into pages, and the returned engine trains it.

    ``config`` is a path, a dict or a Config; a dict with ``tiers``, ``page_size``, ``precision`` and ``optimizer`` is
    enough. ``model`` is any ``nn.Module`` with its values on the CPU, or one from :func:`angelptm.materialize`.
    ``param_groups`` are torch-style optimizer groups of the model's parameters; without them the config decides.
    ``resume`` names a checkpoint folder or run folder whose newest commit the engine goes on from; the model's own
    values are not used then, and ``restore_progress`` does the same for a scheduler and the data.
    Raises ConfigError or CapacityError before anything is allocated.
    """
    return Engine(model, load_config(config, overrides), groups=param_groups, resume=resume)


__all__ = ["Engine", "ParkedParameter", "initialize"]
