"""A model of spans in a small store, and the same spans as plain arrays that the same kernel steps."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import angelptm_native as native
import numpy as np

from angelptm import kernels

from ..pages.pool import PAGE, load, make_store, view, write

HOST, SSD = native.Home.HOST, native.Home.SSD
F32, BF16 = native.DType.F32, native.DType.BF16
ITEMSIZE = {F32: 4, BF16: 2}
NUMPY = {F32: np.float32, BF16: np.uint16}
DEADLINE = 20.0


def bits(values: np.ndarray, dtype: native.DType) -> np.ndarray:
    return values if dtype == F32 else (values.view(np.uint32) >> 16).astype(np.uint16)


def hypers_of(rule: native.Rule, step: int) -> list[native.Hyper]:
    """Those of two parameter groups."""
    if rule == native.Rule.ADAMW:
        return [
            kernels.adamw_hyper(1e-2, weight_decay=0.1, step=step, grad_scale=0.5),
            kernels.adamw_hyper(3e-3, betas=(0.8, 0.99), weight_decay=0.0, step=step),
        ]
    if rule == native.Rule.SGD:
        return [kernels.sgd_hyper(1e-2, 0.9, step=step), kernels.sgd_hyper(1e-3, 0.5, nesterov=True, step=step)]
    return [kernels.lion_hyper(1e-3), kernels.lion_hyper(1e-4, weight_decay=0.1)]


def fp32_states(elements: int, *kinds: Sequence[int], page_bytes: int = PAGE) -> dict[str, Any]:
    """A span's ``states`` and ``runs``: pages of each kind of their own, all fp32; [] for what is not kept."""
    step, pages, runs = page_bytes // 4, [page for kind in kinds for page in kind], []
    firsts = [sum(map(len, kinds[:index])) for index in range(len(kinds))]
    for number, start in enumerate(range(0, elements, step)):
        master, *moments = (native.StatePlace(first + number) if kind else None for first, kind in zip(firsts, kinds))
        assert master is not None
        exp_avg, exp_avg_sq = (*moments, None, None)[:2]
        count = min(step, elements - start)
        runs.append(native.StateRun(start=start, count=count, master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq))
    return {"states": pages, "runs": runs}


@dataclass
class SpanCase:
    """One span: where it lives, its page ids, and what its arrays must be."""

    elements: int
    states: list[list[int]]
    grad: list[int]
    param: int | None
    on_device: np.ndarray | None
    segments: list[tuple[int, int, int]]
    expected: list[np.ndarray]  # master, exp_avg, exp_avg_sq as far as the rule keeps them
    expected_param: np.ndarray
    step_grad: list[int]  # swept: where a step's gradient is until it is known that it counts

    @property
    def state_pages(self) -> list[int]:
        return [page for kind in self.states for page in kind]

    @property
    def pages(self) -> list[int]:
        return [*self.state_pages, *self.grad, *self.step_grad, *([] if self.param is None else [self.param])]


class Spans:
    """``homes``: (states, grad, param) of each span; a param of None lives at a device address.

    With ``blank`` the masters start as zeros, unwritten: then spans whose gradients live on the host are the updater's
    alone, and no fault can meet anybody else. With ``sweep`` gradients are taken out of accumulators.
    """

    def __init__(
        self,
        folder: Path,
        homes: list[tuple[native.Home, native.Home, native.Home | None]],
        *,
        rule: native.Rule = native.Rule.ADAMW,
        grad_dtype: native.DType = F32,
        param_dtype: native.DType = F32,
        threads: int = 1,
        ring_depth: int = 2,
        seed: int = 0,
        backend: native.Backend = native.Backend.THREADS,
        faults: native.FaultPlan | None = None,
        blank: bool = False,
        keep_files: bool = False,
        spare_slots: int = 8,
        write_depth: int = 3,
        fetch_frames: int = 0,
        deadline_seconds: float = DEADLINE,
        sweep: native.SweepOptions | None = None,
        spare_frames: int = 0,
    ) -> None:
        self.rule, self.grad_dtype, self.param_dtype = rule, grad_dtype, param_dtype
        self.random, self.rng = random.Random(seed), np.random.default_rng(seed)
        whole = PAGE // ITEMSIZE[param_dtype]
        kinds = 1 + native.moment_count(rule)
        grads = -(-whole * ITEMSIZE[grad_dtype] // PAGE) * (1 if sweep is None else 2)
        per_span = kinds * -(-whole * 4 // PAGE) + grads + 1
        live = per_span * len(homes)
        self.ring = threads * ring_depth
        self.store = make_store(
            folder,
            frames=live + self.ring * per_span + 4 + fetch_frames + spare_frames,
            slots=(live + self.ring * per_span + spare_slots,),
            backend=backend,
            faults=faults,
            keep_files=keep_files,
            deadline_seconds=deadline_seconds,
        )
        self.step_count = 0
        self.spans = [
            self._make(index, whole, *home, blank=blank, swept=sweep is not None) for index, home in enumerate(homes)
        ]
        self.store.mover.drain()
        self.home_frames = self.store.host_used_count
        self.fetcher = native.Fetcher(self.store, fetch_frames) if fetch_frames else None
        self.updater: native.Updater | None = native.Updater(
            self.store,
            threads=threads,
            spans=[
                native.Span(
                    elements=span.elements,
                    **fp32_states(span.elements, *span.states),
                    grad=span.grad,
                    param=span.param,
                    device_param=None if span.on_device is None else span.on_device.ctypes.data,
                    step_grad=span.step_grad,
                )
                for span in self.spans
            ],
            ring_depth=ring_depth,
            rule=rule,
            grad_dtype=grad_dtype,
            param_dtype=param_dtype,
            write_depth=write_depth,
            fetcher=self.fetcher,
            memory=[span.on_device for span in self.spans],
            sweep=sweep,
        )

    def _pages(self, home: native.Home, elements: int, itemsize: int) -> list[int]:
        total = elements * itemsize
        return [self.store.add_page(home, min(PAGE, total - start)) for start in range(0, total, PAGE)]

    def _make(
        self,
        index: int,
        whole: int,
        states: native.Home,
        grad: native.Home,
        param: native.Home | None,
        *,
        blank: bool,
        swept: bool,
    ) -> SpanCase:
        # The last pages are partial in most spans, down to one element.
        elements = [whole, whole - 1, whole // 2 + 7, 1, 300][index % 5]
        kinds = 1 + native.moment_count(self.rule)
        ids = [self._pages(states, elements, 4) if kind < kinds else [] for kind in range(3)]
        master = self.rng.standard_normal(elements).astype(np.float32)
        if blank:
            master[:] = 0
        itemsize = ITEMSIZE[self.param_dtype]
        expected = [master, *(np.zeros(elements, np.float32) for _ in range(kinds - 1))]
        expected_param = np.zeros(elements, NUMPY[self.param_dtype])
        no_step = kernels.adamw_hyper(0.0, weight_decay=0.0, step=1)  # rounds the master, and changes nothing
        nothing = [np.zeros(elements, np.float32) for _ in range(3)]
        kernels.step(no_step, master.copy(), *nothing[:2], nothing[2], expected_param)
        span = SpanCase(
            elements,
            ids,
            self._pages(grad, elements, ITEMSIZE[self.grad_dtype]),
            None if param is None else self.store.add_page(param, elements * itemsize),
            expected_param.copy() if param is None else None,
            self._segments(elements),
            expected,
            expected_param,
            self._pages(grad, elements, ITEMSIZE[self.grad_dtype]) if swept else [],
        )
        if not blank:
            self.put(span.states[0], master)
        return span

    def _segments(self, elements: int) -> list[tuple[int, int, int]]:
        """Ascending runs of two groups, with gaps before, between and behind."""
        cuts = sorted(self.random.sample(range(elements + 1), min(elements + 1, 7)))
        runs = [(start, end - start) for start, end in itertools.pairwise(cuts)]
        return [(start, count, index % 2) for index, (start, count) in enumerate(runs) if index % 3 != 2] or [
            (0, elements, 1)
        ]

    def put(self, pages: list[int], values: np.ndarray) -> None:
        raw = values.view(np.uint8)
        for index, page in enumerate(pages):
            part = raw[index * PAGE : (index + 1) * PAGE]
            if self.store.page_home(page) == HOST:
                view(self.store.home_address(page), len(part))[:] = part
                self.store.publish_in_place(page)
            else:
                write(self.store, page, part)

    def read(self, pages: list[int], dtype: native.DType) -> np.ndarray:
        return np.concatenate(load(self.store, pages)).view(NUMPY[dtype])

    def submit(self, spans: list[int], rank: int = 0) -> native.Ticket:
        """New gradients, the expectation of one step, and the update as one unit; the ticket of its end."""
        return self.submit_for_both(spans, rank)[0]

    def submit_for_both(self, spans: list[int], rank: int = 0) -> tuple[native.Ticket, native.Ticket]:
        """As ``submit``; the tickets of its end and of its publication."""
        self.step_count += 1
        hypers = hypers_of(self.rule, self.step_count)
        for index in spans:
            span = self.spans[index]
            grad = bits(self.rng.standard_normal(span.elements).astype(np.float32), self.grad_dtype)
            self.put(span.grad, grad)
            for start, count, hyper in span.segments:
                part = slice(start, start + count)
                states = [array[part] for array in span.expected] + [None, None]
                kernels.step(hypers[hyper], *states[:3], grad[part], span.expected_param[part])
        self.store.mover.drain()
        assert self.updater is not None
        work = [(i, self.spans[i].segments) for i in spans]
        return self.updater.submit("the update of unit x", work, hypers, rank)

    def check(self) -> None:
        for span in self.spans:
            for pages, expected in zip(span.states, span.expected, strict=False):
                assert np.array_equal(self.read(pages, F32).view(np.uint32), expected.view(np.uint32))
            param = span.on_device if span.param is None else self.read([span.param], self.param_dtype)
            assert param is not None
            assert np.array_equal(param.view(np.uint8), span.expected_param.view(np.uint8))

    def close(self) -> None:
        """Stops the threads; afterwards only the homes hold frames, and each SSD page that is written one slot."""
        self.updater = None
        self.fetcher = None
        assert self.store.host_used_count == self.home_frames
        for span in self.spans:
            for page in span.pages:
                self.store.discard(page)
        assert self.store.slot_used_count == 0
