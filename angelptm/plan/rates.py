"""How fast a machine's channels are: measured once, read by the simulator."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from angelptm.plan import jsonfile
from angelptm.plan.placed import Plan
from angelptm.plan.transfers import transfers_of

_KIND, _VERSION = "angelptm rates", 3
_REMEDY = "Measure the machine's rates anew."


@dataclass(frozen=True)
class Rates:
    """Rates of one machine.

    ``ssd_mixed_bytes_per_s`` is the sum of both directions at an equal mix of reads and writes.
    ``update_elements_per_s`` is of one thread: the kernel and the checksums of what it reads and writes.
    ``compute_uses_cores``: the device is the CPU, so that computing, copying and updating share ``cores``; computing
    takes ``compute_threads`` of them, None for all. ``compute_beside_update`` and ``update_beside_compute`` are the
    speeds of computing and of one thread that updates beside each other, parts of what each has alone; None where they
    were not measured, for an even share of the cores. ``compute_beside_drive`` is the speed of computing while the
    drive is busy: the system's part of a transfer takes cores, and what waits for each other then waits longer.
    ``compute_per_s`` has a unit of its own: two measurements of one machine tell how its speed changed.
    """

    ssd_read_bytes_per_s: float
    ssd_write_bytes_per_s: float
    ssd_mixed_bytes_per_s: float
    ssd_latency_seconds: float
    host_to_device_bytes_per_s: float
    device_to_host_bytes_per_s: float
    update_elements_per_s: float
    gradient_bytes_per_s: float
    cores: int
    compute_uses_cores: bool
    compute_threads: int | None = None
    compute_beside_update: float | None = None
    update_beside_compute: float | None = None
    compute_beside_drive: float | None = None
    compute_per_s: float | None = None

    def to_json(self) -> str:
        return jsonfile.dump(_KIND, _VERSION, asdict(self))

    @staticmethod
    def from_json(text: str, path: str = "rates") -> Rates:
        """Raises PlanFileError; ``path`` is for its message."""
        fields = jsonfile.parse(text, path, _KIND, _VERSION, _REMEDY)
        return Rates(
            ssd_read_bytes_per_s=fields.number("ssd_read_bytes_per_s", positive=True),
            ssd_write_bytes_per_s=fields.number("ssd_write_bytes_per_s", positive=True),
            ssd_mixed_bytes_per_s=fields.number("ssd_mixed_bytes_per_s", positive=True),
            ssd_latency_seconds=fields.number("ssd_latency_seconds"),
            host_to_device_bytes_per_s=fields.number("host_to_device_bytes_per_s", positive=True),
            device_to_host_bytes_per_s=fields.number("device_to_host_bytes_per_s", positive=True),
            update_elements_per_s=fields.number("update_elements_per_s", positive=True),
            gradient_bytes_per_s=fields.number("gradient_bytes_per_s", positive=True),
            cores=fields.whole("cores", 1),
            compute_uses_cores=fields.flag("compute_uses_cores"),
            compute_threads=None
            if fields.raw("compute_threads", "a whole number or null") is None
            else fields.whole("compute_threads", 1),
            compute_beside_update=_or_none(fields, "compute_beside_update"),
            update_beside_compute=_or_none(fields, "update_beside_compute"),
            compute_beside_drive=_or_none(fields, "compute_beside_drive"),
            compute_per_s=_or_none(fields, "compute_per_s"),
        )

    def save(self, path: str | Path) -> None:
        jsonfile.write_text(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> Rates:
        return Rates.from_json(jsonfile.read_text(path, _KIND, _REMEDY), str(path))


NOMINAL_RATES = Rates(
    ssd_read_bytes_per_s=2e9,
    ssd_write_bytes_per_s=1e9,
    ssd_mixed_bytes_per_s=1.5e9,
    ssd_latency_seconds=1e-4,
    host_to_device_bytes_per_s=8e9,
    device_to_host_bytes_per_s=8e9,
    update_elements_per_s=5e8,
    gradient_bytes_per_s=5e9,
    cores=2,
    compute_uses_cores=True,
)
"""Of a common small machine with an NVMe drive: for what is planned without measuring one."""


@dataclass(frozen=True)
class ChannelRates:
    """What a machine's channels give by themselves, whatever runs over them; elements and bytes per second of one core
    where cores work."""

    ssd_read_bytes_per_s: float
    ssd_write_bytes_per_s: float
    ssd_mixed_bytes_per_s: float
    ssd_latency_seconds: float
    host_to_device_bytes_per_s: float
    device_to_host_bytes_per_s: float
    update_elements_per_s: float
    checksum_bytes_per_s: float
    gradient_bytes_per_s: float
    cores: int
    compute_uses_cores: bool


def rates_for(plan: Plan, channels: ChannelRates) -> Rates:
    """The rates that a plan's pages meet: what lives on the SSD is checked when it has come, and sealed before it is
    written, by the thread that updates or fetches it."""
    spans = [span for unit in plan.units for span in unit.spans if span.is_mine]
    total = sum(span.elements for span in spans) or 1
    states_staged = sum(page.bytes for span in spans if span.states_home == "ssd" for page in span.states.pages) / total
    old_params_staged = sum(span.old_param_ssd_bytes for unit in transfers_of(plan) for span in unit.spans) / total
    params_staged = sum(span.elements for span in spans if span.param_home == "ssd") / total
    checked_bytes = 2 * states_staged + old_params_staged + plan.param_itemsize * params_staged
    return Rates(
        ssd_read_bytes_per_s=channels.ssd_read_bytes_per_s,
        ssd_write_bytes_per_s=channels.ssd_write_bytes_per_s,
        # Both directions at once have no more than each of them alone.
        ssd_mixed_bytes_per_s=min(
            channels.ssd_mixed_bytes_per_s, channels.ssd_read_bytes_per_s + channels.ssd_write_bytes_per_s
        ),
        ssd_latency_seconds=channels.ssd_latency_seconds,
        host_to_device_bytes_per_s=1
        / (1 / channels.host_to_device_bytes_per_s + params_staged / channels.checksum_bytes_per_s),
        device_to_host_bytes_per_s=channels.device_to_host_bytes_per_s,
        update_elements_per_s=1 / (1 / channels.update_elements_per_s + checked_bytes / channels.checksum_bytes_per_s),
        gradient_bytes_per_s=channels.gradient_bytes_per_s,
        cores=channels.cores,
        compute_uses_cores=channels.compute_uses_cores,
    )


def _or_none(fields: jsonfile.Fields, name: str) -> float | None:
    return None if fields.raw(name, "a number or null") is None else fields.number(name, positive=True)
