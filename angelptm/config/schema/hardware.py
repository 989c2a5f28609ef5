"""The hardware file: what a machine has and what its channels give. `angelptm measure` and `angelptm io tune` write it.

Every section may be missing; what needs one says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from angelptm.config.problem import config_error
from angelptm.config.schema.execution import Io
from angelptm.config.schema.types import Bytes, Section, UserPath
from angelptm.errors import ConfigError

_WRITERS = "`angelptm measure` or `angelptm io tune`"


class Flops(Section):
    """Multiplications and additions per second in products of large matrices."""

    fp32: float = Field(gt=0, description="In fp32, as torch multiplies by default.")
    bf16: float = Field(gt=0, description="In bf16.")


class DeviceRates(Section):
    """What one of the machine's devices gives while it does nothing else."""

    name: str = Field(default="", description="For people.")
    kind: str = Field(default="cuda", description="cuda, or cpu where models compute on the host's cores.")
    count: int = Field(default=1, ge=1, description="How many of them there are. A run of this version uses one.")
    memory: Bytes | None = Field(default=None, ge=1, description="Bytes of one. null: not apart from the host's.")
    flops_per_s: Flops = Field(description="Products of matrices.")
    memory_bytes_per_s: float = Field(gt=0, description="What large element-wise operators read and write.")
    cached_bytes_per_s: float = Field(gt=0, description="What small ones do, whose operands the caches hold.")
    cache: Bytes = Field(default=8 * 2**20, ge=1, description="Bytes up to which operands count as cached.")
    call_seconds: float = Field(default=1e-5, ge=0, description="Of an operator that does nothing.")


class LinkRates(Section):
    """Measured rates between memories, bytes per second."""

    host_to_device_bytes_per_s: float = Field(gt=0, description="Copies of pages from page-locked memory, one way.")
    device_to_host_bytes_per_s: float = Field(gt=0, description="The other way.")
    all_gather_bytes_per_s: float | None = Field(
        default=None, gt=0, description="What each device receives of an all-gather among all. null: one device."
    )


class UpdateRates(Section):
    """Elements that one thread updates in a second with AdamW, by the format of the moments."""

    fp32: float = Field(gt=0, description="fp32 moments.")
    bf16: float | None = Field(default=None, gt=0, description="bf16 moments. null: as fp32.")
    int8: float | None = Field(default=None, gt=0, description="int8 moments. null: as fp32.")


class HostRates(Section):
    """The host: its memory and what one of its cores gives."""

    memory: Bytes = Field(ge=1, description="Bytes of DRAM that a run may have, any control group's limit considered.")
    cores: int = Field(ge=1, description="Cores that a run may have.")
    copy_bytes_per_s: float = Field(gt=0, description="Copying of pages by one core, bytes of content.")
    checksum_bytes_per_s: float = Field(gt=0, description="CRC32C by one core.")
    accumulate_bytes_per_s: float = Field(gt=0, description="Gradients brought to their pages by one core.")
    memory_bytes_per_s: float | None = Field(
        default=None, gt=0, description="What all cores together read and write. null: as much as they ask for."
    )
    update_elements_per_s: UpdateRates = Field(description="The update kernel.")


class SsdRates(Section):
    """Measured rates of one folder, bytes per second."""

    path: UserPath = Field(description="The folder that was measured.")
    capacity: Bytes | None = Field(default=None, ge=1, description="Bytes that were free there. null: not known.")
    read_bytes_per_s: float = Field(gt=0, description="Sequential reads of pages.")
    write_bytes_per_s: float = Field(gt=0, description="Sequential writes of pages.")
    mixed_bytes_per_s: float = Field(gt=0, description="Reads and writes of pages at once, summed.")
    latency_seconds: float = Field(default=1e-4, ge=0, description="Of one read by itself, beside its transfer.")


class TunedIo(Section):
    """The settings that were fastest."""

    backend: str = Field(default="auto", description="Value for io.backend.")
    queue_depth: int = Field(default=16, ge=1, description="Value for io.queue_depth.")
    block_bytes: Bytes | None = Field(default=None, description="Block size of the measurement, in bytes.")


class Hardware(Section):
    """One machine."""

    device: DeviceRates | None = Field(default=None, description="Where models compute.")
    host: HostRates | None = Field(default=None, description="Memory and cores.")
    links: LinkRates | None = Field(default=None, description="Between host and device, and among devices.")
    ssd: list[SsdRates] = Field(default=[], description="Rates of each SSD folder.")
    io: TunedIo = Field(default=TunedIo(), description="The fastest I/O settings.")
    machine: Any = Field(default=None, description="What was measured, for people.")
    date: Any = Field(default=None, description="When it was measured, for people.")
    source: Any = Field(default=None, description="Where figures that nobody measured are from, for people.")

    @property
    def predicts(self) -> bool:
        """Whether it says enough of the machine to foresee a step on it."""
        return self.device is not None and self.host is not None


def load_hardware(path: Path) -> Hardware:
    """The file's content. Raises ConfigError for a missing or malformed one, keys prefixed by the file's name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ConfigError("hardware", str(path), f"a YAML mapping, as {_WRITERS} writes it")
        return Hardware.model_validate(content)
    except OSError as error:
        raise ConfigError(
            "hardware", str(path), f"a readable file ({error.strerror})", f"{_WRITERS} writes one."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("hardware", str(path), f"valid YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        raise config_error(error, Hardware, prefix=f"{path}: ") from None


def tuned_io(hardware: Hardware, path: Path) -> Io:
    """The I/O settings of a hardware file, checked like the ``io`` section."""
    tuned = hardware.io
    try:
        return Io.model_validate({"backend": tuned.backend, "queue_depth": tuned.queue_depth})
    except ValidationError as error:
        raise config_error(error, Io, prefix=f"{path}: io.") from None
