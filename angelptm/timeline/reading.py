"""What the last section of the report says."""

from __future__ import annotations

from collections.abc import Iterable

from angelptm.timeline.html import paragraph

_PARAGRAPHS = (
    "A step runs from the first forward to the return of step(). It is drawn from left to right, one row for each "
    "lane: what the step itself does (forward, backward, step), the moves over each link, and each thread that "
    "updates. Point at a bar to see its name and length. What overlaps within a lane is drawn on a track below.",
    "A stall is time in which the step itself could do nothing, named by what it waited for. Moves and updates that "
    "take place while the step computes cost nothing; only stalls do. To shorten a step, begin with the first row "
    "of “Stalls by cause”, and look in the timeline at what was busy at that time.",
    "A roofline is the least time that the machine needs for what a phase has to do: its bytes at the measured rate "
    "of the link, its operations at the measured rate of the processor. “Reached” is that time divided by the "
    "measured one; 100 % cannot be beaten without moving fewer bytes. The step's own is its busiest channel alone, "
    "as if everything else were hidden behind it.",
    "Predicted figures are the planner's, from rates measured before the run. A ratio near 1 means that the step "
    "went as planned; a far one that the machine behaved differently, for example because others used its drive.",
    "Sizes are binary (1 GiB = 1024 MiB) unless they say GB (10⁹ bytes). Budgets are those of the config.",
    "The same events are in timeline.perfetto.json, which ui.perfetto.dev and chrome://tracing open: there one can "
    "zoom.",
)


def reading() -> Iterable[str]:
    """HTML."""
    for content in _PARAGRAPHS:
        yield paragraph(content)
