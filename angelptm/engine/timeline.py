"""Records the timeline of a run's steps: what the computing thread does, and what the native threads did meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import angelptm_native as native
import torch

from angelptm.config import Config
from angelptm.engine.assembly import Parts
from angelptm.engine.hooks import Hooks
from angelptm.engine.planning import Planning
from angelptm.plan import Prediction
from angelptm.timeline import FILE_NAME, Timeline, save
from angelptm.timeline.data import busy, covered_seconds
from angelptm.timeline.recorder import Recorder
from angelptm.units import Site

_LINKS = {"read": "ssd_read", "write": "ssd_written", "copy": "host_to_device", "update": "published"}
_MATMUL_SIZE = 512


class Recording:
    """The timeline of the next ``steps`` whole steps: a step begins with its first forward. Watches from its making on;
    whoever made it asks for ``done``, or stops it early.

    Costs a few microseconds a use, and nothing once it is done.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        sites: Sequence[Site],
        hooks: Hooks,
        planning: Planning,
        global_step: Callable[[], int],
        *,
        steps: int,
        tokens_per_step: int | None,
        path: Path | None,
    ) -> None:
        assert steps > 0
        self._parts, self._sites, self._hooks, self._global_step = parts, sites, hooks, global_step
        self._planning, self._left, self._path = planning, steps, path
        self._recorder = Recorder()
        self._step_start: float | None = None
        self._use: tuple[int, str, float] | None = None  # site, phase, since
        self._cpu_start = 0.0
        self._timeline: Timeline | None = None
        self._spans = [
            (unit, index)
            for unit, plan in enumerate(parts.plan.units)
            for index, span in enumerate(plan.spans)
            if span.is_mine
        ]
        self._pages = {one.page: one for unit in parts.catalogue.by_unit for one in unit if one.page is not None}
        page = parts.plan.page_bytes
        self._recorder.facts |= {
            "config_hash": config.hash,
            "budget_bytes": {
                "device": config.tiers.device,
                "host": config.tiers.host,
                "ssd": parts.plan.ssd_slots * page,
            },
        }
        if tokens_per_step:
            self._recorder.facts["tokens_per_step"] = tokens_per_step
        self._update = config.update
        self._updates_before = parts.swept.facts() if parts.swept is not None else None
        native.Timeline.name_lane("engine")
        parts.residency.stall_listeners.append(self._stalled)
        hooks.timeline = self
        self._recorder.start()
        self._recorder.lane("compute", "compute")
        self._recorder.lane("stalls", "stall")
        self._recorder.lane("gradient copy", "channel")
        self._cpu_start = time.process_time()
        self._began = time.perf_counter()

    @property
    def done(self) -> bool:
        return self._timeline is not None

    # Told by the computing thread.

    def enter(self, site: int, phase: str) -> None:
        """The computing thread comes to a use, which ends where the next one begins."""
        now = time.perf_counter()
        self.leave(now)
        if self._step_start is None:
            self._step_start = now
        self._use = (site, phase, now)
        self._sample()

    def leave(self, now: float | None = None) -> None:
        """A forward or backward pass is over."""
        if self._use is not None:
            site, phase, start = self._use
            self._use = None
            name = f"{phase} {self._sites[site].module_name or 'the model'}"
            end = time.perf_counter() if now is None else now
            self._recorder.event("compute", name, start, end, phase=phase, what=phase)

    def gradient(self, unit: int, size: int, seconds: float) -> None:
        """A gradient was copied to its pages."""
        if self._step_start is not None:
            now = time.perf_counter()
            name = f"gradient of {self._unit(unit)}"
            args = {"what": "gradient", "kind": "GRAD", "link": "device_to_host"}
            self._recorder.event("gradient copy", name, now - seconds, now, size, **args)
            self._sample()

    def drop(self) -> None:
        """The step is given up: what was recorded of it lies in no step."""
        self.leave()
        self._step_start = None

    def end_step(self, start: float) -> None:
        """``optimizer.step``, which began at ``start``, is about to return."""
        now = time.perf_counter()
        if self._step_start is None:
            return
        self._recorder.event("compute", "step", start, now, phase="step", what="step")
        self._sample()
        self._recorder.step(self._global_step(), self._step_start, now)
        self._step_start = None
        self._left -= 1
        if self._left == 0:
            self.stop()

    def _stalled(self, name: str, start: float, end: float) -> None:
        if self._step_start is not None:
            cause, _, unit = name.partition(" of ")
            self._recorder.stall(cause, start, end, unit)
            self._sample()

    def _sample(self) -> None:
        page, store = self._parts.plan.page_bytes, self._parts.store
        used = self._parts.residency.used_frames + self._parts.plan.device_state_frames
        self._recorder.counter("device", used * page)
        self._recorder.counter("host", store.host_used_count * page)
        self._recorder.counter("ssd", store.slot_used_count * page)
        if self._parts.swept is not None and self._updates_before is not None:
            waiting = self._parts.swept.facts().since(self._updates_before)["gradients"]["waiting"]
            self._recorder.counter("gradients waiting", waiting, unit="spans")

    # The end.

    def stop(self) -> None:
        """Ends the recording, after the steps that were asked for or before; saves it if it knows where."""
        if self._timeline is not None:
            return
        wall, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu_start
        self._recorder.stop()
        self._parts.residency.stall_listeners.remove(self._stalled)
        self._hooks.timeline = None
        timeline = self._recorder.timeline(self._describe)
        if self._parts.swept is not None and self._updates_before is not None:
            timeline.facts["updates"] = {
                "mode": self._update.mode,
                "max_staleness": self._update.most_behind,
                **self._parts.swept.facts().since(self._updates_before),
            }
        if timeline.steps:
            timeline.facts["traffic_bytes"] = self._traffic(timeline)
            if tokens := timeline.facts.get("tokens_per_step"):
                timeline.facts["rooflines"] = _rooflines(self._hooks.model, self._parts, tokens)
            timeline.facts["busy_seconds"] = _busy_seconds(timeline, cpu / max(wall, 1e-9))
        self._timeline = timeline
        if self._path is not None and timeline.steps:
            save(timeline, self._path)

    @property
    def timeline(self) -> Timeline:
        assert self._timeline is not None, "done comes first"
        return self._timeline

    def save(self, path: Path) -> None:
        """Raises OSError."""
        save(self.timeline, path)

    def save_run(self, folder: Path) -> None:
        """All that `angelptm trace` reads besides the run's own records: the timeline, and the trace, rates, schedule
        and prediction that the steps followed. Raises OSError."""
        self.save(folder / FILE_NAME)
        if self._planning.trace is not None:
            self._planning.trace.save(folder / "trace.json")
        if self._planning.rates is not None:
            self._planning.rates.save(folder / "rates.json")
        if self._planning.schedule is not None:
            self._planning.schedule.save(folder / "schedule.json")
        if self._planning.prediction is not None:
            text = json.dumps(_prediction_json(self._planning.prediction), indent=1)
            (folder / "prediction.json").write_text(text, encoding="utf-8")

    def _unit(self, unit: int) -> str:
        return self._parts.plan.units[unit].layout.name

    def _describe(self, thread: str, what: str, number: int) -> tuple[str, dict[str, Any]]:
        """Updaters count spans, all others pages."""
        link = {"link": _LINKS[what]} if what in _LINKS else {}
        if thread.startswith("updater"):
            unit, span = self._spans[number]
            count = len(self._parts.plan.units[unit].spans)
            part = f", span {span + 1} of {count}" if count > 1 else ""
            of = "states of " if what in ("read", "write", "check") else ""
            return f"{what} {of}{self._unit(unit)}{part}", {"span": number, **link}
        if what == "sync" or number not in self._pages:
            return f"{what} buffers" if what != "sync" else "sync the slot files", link
        page = self._pages[number]
        return f"{what} {page.kind} of {self._unit(page.unit)}", {"kind": page.kind, **link}

    def _traffic(self, timeline: Timeline) -> dict[str, dict[str, float]]:
        """kind → link → bytes of one step, the mean over all that were recorded."""
        found: dict[str, dict[str, float]] = {}
        end = timeline.steps[-1].end_s  # what began before the first step stands for what the last one left to do
        for event in timeline.events:
            link = event.args.get("link")
            if link is None or event.start_s > end:
                continue
            kinds: dict[str, float] = {event.args["kind"]: event.bytes} if "kind" in event.args else {}
            if "span" in event.args:
                kinds = self._span_bytes(event.args["span"], event.what, event.bytes)
            for kind, size in kinds.items():
                if size:
                    links = found.setdefault(kind, {})
                    links[link] = links.get(link, 0) + size
        count = len(timeline.steps)
        return {kind: {link: size / count for link, size in links.items()} for kind, links in found.items()}

    def _span_bytes(self, number: int, what: str, moved: int) -> dict[str, float]:
        """An updater's transfer of a span, by kind: its states, its gradients or parameters, or both together."""
        plan = self._parts.plan
        unit, index = self._spans[number]
        span = plan.units[unit].spans[index]
        if what == "update":
            return {"PARAM": span.elements * plan.param_itemsize}
        states: dict[str, float] = {}
        for page in span.states.pages if span.states_home == "ssd" else ():
            states[page.kind] = states.get(page.kind, 0.0) + page.bytes
        other: dict[str, float] = {}
        if what == "read" and "ssd" in span.grad_homes:
            share = span.grad_homes.count("ssd") / len(span.grad_homes)
            other["GRAD"] = span.elements * plan.grad_itemsize * share
        if span.param_home == "ssd" and (what == "write" or span.states.has_split_masters):
            other["PARAM"] = span.elements * plan.param_itemsize
        nearest = min((states, other, states | other), key=lambda one: abs(sum(one.values()) - moved))
        total = sum(nearest.values())
        return {kind: moved * size / total for kind, size in nearest.items()} if total else {}


def _prediction_json(prediction: Prediction) -> dict[str, Any]:
    return {
        "step_seconds": prediction.step_seconds,
        "busy_seconds": prediction.busy_seconds,
        "stall_seconds": prediction.stall_seconds,
        "traffic_bytes": prediction.traffic,
        "peak_bytes": prediction.peak_bytes,
        "bottleneck": prediction.bottleneck,
        "second_bottleneck": prediction.second_bottleneck,
        "handed_over_bytes": prediction.handed_over_bytes,
        "steady": prediction.steady,
    }


def _busy_seconds(timeline: Timeline, cores: float) -> dict[str, float]:
    """Under the names of prediction.json, the mean of all recorded steps. ``cores``: CPU seconds of a second."""
    machine_cores = timeline.facts["machine"]["cores"]
    updaters = [lane.name for lane in timeline.lanes if lane.kind == "updater"]
    found = dict.fromkeys(("ssd", "host_to_device", "gradient copy", "updater"), 0.0)
    for step in timeline.steps:
        ssd = [event for event in timeline.events if event.args.get("link") in ("ssd_read", "ssd_written")]
        copies = [event for event in timeline.events if event.args.get("link") == "host_to_device"]
        found["ssd"] += covered_seconds(ssd, step)
        found["host_to_device"] += covered_seconds(copies, step)
        found["gradient copy"] += covered_seconds(timeline.lane_events("gradient copy", step), step)
        for lane in updaters:
            found["updater"] += covered_seconds(busy(timeline.lane_events(lane, step)), step) / len(updaters)
    seconds = sum(step.seconds for step in timeline.steps)
    found["cores"] = seconds * cores / machine_cores
    return {channel: value / len(timeline.steps) for channel, value in found.items()}


def _rooflines(model: torch.nn.Module, parts: Parts, tokens: int) -> dict[str, dict[str, Any]]:
    """The least that forward and backward take: their multiplications by weights, at the rate of a large product.
    Attention's own products are not counted, so the bound is a low one."""
    lookups = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    weights = 0
    for unit in parts.plan.units:
        for param in unit.layout.params:
            if len(param.shape) >= 2 and not all(module in lookups for module, _ in param.owners):
                weights += param.numel
    rate = _matmul_flops(parts.dtype)
    ceiling = f"matmul at {rate / 1e9:,.3g} GFLOP/s"
    forward = 2 * weights * tokens / rate
    return {
        "forward": {"ceiling": ceiling, "seconds": forward},
        "backward": {"ceiling": ceiling, "seconds": 2 * forward},
    }


def _matmul_flops(dtype: torch.dtype) -> float:
    """The best of a few products of square matrices. Uses no random numbers: the run's own must not change."""
    one = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        one @ one
        best = min(best, time.perf_counter() - start)
    return 2 * _MATMUL_SIZE**3 / best
