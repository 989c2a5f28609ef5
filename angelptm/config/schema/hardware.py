"""The hardware file: device rates and I/O settings that `angelptm io tune` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from angelptm.config.problem import config_error
from angelptm.config.schema.execution import Io
from angelptm.config.schema.types import Bytes, Section, UserPath
from angelptm.errors import ConfigError


class SsdRates(Section):
    """Measured rates of one folder, bytes per second."""

    path: UserPath = Field(description="The folder that was measured.")
    read_bytes_per_s: float = Field(gt=0, description="Sequential reads of pages.")
    write_bytes_per_s: float = Field(gt=0, description="Sequential writes of pages.")
    mixed_bytes_per_s: float = Field(gt=0, description="Reads and writes of pages at once, summed.")


class TunedIo(Section):
    """The settings that were fastest."""

    backend: str = Field(default="auto", description="Value for io.backend.")
    queue_depth: int = Field(default=16, ge=1, description="Value for io.queue_depth.")
    block_bytes: Bytes | None = Field(default=None, description="Block size of the measurement, in bytes.")


class Hardware(Section):
    """One measured machine."""

    ssd: list[SsdRates] = Field(default=[], description="Rates of each SSD folder.")
    io: TunedIo = Field(default=TunedIo(), description="The fastest I/O settings.")
    machine: Any = Field(default=None, description="What was measured, for people.")
    date: Any = Field(default=None, description="When it was measured, for people.")


def load_hardware(path: Path) -> Hardware:
    """The file's content. Raises ConfigError for a missing or malformed one, keys prefixed by the file's name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ConfigError("hardware", str(path), "a YAML mapping, as `angelptm io tune` writes it")
        return Hardware.model_validate(content)
    except OSError as error:
        raise ConfigError("hardware", str(path), f"a readable file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("hardware", str(path), f"valid YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        raise config_error(error, Hardware, prefix=f"{path}: ") from None


def read_hardware(path: Path) -> Io:
    """The I/O settings of a hardware file, checked like the ``io`` section."""
    tuned = load_hardware(path).io
    try:
        return Io.model_validate({"backend": tuned.backend, "queue_depth": tuned.queue_depth})
    except ValidationError as error:
        raise config_error(error, Io, prefix=f"{path}: io.") from None
