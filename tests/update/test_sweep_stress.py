"""Gradients by the hundred thousand, from one thread that hands them over to several that take them, while others
read the parameters: none is lost, none is applied twice, and nobody sees a page change or half of one.

ANGELPTM_STRESS_EVENTS sets how much is done. An event: a span's gradient is handed over, taken or published.
"""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import angelptm_native as native
import numpy as np
import pytest

from angelptm import kernels

from ..pages.pool import make_store, view
from .harness import F32, HOST, SSD, fp32_states
from .swept import MEAN, SGD, SUM, Swept, sweep_options

EVENTS = int(os.environ.get("ANGELPTM_STRESS_EVENTS", "1000000"))
PAGE = 4096
ELEMENTS = PAGE // 4
MOST_WAITING = 4  # more would be applied as four steps
STEP = 2.0**-10  # each gradient is 1.0 everywhere, and takes so much off every element
READERS, HELD = 2, 24
DEADLINE = 60.0


class Stressed:
    """Spans of one page each, parameters that start at 0, and the whole host tier as rows of one array."""

    def __init__(
        self, folder: Path, spans: int, combine: native.Combine, order: native.SweepOrder, spare_frames: int
    ) -> None:
        threads, ring_depth = 3, 3
        self.spans = list(range(spans))
        frames = spans * 5 + threads * ring_depth * 2 + spare_frames + 2
        self.store = make_store(
            folder, frames=frames, slots=(1,), page_bytes=PAGE, deadline_seconds=DEADLINE, queue_depth=2
        )
        self.pages = [[self.store.add_page(HOST, PAGE) for _ in range(5)] for _ in self.spans]
        self.rows = view(self.store.mover.address(0), frames * PAGE).view(np.float32).reshape(frames, ELEMENTS)
        self.updater = native.Updater(
            self.store,
            threads=threads,
            spans=[
                native.Span(
                    elements=ELEMENTS,
                    **fp32_states(ELEMENTS, [master], [exp_avg], [], page_bytes=PAGE),
                    grad=[grad],
                    param=param,
                    device_param=None,
                    step_grad=[step_grad],
                )
                for master, exp_avg, grad, param, step_grad in self.pages
            ],
            ring_depth=ring_depth,
            rule=SGD,
            grad_dtype=F32,
            param_dtype=F32,
            sweep=sweep_options(order, combine, spare_frames, self.spans),
        )
        self.hypers = [kernels.sgd_hyper(STEP, step=2)]
        self.whole = [(span, [(0, ELEMENTS, 0)]) for span in self.spans]

    def frames(self, kind: int, spans: list[int]) -> list[int]:
        base, find = self.store.mover.address(0), self.store.home_address
        return [(find(self.pages[span][kind]) - base) // PAGE for span in spans]

    def give(self, spans: list[int], from_step: bool) -> None:
        if from_step:
            self.rows[self.frames(4, spans)] = 1.0
        else:
            full = [bool(ranges) for ranges in self.updater.open(spans)]
            frames = np.array(self.frames(2, spans))
            self.rows[frames[np.logical_not(full)]] = 1.0
            self.rows[frames[full]] += 1.0
        self.updater.hand_over([self.whole[span] for span in spans], self.hypers, from_step)


@dataclass
class Reader:
    """Holds parameters, and looks at them twice."""

    stressed: Stressed
    seed: int
    stop: threading.Event
    complaints: list[str] = field(default_factory=list)
    looks: int = 0

    def run(self) -> None:
        chooser, all_spans = random.Random(self.seed), self.stressed.spans
        newest = [(-1, 0.0) for _ in all_spans]
        while not self.stop.is_set() and not self.complaints:
            spans = chooser.sample(all_spans, chooser.randint(1, min(HELD, len(all_spans))))
            self.look(spans, newest, chooser.choice([0, 0, 0, 0.0005, 0.002]))

    def look(self, spans: list[int], newest: list[tuple[int, float]], pause: float) -> None:
        stressed = self.stressed
        published = stressed.updater.published(spans)
        held = stressed.store.hold([stressed.pages[span][3] for span in spans])
        frames = [frame for frame, _ in held]
        first = stressed.rows[frames]
        produced = stressed.updater.produced(spans)
        time.sleep(pause)
        second = stressed.rows[frames]
        stressed.store.release_held(frames)
        self.looks += len(spans)
        if not (first == first[:, :1]).all():
            self.complaints.append(f"torn: {spans}")
        if not np.array_equal(first, second):
            self.complaints.append(f"changed while it was held: {spans}")
        for span, (_, version), value, least, most in zip(spans, held, first[:, 0].tolist(), published, produced):
            count = -value / STEP
            former = newest[span]
            if not least <= count <= most:
                self.complaints.append(f"span {span} has {count} gradients of {least} to {most}")
            # A version has one content; later ones have no fewer gradients.
            if version < former[0] or count < former[1] or (version == former[0] and count != former[1]):
                self.complaints.append(f"span {span} went from {former} to {(version, count)}")
            newest[span] = (version, count)


def events_of(updater: native.Updater) -> int:
    now = updater.utilisation()
    return int(now["gradients_produced"] + now["gradients_taken"] + now["gradients_published"])


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("count", "combine", "order", "spare_frames", "share"),
    [
        (160, MEAN, native.SweepOrder.ROUND_ROBIN, READERS * HELD, 1.0),
        (160, SUM, native.SweepOrder.MOST_GRADIENTS, 4, 0.1),
        (160, MEAN, native.SweepOrder.NEXT_NEEDED, 1, 0.1),
        (2, SUM, native.SweepOrder.ROUND_ROBIN, 4, 0.2),
    ],
    ids=["mean", "sum-few-spare-frames", "mean-one-spare-frame", "two-spans"],
)
def test_every_gradient_is_applied_once_and_held_pages_stay_what_they_are(
    tmp_path: Path, count: int, combine: native.Combine, order: native.SweepOrder, spare_frames: int, share: float
) -> None:
    """Would catch a box that two threads take, a gradient that is written to while it is taken, counts that run ahead
    of what they count, and a frame that is used again while somebody reads it."""
    assert all(np.float32(n) * np.float32(1 / n) == 1 for n in range(1, 2 * MOST_WAITING)), "means are exact"
    stressed, chooser, stop = (
        Stressed(tmp_path, count, combine, order, spare_frames),
        random.Random(1),
        threading.Event(),
    )
    updater, all_spans, given = stressed.updater, stressed.spans, [0] * count
    readers = [Reader(stressed, seed, stop) for seed in range(READERS)]
    threads = [threading.Thread(target=reader.run) for reader in readers]
    for thread in threads:
        thread.start()
    try:
        while events_of(updater) < EVENTS * share and not any(reader.complaints for reader in readers):
            spans = chooser.sample(all_spans, chooser.randint(1, count))
            updater.set_position(spans[0])
            updater.wait_published(spans, chooser.randint(0, MOST_WAITING - 1), "the bound")
            what = chooser.random()
            if what < 0.1:
                updater.open(spans)
                updater.put_back(spans)
            elif what < 0.15:
                updater.open_empty(spans, "empty boxes")
                updater.put_back(spans)
            else:
                stressed.give(spans, from_step=what < 0.55)
                for span in spans:
                    given[span] += 1
        updater.wait_applied(all_spans, given, "the end")
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert [reader.complaints for reader in readers] == [[]] * READERS
    assert all(reader.looks > 0 for reader in readers)
    assert updater.produced(all_spans) == updater.published(all_spans) == given
    totals = updater.utilisation()
    kinds = ("produced", "taken", "published", "applied")
    assert [totals[f"gradients_{kind}"] for kind in kinds] == [sum(given)] * 4
    expected = np.repeat(-STEP * np.array(given, np.float32)[:, None], ELEMENTS, axis=1)
    for kind in (0, 3):
        assert np.array_equal(stressed.rows[stressed.frames(kind, all_spans)], expected)
    print(f"{events_of(updater)} events, {totals['spans']} updates, {sum(reader.looks for reader in readers)} looks")


@pytest.mark.timeout(240)
def test_sums_of_random_segments_with_states_on_the_ssd_lose_nothing(tmp_path: Path) -> None:
    """Whole numbers, whose sum is exact in whatever parts it is applied. Would catch a segment that is merged at the
    wrong border, and states that are read before the last update of them is written."""
    spans = Swept(
        tmp_path, [(SSD, HOST, HOST), (HOST, HOST, HOST)] * 8, rule=SGD, combine=SUM, threads=3, ring_depth=2,
        spare_frames=4, blank=True,
    )  # fmt: skip
    hyper = kernels.sgd_hyper(1.0, step=2)
    totals = [np.zeros(span.elements, np.float32) for span in spans.spans]
    for _ in range(max(20, EVENTS // 2500)):
        chosen = spans.random.sample(spans.all, spans.random.randint(1, 8))
        for index in chosen:
            grad = spans.rng.integers(-8, 8, spans.spans[index].elements).astype(np.float32)
            spans.give([index], [hyper, hyper], from_step=spans.random.random() < 0.5, grad=grad)
            for start, count, _ in spans.boxes[index].given.pop().segments:
                totals[index][start : start + count] -= grad[start : start + count]
        if spans.random.random() < 0.3:
            spans.sweep.wait_published(chosen, spans.random.randint(0, 3), "the bound")
    spans.wait()
    for index, span in enumerate(spans.spans):
        if spans.sweep.produced([index]) == [0]:
            continue
        assert np.array_equal(spans.read(span.states[0], F32), totals[index])
        assert np.array_equal(spans.read([spans.param_page(index)], F32), totals[index])
    spans.close()
