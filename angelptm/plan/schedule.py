"""The moves of one step: which unit is fetched when, what is read ahead, in which order updates run.

Made from a plan and a trace, pure data. Time is the index of a use in the cyclic step; a trigger is the use at whose
entry a move is issued. Negative ones are in the former step: -1 is its end, after ``step()``, and -1 - k the entry of
its k-th last use.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from angelptm.plan import jsonfile
from angelptm.plan.jsonfile import Fields
from angelptm.sizes import format_bytes

UPDATES = ("backward", "forward")
LINKS = ("ssd_read", "ssd_written", "host_to_device", "device_to_host", "published")
_KIND, _VERSION = "angelptm schedule", 1
_REMEDY = "Make the schedule anew from its plan and trace."

Traffic = dict[str, dict[str, int]]
"""kind → link → bytes in one step."""


@dataclass(frozen=True)
class Fetch:
    """Bringing a unit to the device for ``use``. At ``trigger`` its frames are free of every unit that shares them;
    at ``read_ahead_trigger``, not later, its pages on the SSD may be read into staging frames. Bytes: ``bytes`` of
    content to the device, of which ``ssd_bytes`` in ``ssd_pages`` are read from the SSD."""

    unit: int
    use: int
    trigger: int
    read_ahead_trigger: int
    bytes: int
    ssd_bytes: int
    ssd_pages: int


@dataclass(frozen=True)
class CopyOut:
    """A unit's gradients go to the host during ``use``; ``ssd_bytes`` of them are written behind to the SSD."""

    unit: int
    use: int
    bytes: int
    ssd_bytes: int


@dataclass(frozen=True)
class WriteBack:
    """What the update of a unit reads from the SSD and writes to it."""

    unit: int
    read_bytes: int
    state_bytes: int
    param_bytes: int


@dataclass(frozen=True)
class Schedule:
    """The moves of one step.

    ``fetches`` are in order of use. ``read_ahead_order``: units whose states the updater reads before their gradients
    come, empty for none. ``read_ahead_frames``: host frames for pages read ahead of their fetch. ``updates``:
    "backward", as gradients complete, or "forward", all at the end of the step.
    """

    updates: str
    use_count: int
    lead: int | None
    offsets: tuple[int, ...]
    peak_frames: int
    lower_bound_frames: int
    fetches: tuple[Fetch, ...]
    update_order: tuple[int, ...]
    read_ahead_order: tuple[int, ...]
    read_ahead_frames: int
    copy_outs: tuple[CopyOut, ...]
    write_backs: tuple[WriteBack, ...]
    traffic: Traffic

    @property
    def traffic_bytes(self) -> int:
        """All bytes over all links; what is published crosses none."""
        return sum(size for links in self.traffic.values() for link, size in links.items() if link != "published")

    def describe(self) -> str:
        """The schedule in a few lines, for a terminal."""
        ahead = [fetch.use - fetch.trigger for fetch in self.fetches]
        deeper = [fetch.trigger - fetch.read_ahead_trigger for fetch in self.fetches if fetch.ssd_pages]
        lines = [
            f"{self.use_count} uses, {len(self.fetches)} fetches of {format_bytes(sum(f.bytes for f in self.fetches))}",
            f"arena: {self.peak_frames} frames, at least {self.lower_bound_frames}",
            f"fetches run {sum(ahead) / len(ahead):.1f} uses ahead on average" if ahead else "nothing is fetched",
        ]
        if deeper:
            lines.append(f"reads from the SSD run {sum(deeper) / len(deeper):.1f} uses ahead of these")
        lines.append(f"updates run {'during the backward pass' if self.updates == 'backward' else 'after the step'}")
        for kind, links in self.traffic.items():
            moved = ", ".join(f"{link.replace('_', ' ')} {format_bytes(size)}" for link, size in links.items() if size)
            if moved:
                lines.append(f"{kind}: {moved}")
        return "\n".join(lines)

    def to_json(self) -> str:
        return jsonfile.dump(_KIND, _VERSION, asdict(self))

    @staticmethod
    def from_json(text: str, path: str = "schedule") -> Schedule:
        """Raises PlanFileError; ``path`` is for its message."""
        fields = jsonfile.parse(text, path, _KIND, _VERSION, _REMEDY)
        count = fields.whole("use_count")
        least = -count - 1
        traffic = fields.inner("traffic")
        return Schedule(
            updates=fields.text("updates", UPDATES),
            use_count=count,
            lead=None if fields.raw("lead", "a whole number or null") is None else fields.whole("lead"),
            offsets=fields.wholes("offsets"),
            peak_frames=fields.whole("peak_frames"),
            lower_bound_frames=fields.whole("lower_bound_frames"),
            fetches=fields.objects("fetches", lambda one: _read_fetch(one, least)),
            update_order=fields.wholes("update_order"),
            read_ahead_order=fields.wholes("read_ahead_order"),
            read_ahead_frames=fields.whole("read_ahead_frames"),
            copy_outs=fields.objects(
                "copy_outs", lambda one: CopyOut(*(one.whole(name) for name in ("unit", "use", "bytes", "ssd_bytes")))
            ),
            write_backs=fields.objects(
                "write_backs",
                lambda one: WriteBack(
                    *(one.whole(name) for name in ("unit", "read_bytes", "state_bytes", "param_bytes"))
                ),
            ),
            traffic={
                kind: {link: traffic.inner(kind).whole(link) for link in LINKS} for kind in fields.free("traffic")
            },
        )

    def save(self, path: str | Path) -> None:
        jsonfile.write_text(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> Schedule:
        return Schedule.from_json(jsonfile.read_text(path, _KIND, _REMEDY), str(path))


def _read_fetch(fields: Fields, least: int) -> Fetch:
    return Fetch(
        fields.whole("unit"),
        fields.whole("use"),
        fields.whole("trigger", least),
        fields.whole("read_ahead_trigger", least),
        fields.whole("bytes"),
        fields.whole("ssd_bytes"),
        fields.whole("ssd_pages"),
    )
