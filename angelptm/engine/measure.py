"""How fast a run's own channels are: a fraction of a second on its drive, memory and kernel, between two steps."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import angelptm_native as native
import torch

from angelptm import kernels
from angelptm.device import Device
from angelptm.engine.dtypes import NATIVE_DTYPES
from angelptm.plan import NOMINAL_RATES, ChannelRates, Plan, Rates, rates_for
from angelptm.states.codec import MASTER_FORMATS, MOMENT_FORMATS
from angelptm.states.formats import BLOCK8, FP32, StateFormats

_log = logging.getLogger("angelptm")

_DRIVE_SECONDS = 0.25
_CORE_SECONDS = 0.02  # for each rate that is measured on a core
# For computing and updating beside each other: rounds, and the turns in them, some of the scheduler's slices each.
_ROUNDS, _TURN_SECONDS = 5, 0.025
_LEAST_WATCHED_SECONDS = 0.1
_MATMUL_ROWS, _MATMUL_SIZE = 256, 1024
_GPU_MATMUL_SIZE = 4096
_DEADLINE_SECONDS = 30.0  # for some copies between host and device
_COPIES = 8  # at once, of a page each
_FEW_THREADS = 2  # that update: they do not ask for more than the memory gives
_MOST_SCRATCH_ELEMENTS = 1 << 19  # 10 MiB of scratch memory: more than a core's own caches
# For what no transfer of this run ever meets, or when the drive gave no answer.
_NOMINAL_DRIVE = {
    "read_bytes_per_s": NOMINAL_RATES.ssd_read_bytes_per_s,
    "write_bytes_per_s": NOMINAL_RATES.ssd_write_bytes_per_s,
    "mixed_bytes_per_s": NOMINAL_RATES.ssd_mixed_bytes_per_s,
    "latency_seconds": NOMINAL_RATES.ssd_latency_seconds,
}


class DriveWatch:
    """What the drive gave to the run itself: that is less than a probe of a quarter of a second finds where the drive
    has a fast cache, or others to serve."""

    def __init__(self, store: native.Store) -> None:
        self._store = store
        self._seen = store.drive_use()

    def take(self) -> dict[str, float]:
        """Bytes per second since the last call, by ``read``, ``write`` (alone) and ``mixed`` (both under way), as far
        as there was enough of it."""
        seen, self._seen = self._seen, self._store.drive_use()
        found = {}
        for use, (now_bytes, now_seconds) in self._seen.items():
            size, seconds = now_bytes - seen[use][0], now_seconds - seen[use][1]
            if size and seconds >= _LEAST_WATCHED_SECONDS:
                found[f"{use}_bytes_per_s"] = size / seconds
        return found


def measure_rates(
    store: native.Store,
    plan: Plan,
    device: Device,
    *,
    rule: native.Rule,
    grad_dtype: torch.dtype,
    param_dtype: torch.dtype,
    watched: Mapping[str, float] | None = None,
) -> Rates:
    """Rates of the run's machine as the run will meet them: transfers of whole pages at its queue depth, its kernel on
    its types, with the checksums that its placement asks for. ``watched`` rates of the drive, DriveWatch's, go before
    those that are measured here.

    To be called while nothing moves. Borrows free slots and one frame of the store for the drive, and scratch memory of
    one span, 10 MiB at most; leaves all content as it is.
    """
    drive = _drive(store, plan)
    for name, rate in (watched or {}).items():
        # A few transfers alone, among many in both directions, say little of how fast such ones can be.
        drive[name] = rate if name == "mixed_bytes_per_s" else min(rate, drive[name])
    elements = max(1, min(_MOST_SCRATCH_ELEMENTS, max((s.elements for u in plan.units for s in u.spans), default=1)))
    scratch = Scratch(elements, usual_formats(plan), rule, grad_dtype, param_dtype)
    update_seconds = scratch.step_seconds()
    if plan.update_threads > _FEW_THREADS:
        every = [
            Scratch(elements, usual_formats(plan), rule, grad_dtype, param_dtype) for _ in range(plan.update_threads)
        ]
        update_seconds = max(update_seconds, _beside_each_other(every))
    if device.copies_in is not None and device.copies_out is not None:
        in_seconds = _link_seconds(device, device.copies_in, store, inward=True)
        out_seconds = _link_seconds(device, device.copies_out, store, inward=False)
    else:
        in_seconds = out_seconds = scratch.copy_seconds()
    channels = ChannelRates(
        ssd_read_bytes_per_s=drive["read_bytes_per_s"],
        ssd_write_bytes_per_s=drive["write_bytes_per_s"],
        ssd_mixed_bytes_per_s=drive["mixed_bytes_per_s"],
        ssd_latency_seconds=drive["latency_seconds"],
        host_to_device_bytes_per_s=1 / in_seconds,
        device_to_host_bytes_per_s=1 / out_seconds,
        update_elements_per_s=1 / update_seconds,
        checksum_bytes_per_s=1 / scratch.check_seconds(),
        gradient_bytes_per_s=1 / scratch.accumulate_seconds(),
        cores=len(os.sched_getaffinity(0)),
        compute_uses_cores=device.torch_device.type == "cpu",
    )
    sharing = _sharing(store, plan, _matmul(param_dtype, device), scratch.update)
    return replace(rates_for(plan, channels), compute_threads=torch.get_num_threads(), **vars(sharing))


def _link_seconds(device: Device, stream: native.CopyStream, store: native.Store, *, inward: bool) -> float:
    """Seconds of a byte between a host frame and memory of the device, one copy after the other."""
    mover = store.mover
    frame = mover.staging_frame()
    try:
        size = store.page_bytes
        there = torch.empty(size, dtype=torch.uint8, device=device.torch_device)
        here, far = mover.address(frame), there.data_ptr()
        stream.wait_for(device.computed(stream))

        def move() -> None:
            for _ in range(_COPIES):
                stream.copy(far if inward else here, here if inward else far, size)
            mark = stream.mark()
            end = time.perf_counter() + _DEADLINE_SECONDS
            while not stream.passed(mark):
                if time.perf_counter() > end:
                    raise native.DeadlineError(
                        f"waited {_DEADLINE_SECONDS} s for copies of pages between host and device"
                    )

        return _least_seconds(move) / (size * _COPIES)
    finally:
        mover.release(frame)


def _uses_drive(plan: Plan) -> bool:
    return any(tiers["ssd"] for tiers in plan.kind_bytes.values())


def _drive(store: native.Store, plan: Plan) -> dict[str, float]:
    if not _uses_drive(plan):
        return dict(_NOMINAL_DRIVE)
    try:
        found = store.probe_drive(_DRIVE_SECONDS)
    except OSError as error:
        _log.warning("the drive could not be measured, and is planned with as a common one: %s", error)
        found = None
    return dict(found or _NOMINAL_DRIVE)


def usual_formats(plan: Plan) -> StateFormats:
    """Formats of the states of most elements."""
    counts: Counter[StateFormats] = Counter()
    for unit in plan.units:
        for span in unit.spans:
            for run in span.states.runs:
                counts[run.formats] += run.count
    return counts.most_common(1)[0][0] if counts else FP32


class Scratch:
    """Memory like a span's, and what an update, a fetch and a gradient do with it."""

    def __init__(
        self,
        elements: int,
        formats: StateFormats,
        rule: native.Rule,
        grad_dtype: torch.dtype,
        param_dtype: torch.dtype,
    ) -> None:
        moments = native.moment_count(rule)
        self._formats = formats
        self._master = torch.zeros(elements)
        self._exp_avg = torch.zeros(elements) if moments > 0 else None
        self._exp_avg_sq = torch.zeros(elements) if moments > 1 else None
        self._scales = [torch.zeros(-(-elements // BLOCK8)) for _ in range(2)]
        self._grad = torch.zeros(elements, dtype=grad_dtype)
        self._param = torch.zeros(elements, dtype=param_dtype)
        self._copied = torch.zeros(elements)
        self._hyper = {
            native.Rule.ADAMW: lambda: kernels.adamw_hyper(1e-3, step=1),
            native.Rule.SGD: lambda: kernels.sgd_hyper(1e-3, 0.9, step=1),
            native.Rule.LION: lambda: kernels.lion_hyper(1e-3),
        }[rule]()

    def step(self) -> None:
        if self._formats == FP32:
            kernels.step(self._hyper, self._master, self._exp_avg, self._exp_avg_sq, self._grad, self._param)
            return
        # In memory for fp32 states, of which the formats use a part.
        exp_avg, exp_avg_sq = (
            native.MomentCodes(MOMENT_FORMATS[form], values.data_ptr() if values is not None else 0, scales.data_ptr())
            for form, values, scales in zip(
                (self._formats.exp_avg, self._formats.exp_avg_sq), (self._exp_avg, self._exp_avg_sq), self._scales
            )
        )
        native.step_compact(
            self._hyper,
            MASTER_FORMATS[self._formats.master],
            self._master.data_ptr(),
            exp_avg,
            exp_avg_sq,
            self._grad.data_ptr(),
            NATIVE_DTYPES[self._grad.dtype],
            self._param.data_ptr(),
            self._param.data_ptr(),
            NATIVE_DTYPES[self._param.dtype],
            self._master.numel(),
            key=1,
            first_element=0,
        )

    def update(self) -> None:
        self.step()
        self._check()

    def _check(self) -> None:
        native.crc32c_at(self._master.data_ptr(), self._master.nbytes)

    def _copy(self) -> None:
        native.copy_bytes(self._copied.data_ptr(), self._master.data_ptr(), self._master.nbytes)

    def _accumulate(self) -> None:
        kernels.accumulate(self._grad, self._param, add=False)

    def step_seconds(self) -> float:
        """Of an element."""
        return _least_seconds(self.step) / self._master.numel()

    def check_seconds(self) -> float:
        """Of a byte, as for all that follow."""
        return _least_seconds(self._check) / self._master.nbytes

    def copy_seconds(self) -> float:
        return _least_seconds(self._copy) / self._master.nbytes

    def accumulate_seconds(self) -> float:
        return _least_seconds(self._accumulate) / self._param.nbytes


def _beside_each_other(every: Sequence[Scratch]) -> float:
    """Seconds of an element in each of several threads at once: they share the memory's rate."""
    with ThreadPoolExecutor(len(every)) as threads:
        return statistics.mean(threads.map(Scratch.step_seconds, every))


def compute_speed(dtype: torch.dtype, device: Device) -> float:
    """How fast computing is now: of a measure of its own, to be compared with ``Rates.compute_per_s``."""
    compute = _matmul(dtype, device)
    compute()
    return statistics.median(_per_second(compute, _TURN_SECONDS) for _ in range(3))


def _matmul(dtype: torch.dtype, device: Device) -> Callable[[], None]:
    """Computing as models do: most of their time is in products of matrices."""
    where = device.torch_device
    rows, size = (_MATMUL_ROWS, _MATMUL_SIZE) if where.type == "cpu" else (_GPU_MATMUL_SIZE, _GPU_MATMUL_SIZE)
    left = torch.zeros(rows, size, dtype=dtype, device=where)
    right = torch.zeros(size, size, dtype=dtype, device=where)
    out = torch.zeros(rows, size, dtype=dtype, device=where)

    def act() -> None:
        torch.mm(left, right, out=out)
        device.synchronize()

    return act


def _per_second(act: Callable[[], None], seconds: float) -> float:
    count, start = 0, time.perf_counter()
    while True:
        act()
        count += 1
        if (taken := time.perf_counter() - start) >= seconds:
            return count / taken


@dataclass
class _Sharing:
    """How fast computing is by itself, and what it and others keep of their speed beside each other."""

    compute_per_s: float
    compute_beside_update: float
    update_beside_compute: float
    compute_beside_drive: float | None


def _sharing(store: native.Store, plan: Plan, compute: Callable[[], None], update: Callable[[], None]) -> _Sharing:
    """In turns of some milliseconds, since other tenants of a machine change its speed from one tenth of a second to
    the next: a part is that of neighbouring turns, and the median of all rounds counts."""
    compute()
    update()
    uses_drive = _uses_drive(plan)
    alone, beside_update, beside_compute = [], [], []
    beside_drive: list[float] = []
    with ThreadPoolExecutor(1) as other:
        other.submit(update).result()
        for _ in range(_ROUNDS):
            before = _per_second(compute, _TURN_SECONDS)
            update_alone = _per_second(update, _TURN_SECONDS / 2)
            updating = other.submit(_per_second, update, _TURN_SECONDS)
            computed = _per_second(compute, _TURN_SECONDS)
            beside_compute.append(updating.result() / update_alone)
            now = (before + _per_second(compute, _TURN_SECONDS)) / 2
            alone.append(now)
            beside_update.append(computed / now)
            if not uses_drive:
                continue
            moving = other.submit(store.probe_drive, _TURN_SECONDS)
            count, start = 0, time.perf_counter()
            while not moving.done():
                compute()
                count += 1
            seconds = time.perf_counter() - start
            if moving.exception() is not None or moving.result() is None:
                uses_drive = False  # why was said before
                beside_drive.clear()
            else:
                beside_drive.append(count / seconds / now)

    def part(found: list[float]) -> float:
        return min(1.0, statistics.median(found))

    return _Sharing(
        statistics.median(alone),
        part(beside_update),
        part(beside_compute),
        part(beside_drive) if beside_drive else None,
    )


def _least_seconds(act: Callable[[], None]) -> float:
    """The least of several runs, since whatever else the machine does only adds; the first one only warms up."""
    act()
    least = float("inf")
    end = time.perf_counter() + _CORE_SECONDS
    while True:
        start = time.perf_counter()
        act()
        now = time.perf_counter()
        least = min(least, now - start)
        if now >= end:
            return max(least, 1e-9)
