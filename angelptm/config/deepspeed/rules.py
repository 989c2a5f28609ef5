"""How DeepSpeed's keys become ours, one function for each theme.

Defaults that differ are written out: DeepSpeed's Adam has no weight decay unless told, torch's AdamW has 0.01.
"""

from __future__ import annotations

from angelptm.config.deepspeed.translation import Translation
from angelptm.errors import ConfigError

_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "lion": "lion", "sgd": "sgd"}
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_TIERS = {"none": "device", "cpu": "host", "nvme": "ssd"}
_COSINE_FLOOR = 0.0001  # WarmupCosineLR's default of cos_min_ratio


def batch(keys: Translation) -> None:
    """train_batch_size = micro batch × accumulation × processes, and there is one process."""
    total = keys.take_number("train_batch_size", int, 1)
    micro = keys.take_number("train_micro_batch_size_per_gpu", int, 1)
    accumulation = keys.take_number("gradient_accumulation_steps", int, 1)
    if total is not None:
        found = {"total": total, "micro": micro, "accumulation": accumulation}
        micro = micro or (total // accumulation if accumulation else total)
        accumulation = accumulation or max(1, total // micro)
        if micro * accumulation != total:
            given = " x ".join(str(value) for name, value in found.items() if name != "total" and value is not None)
            remedy = (
                f"Keep train_batch_size by gradient_accumulation_steps: {total // micro}. "
                if total % micro == 0
                else ""
            )
            raise ConfigError(
                "train_batch_size",
                total,
                f"micro batch x accumulation of one process ({given} given)",
                f"{remedy}Or remove train_batch_size.",
            )
        keys.note("train_batch_size", total, "mapped", "gradient_accumulation_steps", f"{micro} x {accumulation}")
        if found["micro"] is None:
            keys.put("data.micro_batch_size", micro)
        if found["accumulation"] is None:
            keys.put("gradient_accumulation_steps", accumulation)
        micro, accumulation = found["micro"], found["accumulation"]
    if micro is not None:
        keys.map("train_micro_batch_size_per_gpu", micro, "data.micro_batch_size", micro)
    if accumulation is not None:
        keys.map("gradient_accumulation_steps", accumulation, "gradient_accumulation_steps", accumulation)


def numerics(keys: Translation) -> None:
    """Precision and clipping."""
    half = keys.take_flag("fp16.enabled")
    if half:
        raise ConfigError("fp16.enabled", True, "false", "fp16 is not offered; use bf16: {enabled: true} instead.")
    if half is not None:
        keys.note("fp16.enabled", False, "mapped", "precision")
    for key in ("bf16.enabled", "bfloat16.enabled"):
        enabled = keys.take_flag(key)
        if enabled is not None:
            keys.map(key, enabled, "precision", "bf16" if enabled else "fp32")
    norm = keys.take_number("gradient_clipping", float, 0)
    if norm is not None:
        keys.map("gradient_clipping", norm, "gradient_clipping", norm or None)


def optimizer(keys: Translation) -> None:
    name = keys.take("optimizer.type")
    if name is None:
        return
    rule = _OPTIMIZERS.get(str(name).lower())
    if rule is None:
        raise ConfigError("optimizer.type", name, "Adam, AdamW, Lion or SGD", "Other update rules are not offered.")
    keys.map("optimizer.type", name, "optimizer.type", rule)
    torch_adam = keys.take_flag("optimizer.params.torch_adam")
    if torch_adam is not None:
        keys.note("optimizer.params.torch_adam", torch_adam, "ignored", why="the kernel is this package's own")
    decay_default = 0.01 if rule == "adamw" and torch_adam else 0.0
    decay = keys.take_number("optimizer.params.weight_decay", float, 0)
    if decay is None:
        keys.put("optimizer.weight_decay", decay_default)
        decay = decay_default
    else:
        keys.map("optimizer.params.weight_decay", decay, "optimizer.weight_decay", decay)
    decoupled = keys.take_flag("optimizer.params.adam_w_mode")
    if decoupled is False and str(name).lower() == "adam" and decay != 0:
        raise ConfigError(
            "optimizer.params.adam_w_mode",
            False,
            "true, or weight_decay 0",
            "Adam with L2 regularization is not offered.",
        )
    if decoupled is not None:
        keys.note("optimizer.params.adam_w_mode", decoupled, "mapped", "optimizer.type")
    for param in ("lr", "betas", "eps", "momentum", "dampening", "nesterov"):
        key = f"optimizer.params.{param}"
        value = keys.take(key)
        if value is not None:
            keys.map(key, value, f"optimizer.{param}", value)


def scheduler(keys: Translation) -> None:
    """After optimizer: warmup_max_lr replaces the optimizer's lr, as in DeepSpeed."""
    name = keys.take("scheduler.type")
    if name is None:
        return
    if not isinstance(name, str) or name not in _SCHEDULES:
        raise ConfigError(
            "scheduler.type",
            name,
            f"one of {', '.join(_SCHEDULES)}",
            "Or remove the scheduler and put torch's on engine.optimizer.",
        )
    shape = _SCHEDULES[name]
    keys.map("scheduler.type", name, "schedule.type", shape)
    steps = keys.take_number("scheduler.params.total_num_steps", int, 1)
    if steps is not None:
        keys.map("scheduler.params.total_num_steps", steps, "training.steps", steps)
    peak = keys.take_number("scheduler.params.warmup_max_lr", float, 0)
    if peak is not None:
        keys.map("scheduler.params.warmup_max_lr", peak, "optimizer.lr", peak)
    _warmup(keys)
    floor = keys.take_number("scheduler.params.cos_min_ratio", float, 0)
    if floor is not None:
        keys.map("scheduler.params.cos_min_ratio", floor, "schedule.min_lr_ratio", floor)
    elif shape == "cosine":
        keys.put("schedule.min_lr_ratio", _COSINE_FLOOR)


def _warmup(keys: Translation) -> None:
    key = "scheduler.params.warmup_num_steps"
    steps = keys.take_number(key, int, 0)
    kind = keys.take("scheduler.params.warmup_type")
    if steps is not None:
        why = "" if kind == "linear" else "warms up linearly; DeepSpeed's default is logarithmic"
        keys.map(key, steps, "schedule.warmup_steps", steps, why)
    if kind is not None:
        linear = kind == "linear"
        keys.note(
            "scheduler.params.warmup_type", kind, "mapped" if linear else "approximated", why="warmup is linear here"
        )
    for name in ("warmup_min_lr", "warmup_min_ratio"):
        low = keys.take_number(f"scheduler.params.{name}", float, 0)
        if low is not None:
            keys.note(f"scheduler.params.{name}", low, "approximated" if low else "mapped", why="warmup begins at 0")


def offload(keys: Translation) -> None:
    """Where DeepSpeed offloads to is the home tier here. Stages differ in nothing else: every kind is paged."""
    stage = keys.take_number("zero_optimization.stage", int, 0)
    if stage is not None:
        keys.note("zero_optimization.stage", stage, "ignored", why="every kind is paged, whatever the stage")
    for key, target in (("cpu_offload", "states"), ("cpu_offload_param", "param"), ("cpu_offload_params", "param")):
        flag = keys.take_flag(f"zero_optimization.{key}")
        if flag is not None:
            keys.map(f"zero_optimization.{key}", flag, f"placement.{target}", "host" if flag else "auto")
    for kind, target in (("offload_optimizer", "states"), ("offload_param", "param")):
        _offload_kind(keys, f"zero_optimization.{kind}", f"placement.{target}")


def _offload_kind(keys: Translation, section: str, target: str) -> None:
    device, folder = keys.take(f"{section}.device"), keys.take(f"{section}.nvme_path")
    if device is not None:
        if not isinstance(device, str) or device not in _TIERS:
            raise ConfigError(f"{section}.device", device, "'none', 'cpu' or 'nvme'")
        if device == "none" and target == "placement.states":
            keys.map(f"{section}.device", device, target, "auto", "states are never on the device here")
        else:
            keys.map(f"{section}.device", device, target, _TIERS[device])
    if folder is None:
        return
    if device != "nvme":
        keys.note(f"{section}.nvme_path", folder, "ignored", why="the device is not nvme")
        return
    if not isinstance(folder, str):
        raise ConfigError(f"{section}.nvme_path", folder, "the path of a folder")
    folders = keys.result.setdefault("tiers", {}).setdefault("ssd", [])
    if {"path": folder} not in folders:
        folders.append({"path": folder})
    keys.note(f"{section}.nvme_path", folder, "mapped", "tiers.ssd")


def machinery(keys: Translation) -> None:
    """I/O, logging, activation checkpointing."""
    depth = keys.take_number("aio.queue_depth", int, 1)
    if depth is not None:
        keys.map("aio.queue_depth", depth, "io.queue_depth", depth)
    interval = keys.take_number("steps_per_print", float, 1)
    if interval is not None:
        endless = interval > 2**31  # people write inf or 1e9 for "never"
        keys.map("steps_per_print", interval, "training.log_every", 2**31 if endless else int(interval))
    names = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "number_checkpoints")
    for name in names:
        key = f"activation_checkpointing.{name}"
        value = keys.take(key)
        if value:
            keys.map(key, value, "gradient_checkpointing", True)
        elif value is not None:
            keys.note(key, value, "ignored", why="off")


RULES = (batch, numerics, optimizer, scheduler, offload, machinery)
"""In this order."""
