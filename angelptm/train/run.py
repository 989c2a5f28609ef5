"""One training run, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from angelptm.checkpoint.disk import Disk
from angelptm.config import Config
from angelptm.data import TokenBatches, open_dataset, open_tokenizer
from angelptm.engine import Engine
from angelptm.engine.setup import buffer_bytes_of, lay_out, plan_of
from angelptm.engine.timeline import Recording
from angelptm.errors import ConfigError
from angelptm.memory import peak_rss_bytes
from angelptm.model.materialize import build_model
from angelptm.plan import plan_summary
from angelptm.ranks import Ranks, join
from angelptm.sizes import format_bytes
from angelptm.train.endurance import drive_capacity_bytes, endurance
from angelptm.train.folder import OtherRanksRecords, RunFolder, RunRecords
from angelptm.train.lagging import Lagging
from angelptm.train.progress import ConsoleReporter, Reporter
from angelptm.train.result import RunResult
from angelptm.train.resume import choose_folders, go_on
from angelptm.train.scalars import Scalars
from angelptm.train.schedule import make_scheduler
from angelptm.train.stop import StopRequest, stop_on_signals

_PROMPT_TOKENS = 48
_RANK_SEEDS = 1_000_003
_SETTLED_STEP = 5
"""Of a run: the first that follows the plan made from all traced steps, as its predecessor did."""


def train(
    config: Config,
    reporter: Reporter,
    *,
    resume: bool = False,
    resume_from: Path | None = None,
    faults: Any = None,
    disk: Disk | None = None,
) -> RunResult:
    """Trains as configured and returns the figures; the run folder has them too.

    With ``resume`` the run in ``run_dir`` goes on from its newest commit, or starts where it has none yet. With
    ``resume_from``, a run folder or checkpoint folder, it goes on from that one's newest commit, in the same folder
    when the config names no other ``run_dir``. Raises ConfigError, CapacityError, DataError or CheckpointError before
    anything is allocated, and leaves nothing behind then; NonFiniteError when the loss stops being a number.
    ``faults``, a native FaultPlan, and ``disk`` are for tests, as Engine has them.

    Several ranks (torchrun) train together: the first one has the run folder and speaks, the others do their part.
    """
    _require_training(config)
    ranks = join(config)
    try:
        speaks = reporter if ranks.is_first else ConsoleReporter(Console(quiet=True))
        return _train_as(ranks, config, speaks, resume, resume_from, faults, disk)
    except BaseException as error:
        ranks.leave(error)
        raise


def _train_as(
    ranks: Ranks,
    config: Config,
    reporter: Reporter,
    resume: bool,
    resume_from: Path | None,
    faults: Any,
    disk: Disk | None,
) -> RunResult:
    def choose() -> tuple[Config, Path | None]:
        return choose_folders(config, resume, resume_from) if ranks.is_first else (config, None)

    config, source = ranks.of_first(ranks.together(choose, "choosing the run folder"), "the run folder")
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    torch.manual_seed(config.training.seed)
    with reporter.working("building the model"):
        model = build_model(config)
    _require_fit(model, config)
    buffer_bytes = buffer_bytes_of(model)
    # Refuses here, before anything is touched.
    ranks.together(lambda: plan_of(*lay_out(model, config), config, buffer_bytes, party=ranks.party), "planning")
    run_dir = config.run_dir
    assert run_dir is not None
    folder: RunRecords = ranks.together(
        lambda: RunFolder(run_dir, disk) if ranks.is_first else OtherRanksRecords(run_dir), "opening the run folder"
    )
    if not ranks.is_first:
        torch.manual_seed(config.training.seed + _RANK_SEEDS * ranks.index)  # dropout of its own
    try:
        return _train(model, config, folder, source, reporter, faults, disk, ranks)
    except KeyboardInterrupt:
        reporter.end()
        reporter.say(f"stopped; what happened until then is in {folder.path}" if folder.kept else "stopped")
        raise
    finally:
        reporter.end()
        folder.discard()


def _require_training(config: Config) -> None:
    if config.training.steps == 0:
        raise ConfigError("training.steps", 0, "the number of optimizer steps", "Set it, or --set training.steps=100.")


def _vocabulary(model: Any) -> int | None:
    text_config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    found: int | None = getattr(text_config, "vocab_size", None)
    return found


def _require_fit(model: Any, config: Config) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < config.data.sequence_length:
        raise ConfigError(
            "data.sequence_length",
            config.data.sequence_length,
            f"at most {longest}, the positions that the model has",
        )


def _train(
    model: Any,
    config: Config,
    folder: RunRecords,
    source: Path | None,
    reporter: Reporter,
    faults: Any,
    disk: Disk | None,
    ranks: Ranks,
) -> RunResult:
    with reporter.working("reading the data") as tick:

        def read() -> tuple[TokenBatches, TokenBatches | None]:
            seed, vocabulary = config.training.seed, _vocabulary(model)
            found = open_dataset(config.data, seed, folder.tokens, vocabulary, tick, ranks.index, ranks.count)
            found[0].batch(0)  # tokens that do not fit the model mostly show at once
            return found

        # The first rank writes the tokens of text, and the others find them.
        first = ranks.together(lambda: read() if ranks.is_first else None, "reading the data")
        training, validation = ranks.together(lambda: first or read(), "reading the data")
    with reporter.working("filling the pages" if source is None else f"resuming from {source}"):
        engine = Engine(model, config, resume=source, faults=faults, disk=disk, ranks=ranks)
    result = RunResult(
        model=config.model.preset or str(getattr(model.config, "model_type", type(model).__name__)),
        parameters=sum(unit.layout.numel for unit in engine.plan.units),
        tokens_per_step=config.data.sequence_length
        * config.data.micro_batch_size
        * config.gradient_accumulation_steps
        * ranks.count,
        budget_bytes=_budgets(engine),
        config_hash=config.hash,
        run_dir=str(folder.path),
        rank=ranks.index,
        ranks=ranks.count,
    )
    try:
        resumed = engine.resumed
        result.resumed_from_step = resumed.step if resumed is not None else None
        former = folder.keep(config, plan_summary(engine.plan), result.resumed_from_step)
        _announce(result, engine, training, reporter)
        scheduler = make_scheduler(engine.optimizer, config.schedule, config.training.steps)
        if resumed is not None:
            go_on(engine, resumed, former, result, training, scheduler, config, reporter)
        else:
            if config.model.weights is not None:
                reporter.say(f"weights from {config.model.weights}: the fp32 masters are formed from them")
            result.validation_loss_before = _evaluate(engine, validation, config, reporter)
        with _scalars(ranks, folder.path, result, former) as scalars:
            if resumed is None and scalars is not None:
                scalars.step({"step": 0, "validation_loss": result.validation_loss_before})
            with stop_on_signals(reporter.say, enabled=config.checkpoint.every > 0) as stop:
                _steps(engine, training, validation, scheduler, config, folder, scalars, reporter, result, stop)
            result.validation_loss_after = _evaluate(engine, validation, config, reporter)
            if scalars is not None:
                scalars.step({"step": config.training.steps, "validation_loss": result.validation_loss_after})
        if config.training.sample_tokens and hasattr(model, "generate"):
            result.sample = _sample(engine, validation or training, config, reporter)
        result.peak_rss_bytes = peak_rss_bytes()
        engine.wait_for_checkpoint()
        folder.finish(result.to_json())
    except BaseException as error:
        ranks.leave(error)  # before what is under way is waited for
        raise
    finally:
        engine.close()
    return result


def _scalars(
    ranks: Ranks, path: Path, result: RunResult, former: list[dict[str, Any]]
) -> AbstractContextManager[Scalars | None]:
    if not ranks.is_first:
        return nullcontext()
    return closing(Scalars(path, result.tokens_per_step, former, result.resumed_from_step))


def _budgets(engine: Engine) -> dict[str, int]:
    plan = engine.plan
    return {
        "device": engine.config.tiers.device,
        "host": engine.config.tiers.host,
        "ssd": plan.ssd_slots * plan.page_bytes,
    }


def _announce(result: RunResult, engine: Engine, training: TokenBatches, reporter: Reporter) -> None:
    reporter.say(
        f"{result.model}: {result.parameters / 1e6:.1f} M parameters in {len(engine.plan.units)} units, "
        f"pages of {format_bytes(engine.plan.page_bytes)}, {engine.config.precision}; "
        f"{len(training.tokens) / 1e6:.1f} M training tokens"
    )
    for kind, tiers in engine.plan.kind_bytes.items():
        homes = ", ".join(f"{format_bytes(size)} on {tier}" for tier, size in tiers.items() if size)
        reporter.say(f"  {kind:<10} {homes}")
    for note in engine.notes():
        reporter.say(f"  I/O: {note}")


def _steps(
    engine: Engine,
    training: TokenBatches,
    validation: TokenBatches | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: Config,
    folder: RunRecords,
    scalars: Scalars | None,
    reporter: Reporter,
    result: RunResult,
    stop: StopRequest,
) -> None:
    former_bytes = result.bytes
    before, phases_before = engine.traffic(), engine.phase_seconds()
    evaluated: dict[str, dict[str, int]] = {tier: {"read": 0, "written": 0} for tier in before}
    engine.module.train()
    reporter.begin(config.training.steps)
    commit_seconds = 0.0
    recording: Recording | None = None
    lagging = Lagging(engine) if config.update.is_swept else None
    first_recorded, recorded = _recorded_steps(engine.global_step, config)
    for step in range(engine.global_step + 1, config.training.steps + 1):
        if recorded and step == first_recorded:
            recording = engine.record_timeline(steps=recorded, tokens_per_step=result.tokens_per_step)
        start = time.perf_counter() - commit_seconds  # the commit's call belongs to the step that follows it
        stalled = _stalled_seconds(engine)
        loss = _micro_steps(engine, training, config.gradient_accumulation_steps)
        engine.step()
        loss = engine.ranks.mean(loss, "the loss of all ranks")
        lr = scheduler.get_last_lr()[0]
        scheduler.step()
        if step == config.training.steps:
            engine.drain()  # the last step's update belongs to its time
        seconds = time.perf_counter() - start
        if recording is not None and recording.done:
            if engine.ranks.is_first:
                _save_recording(recording, folder, reporter)
            recording = None
        result.losses.append(loss)
        result.step_seconds.append(seconds)
        moved = _difference(_difference(engine.traffic(), before), evaluated)
        if former_bytes:
            moved = _sum(moved, former_bytes)
        result.bytes = moved
        line = {"step": step, "loss": loss, "lr": lr, "grad_norm": engine.grad_norm, "seconds": seconds, "bytes": moved}
        if lagging is not None:
            line["updates"] = lagging.step()
        folder.record(line)
        if scalars is not None:
            scalars.step(line, _stalled_seconds(engine) - stalled)
        if step % config.training.log_every == 0 or step == config.training.steps:
            reporter.step(step, loss, result.tokens_per_s, moved)
        if config.training.eval_every and step % config.training.eval_every == 0 and step < config.training.steps:
            mark = engine.traffic()
            held_out = _evaluate(engine, validation, config, reporter)
            evaluated = _sum(evaluated, _difference(engine.traffic(), mark))
            folder.record({"step": step, "validation_loss": held_out})
            if scalars is not None:
                scalars.step({"step": step, "validation_loss": held_out})
        commit_seconds = 0.0
        # Once, as it may change meanwhile.
        stopping = engine.ranks.any(stop.asked, "whether to stop")
        last = stopping or step == config.training.steps
        if config.checkpoint.every and (step % config.checkpoint.every == 0 or last):
            commit_seconds = _commit(engine, training, scheduler, folder, result)
        if stopping:
            engine.wait_for_checkpoint()
            reporter.say(f"step {step} is committed; --resume goes on after it")
            raise KeyboardInterrupt
    reporter.end()
    result.bytes = result.bytes or evaluated
    result.endurance = endurance(
        result.bytes["ssd"]["written"],
        len(result.step_seconds),
        sum(result.step_seconds),
        drive_capacity_bytes(config.tiers.ssd),
    )
    if lagging is not None:
        result.updates = lagging.whole()
    result.phase_seconds = {name: seconds - phases_before[name] for name, seconds in engine.phase_seconds().items()}
    result.peak_bytes = engine.peak_bytes()
    result.activation_bytes = engine.activation_bytes


def _recorded_steps(taken: int, config: Config) -> tuple[int, int]:
    """The first step whose timeline is recorded, and how many: once the plan is settled where the run is long enough,
    else the last ones."""
    count = min(config.execution.timeline_steps, config.training.steps - taken)
    return min(taken + _SETTLED_STEP, config.training.steps - count + 1), count


def _save_recording(recording: Recording, folder: RunRecords, reporter: Reporter) -> None:
    try:
        recording.save_run(folder.path)
    except OSError as error:
        reporter.say(f"the timeline could not be written, training goes on: {error}")


def _micro_steps(engine: Engine, training: TokenBatches, count: int) -> float:
    """Forward and backward of one optimizer step; the mean loss."""
    loss = 0.0
    for _ in range(count):
        output = engine(**next(training))
        engine.backward(output.loss)
        loss += float(output.loss.detach()) / count
        del output
    return loss


def _commit(
    engine: Engine,
    training: TokenBatches,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    folder: RunRecords,
    result: RunResult,
) -> float:
    """Starts a commit; returns the seconds for which training stood still."""
    start = time.perf_counter()
    client = {"validation_loss_before": result.validation_loss_before}
    engine.save_checkpoint(scheduler=scheduler, data=training, client_state=client, before_publish=folder.sync)
    result.commits += 1
    result.commit_seconds.append(time.perf_counter() - start)
    return result.commit_seconds[-1]


def _stalled_seconds(engine: Engine) -> float:
    """How long forward and backward have waited for pages and updates so far."""
    phases = engine.phase_seconds()
    return phases["fetch"] + phases["update_gate"]


_Traffic = Mapping[str, Mapping[str, int]]


def _difference(later: _Traffic, earlier: _Traffic) -> dict[str, dict[str, int]]:
    return {tier: {way: size - earlier[tier][way] for way, size in both.items()} for tier, both in later.items()}


def _sum(one: _Traffic, other: _Traffic) -> dict[str, dict[str, int]]:
    return {tier: {way: size + other[tier][way] for way, size in both.items()} for tier, both in one.items()}


def _evaluate(engine: Engine, validation: TokenBatches | None, config: Config, reporter: Reporter) -> float | None:
    """Mean loss over the first batches of the validation set, always the same ones; None without one."""
    if validation is None:
        return None
    count = min(config.training.eval_batches, max(1, validation.sample_count // config.data.micro_batch_size))
    engine.drain()  # where nothing waits for updates, the parameters have all gradients so far
    engine.module.eval()
    total, ranks = 0.0, engine.ranks
    with torch.no_grad():
        for first in range(0, count, ranks.count):  # as many on each rank, as they gather parameters together
            index = first + ranks.index
            loss = float(engine(**validation.batch(index % count)).loss)
            total += loss if index < count else 0.0
    total = ranks.add(total, "the validation loss")
    engine.module.train()
    reporter.say(f"validation loss {total / count:.4f} over {count} batches")
    return total / count


def _sample(engine: Engine, batches: TokenBatches, config: Config, reporter: Reporter) -> str:
    """Text that the model writes after the configured prompt, or after the beginning of a held-out sample."""
    tokenizer = open_tokenizer(config.data.tokenizer)
    prompt = batches.batch(0)["input_ids"][:1, :_PROMPT_TOKENS]
    if config.training.sample_prompt is not None:
        prompt = torch.tensor([tokenizer.encode_text(config.training.sample_prompt)])
    longest = getattr(engine.module.config, "max_position_embeddings", None) or 2**31
    prompt = prompt.to(engine.device)
    engine.drain()
    engine.module.eval()
    with reporter.working("writing a sample"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model: Any = engine.module
        generated = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max(1, min(config.training.sample_tokens, longest - prompt.shape[1])),
            do_sample=True,
            top_k=40,
            pad_token_id=0,
        )
    engine.module.train()
    return tokenizer.decode(generated[0].tolist())
