"""The whole configuration, and the rules that span sections."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from angelptm.config.problem import config_error
from angelptm.config.schema.execution import Checkpoint, Distributed, Execution, Io, Units, Update
from angelptm.config.schema.hardware import Hardware, load_hardware, tuned_io
from angelptm.config.schema.optimizer import Optimizer
from angelptm.config.schema.tiers import Placement, Tiers
from angelptm.config.schema.training import Data, Model, Schedule, Training
from angelptm.config.schema.types import Bytes, Section, UserPath, expected
from angelptm.config.sizing import AUTO, hardware_path, sized

_MIN_PAGE_BYTES = 64 * 2**10
_DEVICE = re.compile(r"cpu|late|cuda(:\d{1,3})?")


class Config(Section):
    """Everything that decides what a run does. Frozen; raises ConfigError, whether built here or by load_config."""

    device: str = Field(
        default="cpu",
        description="Where the model computes: cuda, cuda:N, or cpu, which emulates GPU memory. late is for tests: the "
        "CPU with copies that run late, as a GPU's do.",
    )
    tiers: Tiers = Field(description="Byte budgets of the device arena, the host pool and the SSD files.")
    page_size: Bytes = Field(default=4 * 2**20, description="Bytes of a page: a power of two, at least 64KiB.")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Compute precision of parameters and activations; masters have all bits of fp32."
    )
    optimizer: Optimizer = Field(default=Optimizer(), description="Update rule and parameter groups.")
    placement: Placement = Field(default=Placement(), description="Home tier of each kind of page.")
    update: Update = Field(default=Update(), description="The native updater.")
    execution: Execution = Field(default=Execution(), description="When pages move and updates run.")
    io: Io = Field(default=Io(), description="Reading and writing of page files.")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="Durable states to resume from.")
    units: Units = Field(default=Units(), description="What is fetched together.")
    distributed: Distributed = Field(default=Distributed(), description="Several ranks.")
    gradient_clipping: float | None = Field(default=None, gt=0, description="Max global gradient norm. null: off.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Micro-batches per optimizer step.")
    gradient_checkpointing: bool = Field(default=False, description="Recompute the blocks' activations in backward.")
    hardware: Literal["auto"] | UserPath | None = Field(
        default=None,
        description="YAML that `angelptm measure` or `angelptm io tune` wrote, or that describes a machine: gives "
        "io.backend and io.queue_depth if not set, sizes for tiers that are auto, and rates to `angelptm plan`. auto: "
        "`angelptm plan` measures this machine.",
    )
    model: Model = Field(default=Model(), description="The model to build; not needed for a module of your own.")
    data: Data = Field(default=Data(), description="The tokens to train on.")
    training: Training = Field(default=Training(), description="Length, seed, and what to show.")
    schedule: Schedule = Field(default=Schedule(), description="The learning rate over the steps.")
    run_dir: UserPath | None = Field(default=None, description="Folder of this run's records. null: chosen by train.")

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(error, Config) from None

    @model_validator(mode="before")
    @classmethod
    def _sizes_for_auto(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(tiers := values.get("tiers"), Mapping):
            return values
        if AUTO not in [tiers.get(name) for name in ("device", "host", "ssd") if isinstance(tiers.get(name), str)]:
            return values
        path = hardware_path(values.get("hardware"))
        hardware = None if path is None else load_hardware(path)
        return {**values, "tiers": sized(tiers, values.get("device", "cpu"), hardware)}

    @field_validator("device", mode="before")
    @classmethod
    def _known_device(cls, value: Any) -> Any:
        if not isinstance(value, str) or not _DEVICE.fullmatch(value):
            raise expected("cpu, cuda or cuda:N (or late, for tests)")
        return value

    @field_validator("precision", mode="before")
    @classmethod
    def _known_precision(cls, value: Any) -> Any:
        if value in ("fp16", "float16", "half", 16):
            raise expected("'fp32' or 'bf16'", remedy="fp16 is not offered; use bf16, which needs no loss scaling.")
        return {"float32": "fp32", "bfloat16": "bf16"}.get(value, value) if isinstance(value, str) else value

    @field_validator("page_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value < _MIN_PAGE_BYTES or value & (value - 1):
            raise expected("a power of two of at least 64KiB, such as '1MiB' or '4MiB'")
        return value

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        for tier in ("device", "host"):
            size = getattr(self.tiers, tier)
            if size < self.page_size:
                raise expected(
                    f"at least one page ({self.page_size} bytes)",
                    key=f"tiers.{tier}",
                    value=size,
                    remedy="Raise the budget or lower page_size.",
                )
        if not self.tiers.ssd and (asking := self.placement.uses_ssd()):
            raise expected(
                "a tier that the run has, as tiers.ssd is empty",
                key=f"placement.{asking[0]}",
                value=getattr(self.placement, asking[0]),
                remedy="Add tiers.ssd: [{path: FOLDER}].",
            )
        self._expect_states()
        if self.execution.updates == "backward" and self.gradient_clipping is not None:
            raise expected(
                "auto or forward, as gradient_clipping needs the norm of all gradients before the first update",
                key="execution.updates",
                value="backward",
            )
        if self.update.is_swept:
            self._expect_sweepable()
        if self.schedule.warmup_steps > self.training.steps > 0:
            raise expected(
                f"at most training.steps ({self.training.steps})",
                key="schedule.warmup_steps",
                value=self.schedule.warmup_steps,
            )
        described = self.described_hardware()
        if described is not None:
            assert isinstance(self.hardware, Path)
            object.__setattr__(self, "io", _io_from_hardware(self.io, tuned_io(described, self.hardware)))
        return self

    def described_hardware(self) -> Hardware | None:
        """What the hardware file says; None without one. Raises ConfigError."""
        return load_hardware(self.hardware) if isinstance(self.hardware, Path) else None

    def _expect_states(self) -> None:
        """A split master needs a parameter that is its upper half."""
        named = [("optimizer.states", self.optimizer.states)]
        named += [
            (f"optimizer.groups.{index}.states", group.states)
            for index, group in enumerate(self.optimizer.groups)
            if group.states is not None
        ]
        for key, states in named:
            if states.master == "split" and self.precision != "bf16":
                raise expected(
                    f"fp32 with precision: {self.precision}",
                    key=f"{key}.master",
                    value="split",
                    remedy="Set precision: bf16, or leave it out: master: split is the default there.",
                )

    def _expect_sweepable(self) -> None:
        """Updating threads exchange frames of parameters and gradients in memory."""
        for name in ("param", "grad"):
            if getattr(self.placement, name) not in ("auto", "host"):
                raise expected(
                    f"auto or host with update.mode: {self.update.mode}",
                    key=f"placement.{name}",
                    value=getattr(self.placement, name),
                    remedy="Parameters and gradients stay in host memory in this mode; states may live on the SSD.",
                )
        if self.execution.moves == "serial":
            raise expected(
                "planned or demand, as serial steps wait for their updates",
                key="execution.moves",
                value="serial",
                remedy="Set update.mode: sync to compare with serial steps.",
            )

    def resolved_yaml(self) -> str:
        """Every key with its value, sizes as the shortest exact text; loading it gives an equal Config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON without run_dir and checkpoint: equal for runs that do the same work."""
        content = self.model_dump(mode="json", exclude={"run_dir", "checkpoint"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _io_from_hardware(io: Io, measured: Io) -> Io:
    """What the user set stays; the rest comes from the measurement. Measured keys still count as not set."""
    chosen = {name: getattr(io if name in io.model_fields_set else measured, name) for name in Io.model_fields}
    return Io.model_construct(_fields_set=set(io.model_fields_set), **chosen)
