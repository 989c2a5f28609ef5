"""Where pages may live: the byte budgets of the three tiers, and which kind goes where."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from angelptm.config.schema.types import Bytes, BytesOrAuto, Section, UserPath, expected


class SsdPath(Section):
    """One folder of the SSD tier. Several are striped."""

    path: UserPath = Field(description="Folder that holds the page files; created when it does not exist.")
    size: Bytes | None = Field(
        default=None, ge=1, description="Bytes to preallocate in this folder. null: what the plan needs."
    )
    drive_capacity: Bytes | None = Field(
        default=None,
        ge=1,
        description="Capacity of the drive, for the drive writes per day that a run reports. null: the file system's.",
    )


class Tiers(Section):
    """The budgets. They are hard: a tier never holds more than this, and a run that cannot fit is refused."""

    device: Bytes = Field(
        ge=1,
        description="Bytes of the device arena (GPU memory, emulated on device: cpu). auto: from the machine's memory.",
    )
    host: Bytes = Field(ge=1, description="Bytes of the host (DRAM) page pool. auto: what the machine can spare.")
    ssd: list[SsdPath] = Field(
        default=[], description="Folders of the SSD tier. Empty: no SSD tier. auto: the hardware file's."
    )
    keep_freed: BytesOrAuto = Field(
        default="auto",
        description="On device: cpu, memory that a step freed and that may stay for what it allocates next; what "
        "exceeds this goes back to the system. More is faster, since fresh memory has to be cleared, and 0 holds the "
        "least: a large batch then takes up to a third longer. auto: an eighth of device and host together, at least "
        "64 MiB.",
    )

    @property
    def keep_freed_bytes(self) -> int:
        if self.keep_freed == "auto":
            return max(64 * 2**20, (self.device + self.host) // 8)
        return self.keep_freed


def _states(value: Any) -> Any:
    if value in ("auto", "host", "ssd"):
        return value
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        fraction = -1.0
    if not 0.0 <= fraction <= 1.0:
        raise expected("'auto', 'host', 'ssd', or the fraction of the states kept on the host, 0.0 to 1.0")
    return fraction


class Placement(Section):
    """Which tier is the home of each kind of page. ``auto`` lets the plan choose: the fastest tier that has room."""

    param: Literal["auto", "device", "host", "ssd"] = Field(
        default="auto", description="Home of the parameters in compute precision."
    )
    grad: Literal["auto", "host", "ssd"] = Field(default="auto", description="Home of the accumulated gradients.")
    states: Annotated[Literal["auto", "host", "ssd"] | float, BeforeValidator(_states)] = Field(
        default="auto",
        description="Home of the optimizer states (fp32 master included); a number is the fraction kept on the host.",
    )

    def uses_ssd(self) -> list[str]:
        """The keys of this section that ask for the SSD tier."""
        return [name for name in ("param", "grad") if getattr(self, name) == "ssd"] + (
            ["states"] if self.states == "ssd" or (isinstance(self.states, float) and self.states < 1.0) else []
        )
