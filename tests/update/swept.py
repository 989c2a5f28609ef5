"""Spans whose gradients wait in accumulators, and plain arrays with what must become of them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import angelptm_native as native
import numpy as np

from angelptm import kernels

from .harness import HOST, Spans

MEAN, SUM = native.Combine.MEAN, native.Combine.SUM
ADAMW, SGD, LION = native.Rule.ADAMW, native.Rule.SGD, native.Rule.LION
Segments = Sequence[tuple[int, int, int]]
MOST_STEPS_AT_ONCE = 4
FIELDS = (
    *("rule", "lr", "beta1", "beta2", "eps", "weight_decay", "dampening", "nesterov", "first_step"),
    *("bias_correction1", "bias_correction2_sqrt", "grad_scale"),
)


def sweep_options(
    order: native.SweepOrder = native.SweepOrder.ROUND_ROBIN,
    combine: native.Combine = MEAN,
    spare_frames: int = 0,
    ranks: Sequence[int] = (),
) -> native.SweepOptions:
    return native.SweepOptions(order=order, combine=combine, spare_frames=spare_frames, ranks=ranks)


def changed(hyper: native.Hyper, **changes: Any) -> native.Hyper:
    new = native.Hyper()
    for name in FIELDS:
        setattr(new, name, changes.get(name, getattr(hyper, name)))
    return new


def one_for_several(hypers: Sequence[native.Hyper], scale: float, combine: native.Combine) -> native.Hyper:
    """What csrc/update/accumulators.cpp says about "one update for several gradients", written down once more."""
    newest, count = hypers[-1], len(hypers)
    if count == 1 or combine == SUM:
        return changed(newest, grad_scale=scale)
    stride = min(1.0, MOST_STEPS_AT_ONCE / count)
    lr = stride * math.fsum(hyper.lr for hyper in hypers)
    changes: dict[str, Any] = {"grad_scale": scale / count, "lr": lr}
    decayed = stride * math.fsum(hyper.lr * hyper.weight_decay for hyper in hypers) / lr
    if newest.rule == ADAMW:
        changes["beta1"] = math.prod(hyper.beta1 for hyper in hypers)
        changes["beta2"] = math.prod(hyper.beta2 for hyper in hypers)
        changes["weight_decay"] = decayed
    elif newest.rule == LION:
        changes["beta2"] = newest.beta2**count
        changes["weight_decay"] = decayed
    elif newest.beta1 != 0:
        changes["beta1"] = newest.beta1**count
        weights = [(1 - newest.dampening) * newest.beta1**power for power in range(count)]
        if hypers[0].first_step:  # undamped, after a momentum of zero
            weights[-1] = newest.beta1 ** (count - 1)
        changes["dampening"] = 1 - math.fsum(weights)
        changes["first_step"] = False
    return changed(newest, **changes)


@dataclass
class Given:
    grad: np.ndarray  # (elements,) float32
    segments: Segments
    hypers: Sequence[native.Hyper]
    from_step: bool

    def of(self, element: int) -> native.Hyper | None:
        for start, count, hyper in self.segments:
            if start <= element < start + count:
                return self.hypers[hyper]
        return None


@dataclass
class Box:
    """What waits in an accumulator, oldest first."""

    given: list[Given] = field(default_factory=list)

    def sum_of(self, part: slice) -> tuple[list[native.Hyper], np.ndarray, float]:
        """Of elements that lie in the same segments: what each gradient asks for, and their sum, to be scaled."""
        hypers, total, scale = list[native.Hyper](), np.zeros(0, np.float32), 1.0
        for one in self.given:
            if not one.from_step:  # what is opened is scaled first
                total, scale = total * np.float32(scale), 1.0
            if (hyper := one.of(part.start)) is None:
                continue
            if not hypers:
                total, scale = one.grad[part].copy(), hyper.grad_scale
            elif one.from_step:
                total = total * np.float32(scale) + one.grad[part] * np.float32(hyper.grad_scale)
                scale = 1.0
            else:
                total += one.grad[part]
            hypers.append(hyper)
        return hypers, total, scale

    def borders(self) -> list[int]:
        return sorted({cut for one in self.given for start, count, _ in one.segments for cut in (start, start + count)})


class Swept(Spans):
    """``Spans`` whose gradients are handed over by ``give``; ``settle`` makes of the arrays what one update must make
    of what was given since. ``spare_frames`` of 0, together with a ring of one span for each thread, lets ``busy`` hold
    the threads up."""

    def __init__(
        self,
        folder: Path,
        homes: list[tuple[native.Home, native.Home, native.Home | None]],
        *,
        order: native.SweepOrder = native.SweepOrder.ROUND_ROBIN,
        combine: native.Combine = MEAN,
        spare_frames: int = 0,
        ranks: Sequence[int] = (),
        **options: Any,
    ) -> None:
        self.combine = combine
        sweep = sweep_options(order, combine, spare_frames, ranks)
        super().__init__(folder, homes, sweep=sweep, spare_frames=spare_frames, **options)
        self.boxes = [Box() for _ in homes]

    @property
    def sweep(self) -> native.Updater:
        assert self.updater is not None
        return self.updater

    @property
    def all(self) -> list[int]:
        return list(range(len(self.spans)))

    def param_page(self, span: int) -> int:
        page = self.spans[span].param
        assert page is not None
        return page

    def new_gradient(self, span: int) -> np.ndarray:
        return self.rng.standard_normal(self.spans[span].elements).astype(np.float32)

    def new_segments(self, span: int) -> Segments:
        return self._segments(self.spans[span].elements)

    def peek(self, pages: Sequence[int], elements: int) -> np.ndarray:
        whole = np.empty(elements, np.float32)
        per_page = self.store.page_bytes // 4
        for first, page in zip(range(0, elements, per_page), pages):
            part = whole[first : first + per_page]
            native.copy_bytes(part.ctypes.data, self.store.home_address(page), part.nbytes)
        return whole

    def give(
        self,
        spans: Sequence[int],
        hypers: Sequence[native.Hyper],
        *,
        from_step: bool,
        segments: Segments | None = None,
        grad: np.ndarray | None = None,
    ) -> None:
        """A random gradient of each span, in random segments where none are given."""
        work = []
        held = {} if from_step else dict(zip(spans, self.sweep.open(spans)))
        for index in spans:
            span = self.spans[index]
            new = Given(
                self.new_gradient(index) if grad is None else grad,
                self.new_segments(index) if segments is None else segments,
                hypers,
                from_step,
            )
            if from_step:
                self.put(span.step_grad, new.grad)
            else:
                there = np.zeros(span.elements, bool)
                for start, count in held[index]:
                    there[start : start + count] = True
                now = self.peek(span.grad, span.elements)
                for start, count, _ in new.segments:
                    part = slice(start, start + count)
                    now[part] = np.where(there[part], now[part] + new.grad[part], new.grad[part])
                self.put(span.grad, now)
            self.boxes[index].given.append(new)
            work.append((index, new.segments))
        self.sweep.hand_over(work, hypers, from_step)

    def settle(self, spans: Sequence[int]) -> None:
        """One update of all that waits for each span."""
        for index in spans:
            box, span = self.boxes[index], self.spans[index]
            cuts = box.borders()
            for start, end in itertools.pairwise(cuts):
                part = slice(start, end)
                hypers, total, scale = box.sum_of(part)
                if not hypers:
                    continue
                collapsed = one_for_several(hypers, scale, self.combine)
                states = [array[part] for array in span.expected] + [None, None]
                if collapsed.rule == SGD and collapsed.beta1 == 0:
                    states[1] = None
                kernels.step(collapsed, *states[:3], total, span.expected_param[part])
            box.given.clear()

    def wait(self, spans: Sequence[int] | None = None) -> None:
        """Until all that was handed over is applied."""
        spans = self.all if spans is None else spans
        self.sweep.wait_applied(spans, self.sweep.produced(spans), "all gradients")

    @contextlib.contextmanager
    def busy(self, blockers: Sequence[int], hypers: Sequence[native.Hyper]) -> Iterator[None]:
        """Keeps as many threads as there are ``blockers`` where they have published these spans, each with a gradient
        of its own, and cannot go on: somebody reads the former parameters, and there are no spare frames."""
        frames = [frame for frame, _ in self.store.hold([self.param_page(index) for index in blockers])]
        self.give(blockers, hypers, from_step=True)
        self.sweep.wait_published(blockers, 0, "the threads to be busy")
        self.settle(blockers)
        try:
            yield
        finally:
            self.store.release_held(frames)


def on_host(count: int) -> list[tuple[native.Home, native.Home, native.Home | None]]:
    return [(HOST, HOST, HOST)] * count
