"""What a simulated step is said to take, and how it is to be run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from angelptm.plan.channels import Event
from angelptm.plan.schedule import Traffic
from angelptm.sizes import format_bytes

MODES = ("planned", "demand", "serial")
CHANNELS = ("compute", "ssd", "host_to_device", "cores", "updater", "gradient copy")


@dataclass(frozen=True)
class Settings:
    """How a step runs. ``mode``: "planned"; "demand", without moves ahead of use; "serial", which also begins updates
    after the step and waits for all of them before the next. ``updates`` as in Schedule. None takes the plan's."""

    mode: str = "planned"
    updates: str = "backward"
    update_threads: int | None = None
    ring_depth: int | None = None

    def __post_init__(self) -> None:
        assert self.mode in MODES, self.mode


@dataclass(frozen=True)
class Prediction:
    """A step, the steady one: like the one before it. Where no step becomes like the one before it, ``steady`` is False
    and the last ones are averaged: then the bytes moved may differ from a step's by some spans.

    ``busy_seconds`` by channel: what is named ``cores`` is the share of all cores in use, ``updater`` of its threads.
    ``stall_seconds`` by cause, "update of UNIT" or "fetch of UNIT". The step is computing, copying of gradients and
    stalls. ``handed_over_bytes`` of new parameters went from the updater to a fetch, some by way of a staging frame,
    without being read from the SSD.
    """

    step_seconds: float
    busy_seconds: dict[str, float]
    stall_seconds: dict[str, float]
    traffic: Traffic
    handed_over_bytes: int
    peak_bytes: dict[str, int]
    bottleneck: str
    second_bottleneck: str
    events: tuple[Event, ...]
    steady: bool

    @property
    def traffic_bytes(self) -> int:
        """All bytes over all links."""
        return sum(size for links in self.traffic.values() for link, size in links.items() if link != "published")

    def facts(self) -> dict[str, Any]:
        """The prediction as JSON can hold it, but for its events."""
        found = asdict(replace(self, events=()))
        del found["events"]
        return found

    def describe(self) -> str:
        """The prediction in a few lines, for a terminal."""
        stalls = sum(self.stall_seconds.values())
        lines = [f"step {self.step_seconds:.3f} s, of which waiting for pages {stalls:.3f} s"]
        for channel, seconds in self.busy_seconds.items():
            share = seconds / self.step_seconds if self.step_seconds else 0.0
            lines.append(f"{channel.replace('_', ' ')}: busy {seconds:.3f} s ({share:.0%})")
        lines.append(f"bottleneck {self.bottleneck.replace('_', ' ')}, then {self.second_bottleneck.replace('_', ' ')}")
        for cause, seconds in sorted(self.stall_seconds.items(), key=lambda item: -item[1])[:3]:
            lines.append(f"waiting for {cause}: {seconds:.3f} s")
        lines.append("peak " + ", ".join(f"{tier} {format_bytes(size)}" for tier, size in self.peak_bytes.items()))
        return "\n".join(lines)


def rank(busy_seconds: dict[str, float], compute_uses_cores: bool) -> tuple[str, str]:
    """The two busiest channels. Where computing takes cores, what is busy then is the cores."""
    hidden = ("compute", "updater", "gradient copy") if compute_uses_cores else ()
    ranked = sorted(
        (channel for channel in CHANNELS if channel not in hidden),
        key=lambda channel: (-busy_seconds[channel], CHANNELS.index(channel)),
    )
    return ranked[0], ranked[1]
