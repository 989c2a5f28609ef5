"""What one training step did, in the order in which it did it: all that a plan needs to know of a model.

Recorded from a step that ran, or made up from the layouts before any ran. Pure data with a JSON form, so that a plan
can be made, compared and drawn on a machine that has neither the model nor its device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from angelptm.plan import jsonfile
from angelptm.plan.arena import Window
from angelptm.plan.jsonfile import Fields
from angelptm.states.formats import FP32, MASTER_ITEMSIZE, MOMENT_ITEMSIZE, StateFormats
from angelptm.units.layout import ParamLayout, UnitLayout

PHASES = ("forward", "recompute", "backward")
_KIND, _VERSION = "angelptm trace", 1
_REMEDY = "Record the trace anew with a run of this version."


@dataclass(frozen=True)
class Use:
    """One entry of a site: its units must be on the device from here until the use ends.

    ``seconds`` is its computing alone, without waits for pages, until the next use is entered. ``last`` is the index of
    the last use that is entered before this one ends: its own unless sites nest. ``activation_bytes`` are alive when it
    ends.
    """

    site: int
    units: tuple[int, ...]
    phase: str
    seconds: float
    last: int
    activation_bytes: int = 0


@dataclass(frozen=True)
class GradientDone:
    """The gradients of a unit are complete for this step during use ``use``. ``copy_seconds``: copying them to the host
    took this of the computing thread's time, in addition to the use's own seconds."""

    unit: int
    use: int
    bytes: int
    copy_seconds: float


@dataclass(frozen=True)
class Trace:
    """One step. ``uses`` in order of entry; ``sites`` are (units, depth) in the order of a forward pass.

    ``step_seconds`` is what the traced step took with its waits, 0 where none ran. ``facts`` is free-form JSON data
    about where the trace is from.
    """

    uses: tuple[Use, ...]
    gradients: tuple[GradientDone, ...]
    layouts: tuple[UnitLayout, ...]
    sites: tuple[tuple[tuple[int, ...], int], ...]
    param_itemsize: int
    grad_itemsize: int
    moment_count: int
    step_seconds: float = 0.0
    tokens_per_step: int = 0
    facts: Mapping[str, object] = field(default_factory=dict)

    def windows(self) -> list[list[Window]]:
        """Of each unit, the spans of uses during which it must be on the device."""
        windows: list[list[Window]] = [[] for _ in self.layouts]
        for index, use in enumerate(self.uses):
            for unit in use.units:
                windows[unit].append(Window(index, use.last))
        return windows

    def scaled(self, factor: float) -> Trace:
        """The same step on a machine that takes ``factor`` times as long to compute."""
        return replace(
            self,
            uses=tuple(replace(use, seconds=use.seconds * factor) for use in self.uses),
            gradients=tuple(replace(done, copy_seconds=done.copy_seconds * factor) for done in self.gradients),
        )

    def to_json(self) -> str:
        return jsonfile.dump(
            _KIND,
            _VERSION,
            {
                "uses": [vars(use) for use in self.uses],
                "gradients": [vars(done) for done in self.gradients],
                "layouts": [_layout_json(layout) for layout in self.layouts],
                "sites": [{"units": units, "depth": depth} for units, depth in self.sites],
                "param_itemsize": self.param_itemsize,
                "grad_itemsize": self.grad_itemsize,
                "moment_count": self.moment_count,
                "step_seconds": self.step_seconds,
                "tokens_per_step": self.tokens_per_step,
                "facts": dict(self.facts),
            },
        )

    @staticmethod
    def from_json(text: str, path: str = "trace") -> Trace:
        """Raises PlanFileError for anything that no step can be; ``path`` is for its message."""
        fields = jsonfile.parse(text, path, _KIND, _VERSION, _REMEDY)
        layouts = fields.objects("layouts", _read_layout)
        for index, layout in enumerate(layouts):
            if layout.index != index:
                raise fields.error(f"layouts[{index}].index", layout.index, f"{index}, its place in the list")
        uses = fields.objects("uses", _reader_of_uses(len(layouts)))
        for index, use in enumerate(uses):
            if not index <= use.last < len(uses):
                expected = f"a whole number from {index} to {len(uses) - 1}, a use entered before this one ended"
                raise fields.error(f"uses[{index}].last", use.last, expected)
        trace = Trace(
            uses=uses,
            gradients=fields.objects("gradients", _reader_of_gradients(len(layouts), len(uses))),
            layouts=layouts,
            sites=fields.objects("sites", lambda one: (_units(one, len(layouts)), one.whole("depth"))),
            param_itemsize=fields.whole("param_itemsize", 1),
            grad_itemsize=fields.whole("grad_itemsize", 1),
            moment_count=fields.whole("moment_count"),
            step_seconds=fields.number("step_seconds"),
            tokens_per_step=fields.whole("tokens_per_step"),
            facts=fields.free("facts"),
        )
        if len({done.unit for done in trace.gradients}) < len(trace.gradients):
            raise fields.error("gradients", [done.unit for done in trace.gradients], "each unit at most once")
        return trace

    def save(self, path: str | Path) -> None:
        jsonfile.write_text(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> Trace:
        return Trace.from_json(jsonfile.read_text(path, _KIND, _REMEDY), str(path))


def _layout_json(layout: UnitLayout) -> dict[str, object]:
    """Formats of states are left out where they are fp32."""
    params = []
    for param in layout.params:
        fields = {**vars(param), "states": vars(param.states)}
        if param.states == FP32:
            del fields["states"]
        params.append(fields)
    return {**vars(layout), "params": params}


def _read_layout(fields: Fields) -> UnitLayout:
    return UnitLayout(
        name=fields.text("name"),
        index=fields.whole("index"),
        params=fields.objects("params", _read_param),
        trainable_elements=fields.whole("trainable_elements"),
        frozen_offset=fields.whole("frozen_offset"),
        frozen_elements=fields.whole("frozen_elements"),
    )


def _read_param(fields: Fields) -> ParamLayout:
    owners = fields.raw("owners", "a list of pairs of texts")
    if not isinstance(owners, list) or any(
        not isinstance(owner, list) or len(owner) != 2 or not all(isinstance(part, str) for part in owner)
        for owner in owners
    ):
        raise fields.error("owners", owners, "a list of pairs of texts")
    return ParamLayout(
        name=fields.text("name"),
        shape=fields.wholes("shape"),
        offset=fields.whole("offset"),
        trainable=fields.flag("trainable"),
        owners=tuple((owner[0], owner[1]) for owner in owners),
        states=_read_states(fields),
    )


def _read_states(fields: Fields) -> StateFormats:
    if not fields.has("states"):
        return FP32
    own = fields.inner("states")
    return StateFormats(
        master=own.text("master", tuple(MASTER_ITEMSIZE)),
        exp_avg=own.text("exp_avg", tuple(MOMENT_ITEMSIZE)),
        exp_avg_sq=own.text("exp_avg_sq", tuple(MOMENT_ITEMSIZE)),
    )


def _units(fields: Fields, count: int) -> tuple[int, ...]:
    units = fields.wholes("units")
    if any(unit >= count for unit in units):
        raise fields.error("units", list(units), f"indices of the {count} layouts")
    return units


def _reader_of_uses(unit_count: int) -> Callable[[Fields], Use]:
    def read(fields: Fields) -> Use:
        return Use(
            site=fields.whole("site"),
            units=_units(fields, unit_count),
            phase=fields.text("phase", PHASES),
            seconds=fields.number("seconds"),
            last=fields.whole("last"),
            activation_bytes=fields.whole("activation_bytes"),
        )

    return read


def _reader_of_gradients(unit_count: int, use_count: int) -> Callable[[Fields], GradientDone]:
    def read(fields: Fields) -> GradientDone:
        done = GradientDone(
            fields.whole("unit"), fields.whole("use"), fields.whole("bytes"), fields.number("copy_seconds")
        )
        for name, value, count in (("unit", done.unit, unit_count), ("use", done.use, use_count)):
            if value >= count:
                raise fields.error(name, value, f"an index of the {count} {'layouts' if name == 'unit' else 'uses'}")
        return done

    return read


def synthetic_trace(
    layouts: Sequence[UnitLayout],
    sites: Sequence[tuple[Sequence[int], int]],
    *,
    param_itemsize: int,
    grad_itemsize: int,
    moment_count: int,
    seconds_per_element: float = 0.0,
    gradient_bytes_per_s: float = float("inf"),
    tokens_per_step: int = 0,
) -> Trace:
    """A trace of a step that nobody ran: sites forward in their order, then back in reverse.

    A use takes ``seconds_per_element`` times the elements of its units, a backward one twice that. The gradients of a
    unit are complete at the end of its last use. Without nested sites the windows are those of ``windows_of``.
    """
    count = len(sites)
    ends = []
    for entry, (_, depth) in enumerate(sites):
        last = entry
        while last + 1 < count and sites[last + 1][1] > depth:
            last += 1
        ends.append(last)
    uses: list[Use] = []
    for entry, (units, _) in enumerate(sites):
        seconds = seconds_per_element * sum(layouts[unit].numel for unit in units)
        uses.append(Use(entry, tuple(units), "forward", seconds, ends[entry]))
    # Backward, a site is entered where its forward ended, an outer one before those inside it.
    for place, entry in enumerate(sorted(range(count), key=lambda entry: (-ends[entry], entry))):
        units = sites[entry][0]
        seconds = 2 * seconds_per_element * sum(layouts[unit].numel for unit in units)
        inside = ends[entry] - entry
        uses.append(Use(entry, tuple(units), "backward", seconds, count + place + inside))
    last_use: dict[int, int] = {}
    for use in uses:
        for unit in use.units:
            last_use[unit] = max(last_use.get(unit, 0), use.last)
    gradients = []
    for layout in layouts:
        if layout.trainable_elements and layout.index in last_use:
            size = sum(param.numel for param in layout.params if param.trainable) * grad_itemsize
            gradients.append(GradientDone(layout.index, last_use[layout.index], size, size / gradient_bytes_per_s))
    gradients.sort(key=lambda done: (done.use, done.unit))
    return Trace(
        uses=tuple(uses),
        gradients=tuple(gradients),
        layouts=tuple(layouts),
        sites=tuple((tuple(units), depth) for units, depth in sites),
        param_itemsize=param_itemsize,
        grad_itemsize=grad_itemsize,
        moment_count=moment_count,
        tokens_per_step=tokens_per_step,
    )
