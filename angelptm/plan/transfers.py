"""What each unit and each span moves: bytes between tiers, as the page table counts them.

A page's content travels, not the rest of its frame; on the SSD in whole blocks of 4096 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from angelptm.plan.placed import PEER, Plan, SpanPlan
from angelptm.states.layout import elements_on_page

_BLOCK_BYTES = 4096


def on_ssd(content_bytes: int) -> int:
    """Bytes that a transfer of a page's content takes on the SSD."""
    return -(-content_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _page_bytes(elements: int, itemsize: int, plan: Plan) -> list[int]:
    """Content of each page of a run of elements, one that begins a span."""
    step = elements_on_page(plan.page_elements, itemsize, plan.page_bytes)
    return [min(step, elements - start) * itemsize for start in range(0, elements, step)]


@dataclass(frozen=True)
class SpanTransfers:
    """SSD bytes of one update of a span, in one direction: 0 for what lives elsewhere. ``param_content_bytes`` is what
    it publishes, wherever that lives. ``old_param_ssd_bytes``: former parameters that it reads to form the masters."""

    elements: int
    state_ssd_bytes: int  # of one kind of state: each of them the same
    grad_ssd_bytes: int
    param_ssd_bytes: int
    param_content_bytes: int
    old_param_ssd_bytes: int


@dataclass(frozen=True)
class UnitTransfers:
    """A unit's spans, and what a fetch moves: ``fetch_bytes`` of content to the device, 0 where parameters live there;
    of it ``fetch_ssd_bytes`` in ``fetch_ssd_pages`` come from the SSD. ``fetch_ssd_content`` is their content."""

    spans: tuple[SpanTransfers, ...]
    fetch_bytes: int
    fetch_ssd_bytes: int
    fetch_ssd_content: int
    fetch_ssd_pages: int
    always_there: bool


def transfers_of(plan: Plan) -> tuple[UnitTransfers, ...]:
    """Of each unit of a plan."""
    units = []
    for unit in plan.units:
        pages = [(span.param_home, span.elements * plan.param_itemsize) for span in unit.spans]
        frozen = _page_bytes(unit.layout.frozen_elements, plan.param_itemsize, plan)
        pages += zip(unit.frozen_homes, frozen)
        moved = [(home, size) for home, size in pages if home not in ("device", PEER)]
        staged = [size for home, size in moved if home == "ssd"]
        units.append(
            UnitTransfers(
                spans=tuple(_span(plan, span) for span in unit.spans if span.is_mine),
                fetch_bytes=sum(size for _, size in moved),
                fetch_ssd_bytes=sum(on_ssd(size) for size in staged),
                fetch_ssd_content=sum(staged),
                fetch_ssd_pages=len(staged),
                always_there=all(home == "device" for home, _ in pages),
            )
        )
    return tuple(units)


def _span(plan: Plan, span: SpanPlan) -> SpanTransfers:
    states = sum(on_ssd(page.bytes) for page in span.states.pages)
    assert states % len(plan.state_kinds) == 0, "separate states have as many bytes for each kind"
    grads = _page_bytes(span.elements, plan.grad_itemsize, plan)
    param = span.elements * plan.param_itemsize
    return SpanTransfers(
        elements=span.elements,
        state_ssd_bytes=states // len(plan.state_kinds) if span.states_home == "ssd" else 0,
        grad_ssd_bytes=sum(on_ssd(size) for home, size in zip(span.grad_homes, grads) if home == "ssd"),
        param_ssd_bytes=on_ssd(param) if span.param_home == "ssd" else 0,
        param_content_bytes=param,
        old_param_ssd_bytes=on_ssd(param) if span.param_home == "ssd" and span.states.has_split_masters else 0,
    )
