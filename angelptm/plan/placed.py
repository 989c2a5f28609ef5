"""Where every page lives: what planning comes to."""

from __future__ import annotations

from dataclasses import dataclass

from angelptm.plan.arena import ArenaPlacement
from angelptm.plan.shares import WHOLE, Share
from angelptm.states.layout import SpanStates, elements_on_page, splits_masters
from angelptm.units.layout import ParamLayout, UnitLayout

PEER = "peer"
"""The home of a page that belongs to another rank."""


@dataclass(frozen=True)
class SpanPlan:
    """A span of a unit: the elements of one PARAM page. ``states_home`` is "device", "host" or "ssd"; on the device the
    states take consecutive frames from ``state_frame`` on, page after page. ``owner``: the rank that it belongs to; all
    homes of another one's are PEER."""

    elements: int
    states: SpanStates
    states_home: str
    grad_homes: tuple[str, ...]
    param_home: str
    state_frame: int | None = None
    owner: int = 0

    @property
    def is_mine(self) -> bool:
        return self.param_home != PEER


@dataclass(frozen=True)
class UnitPlan:
    """A unit's frames in the arena, its spans, and the homes of its frozen PARAM pages. ``owners``: of all PARAM
    pages, those of the frozen section behind the spans'."""

    layout: UnitLayout
    frame_offset: int
    frame_count: int
    spans: tuple[SpanPlan, ...]
    frozen_homes: tuple[str, ...]
    owners: tuple[int, ...]

    @property
    def waits_for_step(self) -> bool:
        """Whether the unit is updated at the end of the step at the earliest: its frozen parameters may be needed after
        its last gradient, and gradients on the SSD are all written first."""
        grads_on_ssd = any(home == "ssd" for span in self.spans for home in span.grad_homes)
        return grads_on_ssd or self.layout.frozen_elements > 0


@dataclass(frozen=True)
class Plan:
    """Where every page lives. ``staging_frames`` are what is left of the host pool for pages on the move."""

    page_bytes: int
    param_itemsize: int
    grad_itemsize: int
    moment_count: int
    page_elements: int  # of a PARAM page, and so of a span: all that fit, or less where states are records
    units: tuple[UnitPlan, ...]
    arena: ArenaPlacement
    device_frames: int
    host_frames: int
    update_threads: int
    ring_depth: int
    write_depth: int  # spans of each thread's ring that may be written at once: there are slots for so many
    ring_frames: int
    home_frames: int
    staging_frames: int
    saver_frames: int  # kept by the thread that makes commits
    readout_frames: int  # through which gradients come from a device that is apart
    ssd_slots: int
    commit_slots: int  # of them: what commits hold beyond what is current
    ssd_slots_by_path: tuple[tuple[str, int, float], ...]
    kind_bytes: dict[str, dict[str, int]]  # kind → tier → bytes of whole pages
    grad_sets: int = 1  # of GRAD pages: what waits for its update, and beside it, with 2, a step's own
    spare_frames: int = 0  # for former parameters that are still read while new ones are published
    params_stay: bool = False  # of updates that nobody waits for: each unit has arena frames of its own
    share: Share = WHOLE  # of the pages: those that have a home here

    @property
    def fetch_frames(self) -> int:
        """Of the staging frames: what pages on their way to the device may hold. The rest is for gradients that go to
        the SSD, and for whoever reads or writes whole parameters."""
        grads_on_ssd = any(home == "ssd" for unit in self.units for span in unit.spans for home in span.grad_homes)
        others = self.staging_frames // 2 if grads_on_ssd else min(2, self.staging_frames // 2)
        return max(1, self.staging_frames - others)

    @property
    def moving_frames(self) -> int:
        """Host frames that neither live there nor belong to the updater: for what is on its way, to commits too."""
        return self.staging_frames + self.saver_frames + self.readout_frames

    @property
    def update_slots(self) -> int:
        """SSD slots that updates may take at once for what they write, beyond one for each page that lives there."""
        written = [
            (len(span.states.pages) if span.states_home == "ssd" else 0) + (span.param_home == "ssd")
            for unit in self.units
            for span in unit.spans
        ]
        return self.update_threads * self.write_depth * max(written, default=0)

    @property
    def sweeps(self) -> bool:
        """Whether updating threads exchange the frames of parameters and gradients."""
        return self.spare_frames > 0

    @property
    def grad_page_elements(self) -> int:
        return elements_on_page(self.page_elements, self.grad_itemsize, self.page_bytes)

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """Kinds of state pages: those of separate states, or that of records."""
        return tuple(kind for kind in self.kind_bytes if kind not in ("PARAM", "GRAD"))

    @property
    def splits_masters(self) -> bool:
        """Whether a master is a trainable parameter and a remainder, so that neither is anything without the other."""
        return splits_masters([unit.layout for unit in self.units])

    def pieces_of(self, unit: int, param: ParamLayout) -> list[tuple[int, int, int]]:
        """A parameter's elements by the PARAM page that they are on: (start, end, owner) each."""
        layout, step = self.units[unit].layout, self.page_elements
        first = 0 if param.trainable else layout.frozen_offset
        before = 0 if param.trainable else len(self.units[unit].spans)
        found = []
        for page in range((param.offset - first) // step, -(-(param.end - first) // step)):
            start, end = max(param.offset, first + page * step), min(param.end, first + (page + 1) * step)
            found.append((start - param.offset, end - param.offset, self.units[unit].owners[before + page]))
        return found

    def param_offset(self, unit: int, index: int) -> int:
        """Bytes from the start of the arena to the unit's PARAM page of that index, where the arena is as it was laid
        out at first: a unit's parameters follow one another there without a gap."""
        return self.units[unit].frame_offset * self.page_bytes + index * self.page_elements * self.param_itemsize

    @property
    def device_peak_bytes(self) -> int:
        """Of the arena: parameters at most, and the states that live there."""
        return (self.arena.peak_frames + self.device_state_frames) * self.page_bytes

    @property
    def device_state_frames(self) -> int:
        """Frames behind those of parameters that hold states."""
        states = [tiers["device"] for kind, tiers in self.kind_bytes.items() if kind not in ("PARAM", "GRAD")]
        return sum(states) // self.page_bytes
