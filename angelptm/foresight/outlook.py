"""What a step will take before any has run: on this machine, which is measured, or on one that a file describes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from angelptm.config import Config
from angelptm.config.schema import Hardware
from angelptm.engine.measure import usual_formats
from angelptm.engine.planning import settings_of
from angelptm.errors import CapacityError, ConfigError
from angelptm.foresight.machine import measure_machine
from angelptm.foresight.step import ComputeRates, Foreseen, Operators, Roofline, Timed, foresee
from angelptm.memory import PROCESS_BYTES, gpu_memory_bytes, host_memory
from angelptm.plan import NOMINAL_RATES, ChannelRates, Plan, Prediction, Rates, Trace, choose, rates_for
from angelptm.sizes import format_bytes
from angelptm.states.formats import FP32

_CHOOSING_SECONDS = 20.0
_FEW, _MANY = 3, 48  # micro-batches that are simulated: at least, and at most
CONTEXT_BYTES = 768 * 2**20
"""What CUDA and its libraries take of a GPU's memory."""
_UNHINDERED = 1e18  # of a channel that nothing waits for, per second


@dataclass(frozen=True)
class Target:
    """A machine, as far as steps are concerned. ``rates`` gives those that a plan's pages meet; ``device_bytes`` is
    None where the device's memory is the host's."""

    name: str
    rates: Callable[[Plan], Rates]
    compute: ComputeRates
    operators: Operators
    host_bytes: int
    device_bytes: int | None


def this_machine(config: Config) -> Target:
    """Measures for some seconds; see measure_machine."""
    rates, compute, device = measure_machine(config)
    on_gpu = device.type == "cuda"
    return Target(
        name="this machine",
        rates=lambda _: rates,
        compute=compute,
        operators=Timed(compute, config.precision, device),
        host_bytes=host_memory().allowed_bytes,
        device_bytes=gpu_memory_bytes(device.index or 0) if on_gpu else None,
    )


def described_machine(hardware: Hardware, config: Config) -> Target:
    """As a hardware file has it. Raises ConfigError where the file says too little, or is of another kind of device."""
    where = str(config.hardware)
    if hardware.device is None or hardware.host is None:
        missing = "device" if hardware.device is None else "host"
        raise ConfigError(f"{where}: {missing}", None, "a description", "`angelptm measure` writes the whole file.")
    kind = "cuda" if config.device.startswith("cuda") else "cpu"
    if hardware.device.kind != kind:
        raise ConfigError(
            f"{where}: device.kind", hardware.device.kind, f"{kind}, as the config says device: {config.device}"
        )
    if kind == "cuda" and hardware.links is None:
        raise ConfigError(f"{where}: links", None, "rates between host and device")
    if config.tiers.ssd and not hardware.ssd:
        raise ConfigError(f"{where}: ssd", [], "rates of a folder, as the config has an SSD tier")
    device = hardware.device
    compute = ComputeRates(
        {"fp32": device.flops_per_s.fp32, "bf16": device.flops_per_s.bf16},
        memory_bytes_per_s=device.memory_bytes_per_s,
        cached_bytes_per_s=device.cached_bytes_per_s,
        cache_bytes=device.cache,
        call_seconds=device.call_seconds,
    )
    return Target(
        name=device.name or where,
        rates=lambda plan: rates_for(plan, _channels(hardware, plan, len(config.tiers.ssd))),
        compute=compute,
        operators=Roofline(compute, config.precision),
        host_bytes=hardware.host.memory,
        device_bytes=device.memory if kind == "cuda" else None,
    )


def _channels(hardware: Hardware, plan: Plan, folders: int) -> ChannelRates:
    """Of the file, for a tier of so many folders: pages are striped over them, so that the slowest sets the pace."""
    host, links = hardware.host, hardware.links
    assert host is not None
    assert hardware.device is not None
    used = hardware.ssd[: max(1, folders)]

    def together(name: str, otherwise: float) -> float:
        return len(used) * min((getattr(one, name) for one in used), default=otherwise)

    formats = usual_formats(plan)
    updates = host.update_elements_per_s
    update = updates.fp32
    if formats != FP32:
        moments = {formats.exp_avg, formats.exp_avg_sq}
        update = (updates.int8 if "int8" in moments else updates.bf16 if "bf16" in moments else None) or update
    if host.memory_bytes_per_s is not None:
        update = min(update, host.memory_bytes_per_s / _updated_bytes(plan) / plan.update_threads)
    return ChannelRates(
        ssd_read_bytes_per_s=together("read_bytes_per_s", NOMINAL_RATES.ssd_read_bytes_per_s),
        ssd_write_bytes_per_s=together("write_bytes_per_s", NOMINAL_RATES.ssd_write_bytes_per_s),
        ssd_mixed_bytes_per_s=together("mixed_bytes_per_s", NOMINAL_RATES.ssd_mixed_bytes_per_s),
        ssd_latency_seconds=max((one.latency_seconds for one in used), default=NOMINAL_RATES.ssd_latency_seconds),
        host_to_device_bytes_per_s=host.copy_bytes_per_s if links is None else links.host_to_device_bytes_per_s,
        device_to_host_bytes_per_s=host.copy_bytes_per_s if links is None else links.device_to_host_bytes_per_s,
        update_elements_per_s=update,
        checksum_bytes_per_s=host.checksum_bytes_per_s,
        gradient_bytes_per_s=host.accumulate_bytes_per_s,
        cores=host.cores,
        compute_uses_cores=hardware.device.kind == "cpu",
    )


def _updated_bytes(plan: Plan) -> float:
    """Memory traffic of an element's update: states, gradient and parameter."""
    spans = [span for unit in plan.units for span in unit.spans]
    states = sum(page.bytes for span in spans for page in span.states.pages)
    old_params = plan.param_itemsize if plan.splits_masters else 0
    return (
        2 * states / (sum(span.elements for span in spans) or 1) + plan.grad_itemsize + plan.param_itemsize + old_params
    )


@dataclass(frozen=True)
class Outlook:
    """A step, all its micro-batches included; ``prediction`` and ``trace`` are of ``micro_batches`` of them. ``mfu``
    is a part of 1; ``activation_bytes`` and ``workspace_bytes`` are beside the device arena; ``steps_behind`` is None
    unless the mode lets parameters lack gradients."""

    prediction: Prediction
    trace: Trace
    micro_batches: int
    step_seconds: float
    tokens_per_step: int
    model_flops: int
    mfu: float
    activation_bytes: int
    workspace_bytes: int
    ssd_written_bytes: int
    steps_behind: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def ssd_written_bytes_per_day(self) -> float:
        return self.ssd_written_bytes * 86400 / self.step_seconds

    def facts(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "micro_batches": self.micro_batches,
            "step_seconds": self.step_seconds,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "model_flops": self.model_flops,
            "activation_bytes": self.activation_bytes,
            "workspace_bytes": self.workspace_bytes,
            "ssd_written_bytes_per_day": self.ssd_written_bytes_per_day,
            "steps_behind": self.steps_behind,
        }


def look_ahead(model: nn.Module, config: Config, plan: Plan, target: Target) -> Outlook:
    """A step of ``model``, which needs no values, as the simulator sees it."""
    return outlook_of(foresee(model, config, plan, target.operators), config, plan, target, _CHOOSING_SECONDS)


def outlook_of(foreseen: Foreseen, config: Config, plan: Plan, target: Target, seconds: float) -> Outlook:
    """Of a step of the config, a micro-batch of which has been foreseen. ``seconds``: to choose a schedule in."""
    count = config.gradient_accumulation_steps
    rates, (settings, lead) = target.rates(plan), settings_of(config)
    waited = rates
    if config.update.is_swept:  # nobody waits for an update, nor for the drive, which only states use
        waited = replace(
            rates,
            ssd_read_bytes_per_s=_UNHINDERED,
            ssd_write_bytes_per_s=_UNHINDERED,
            ssd_mixed_bytes_per_s=_UNHINDERED,
            update_elements_per_s=_UNHINDERED,
        )
    # On a device of its own, gradients leave while it computes on.
    copies = waited.gradient_bytes_per_s if waited.compute_uses_cores else _UNHINDERED

    def simulated(micro_batches: int, seconds: float) -> tuple[Trace, Prediction]:
        trace = foreseen.repeated(micro_batches).with_gradient_copies(copies)
        return trace, choose(plan, trace, waited, settings, lead=lead, seconds=seconds)[1]

    micro_batches = min(count, _FEW)
    trace, prediction = simulated(micro_batches, seconds)
    step, uses = prediction.step_seconds, len(foreseen.trace.uses)
    if count > _FEW:
        # So many that what the drive and the updates still do of the former step is done while they compute.
        inner = _inner_seconds(prediction, uses)
        micro_batches = min(count, _MANY, _FEW + math.ceil(step / inner))
        trace, prediction = simulated(micro_batches, 0.0)
        step = prediction.step_seconds + (count - micro_batches) * _inner_seconds(prediction, uses)
    flops = foreseen.model_flops * count
    # Filling the pages and the first steps, which move everything on demand, come before the steady step.
    first = {"device": plan.arena.peak_frames * plan.page_bytes}
    if plan.ssd_slots > plan.commit_slots:
        first["host"] = plan.host_frames * plan.page_bytes
    peaks = {tier: max(size, first.get(tier, 0)) for tier, size in prediction.peak_bytes.items()}
    return Outlook(
        prediction=replace(prediction, peak_bytes=peaks),
        trace=trace,
        micro_batches=micro_batches,
        step_seconds=step,
        tokens_per_step=foreseen.trace.tokens_per_step * count,
        model_flops=flops,
        mfu=flops / step / target.compute.flops_per_s[config.precision],
        activation_bytes=foreseen.activation_bytes,
        workspace_bytes=foreseen.workspace_bytes,
        ssd_written_bytes=sum(link["ssd_written"] for link in prediction.traffic.values()),
        steps_behind=_steps_behind(plan, rates, prediction, step) if config.update.is_swept else None,
    )


def _inner_seconds(prediction: Prediction, uses: int) -> float:
    """Of the second of several micro-batches of so many uses: no update is waited for, and none begins in it."""
    entered = [
        event.start
        for event in prediction.events
        if event.lane == "compute" and event.name.split(" ", 1)[0] in ("forward", "recompute", "backward")
    ]
    if len(entered) <= 2 * uses:  # of steps of which none is like the one before
        return prediction.step_seconds / _FEW
    return entered[2 * uses] - entered[uses]


def _steps_behind(plan: Plan, rates: Rates, prediction: Prediction, step_seconds: float) -> float:
    """How many steps one update of everything takes."""
    traffic = prediction.traffic.values()
    drive = sum(link["ssd_read"] + link["ssd_written"] for link in traffic) / rates.ssd_mixed_bytes_per_s
    elements = sum(span.elements for unit in plan.units for span in unit.spans)
    return max(drive, elements / rates.update_elements_per_s / plan.update_threads) / step_seconds


@dataclass(frozen=True)
class Need:
    """Bytes of one tier's memory, and for what."""

    what: str
    bytes: int


def device_needs(plan: Plan, activations: int, workspace: int) -> list[Need]:
    """Of a device with memory of its own, on which the arena is one allocation."""
    return [
        Need("pages", plan.device_frames * plan.page_bytes),
        Need("activations", activations),
        Need("workspace", workspace),
        Need("CUDA itself", CONTEXT_BYTES),
    ]


def host_needs(plan: Plan, activations: int, workspace: int, config: Config) -> list[Need]:
    """Of the host, where the device arena and activations are, too, on ``device: cpu``."""
    found = [Need("pages", plan.host_frames * plan.page_bytes), Need("the process", PROCESS_BYTES)]
    if not config.device.startswith("cuda"):
        found.append(Need("the device's pages", plan.device_peak_bytes))
        found += [Need("activations", activations), Need("workspace", workspace)]
    return found


def require_memory(plan: Plan, activations: int, workspace: int, config: Config, target: Target) -> None:
    """Raises CapacityError where activations and the like, in bytes, find no room beside the pages."""
    if target.device_bytes is not None:
        needs = device_needs(plan, activations, workspace)
        _require("device", needs, target.device_bytes, _device_remedy(plan, needs, target.device_bytes, config))
    needs = host_needs(plan, activations, workspace, config)
    over = sum(need.bytes for need in needs) - target.host_bytes
    lower = (config.tiers.host - over) // 2**20
    remedy = f"Lower tiers.host to {lower}MiB." if lower > 0 else "Lower data.micro_batch_size."
    _require("host", needs, target.host_bytes, remedy)


def _require(tier: str, needs: list[Need], available: int, remedy: str) -> None:
    total = sum(need.bytes for need in needs)
    if total > available:
        said = ", ".join(f"{need.what} {format_bytes(need.bytes)}" for need in needs)
        raise CapacityError(tier, total, available, f"what the run has there ({said})", remedy)


def _device_remedy(plan: Plan, needs: list[Need], available: int, config: Config) -> str:
    """The smallest change: fewer pages where fewer can do, else fewer activations."""
    left = available - sum(need.bytes for need in needs[1:])
    if left >= plan.arena.lower_bound_frames * plan.page_bytes:
        return f"Lower tiers.device to {left // 2**20}MiB."
    if not config.gradient_checkpointing:
        return "Set gradient_checkpointing: true."
    if config.data.micro_batch_size > 1:
        return "Lower data.micro_batch_size, and raise gradient_accumulation_steps instead."
    return "Lower data.sequence_length, or name smaller units in units.classes."
