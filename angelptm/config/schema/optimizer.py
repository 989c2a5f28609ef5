"""The update rule and its parameter groups."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from angelptm.config.schema.types import Section, expected

Beta = Annotated[float, Field(ge=0, lt=1)]

# Where a rule's usual default differs from AdamW's, which is what the fields declare.
_DEFAULTS_BY_TYPE: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"weight_decay": 0.0},
    "lion": {"betas": (0.9, 0.99), "weight_decay": 0.0},
}


class States(Section):
    """In how many bytes the optimizer's states are kept. What is read and written in each step is in proportion."""

    master: Literal["fp32", "split"] | None = Field(
        default=None,
        description="fp32, or split: the bf16 parameter and 16 bits, which is the same fp32 number in no byte more "
        "than it has. null: split where precision is bf16, else fp32.",
    )
    exp_avg: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32", description="First moment (momentum): 4, 2 or 1 bytes; fewer than 4 round at random."
    )
    exp_avg_sq: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32", description="Second moment (adamw): 4, 2 or 1 bytes; fewer than 4 round at random."
    )
    int8_from_elements: int = Field(
        default=4096, ge=0, description="Smaller parameters, and those of one dimension, stay fp32 instead of int8."
    )


class ParamGroup(Section):
    """Parameters that differ from the top-level values. The first group with a matching pattern wins."""

    params: list[str] = Field(
        min_length=1, description="fnmatch patterns on parameter names, for example '*.bias' or 'transformer.wte.*'."
    )
    lr: float | None = Field(default=None, ge=0, description="Learning rate of the group. null: optimizer.lr.")
    weight_decay: float | None = Field(
        default=None, ge=0, description="Weight decay of the group. null: optimizer.weight_decay."
    )
    states: States | None = Field(default=None, description="Formats of the group's states. null: optimizer.states.")


class Optimizer(Section):
    """The update rule, and the formats of its states."""

    type: Literal["adamw", "sgd", "lion"] = Field(default="adamw", description="Update rule; case does not matter.")
    lr: float = Field(default=1e-3, ge=0, description="Learning rate before the schedule's factor.")
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="Decay of the running averages (adamw, lion; lion's default is 0.9, 0.99)."
    )
    eps: float = Field(default=1e-8, ge=0, description="Added to the denominator (adamw).")
    weight_decay: float = Field(
        default=0.01, ge=0, description="Decoupled for adamw and lion, L2 for sgd; sgd and lion default to 0."
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Momentum (sgd).")
    dampening: float = Field(default=0.0, ge=0, le=1, description="Dampening of the momentum (sgd).")
    nesterov: bool = Field(default=False, description="Nesterov momentum (sgd).")
    states: States = Field(default=States(), description="Formats of the states.")
    groups: list[ParamGroup] = Field(default=[], description="Parameters with their own lr, weight_decay or states.")

    @field_validator("type", mode="before")
    @classmethod
    def _normalize_type(cls, value: Any) -> Any:
        name = value.lower() if isinstance(value, str) else value
        if name == "adam":
            raise expected(
                "'adamw', 'sgd' or 'lion'",
                remedy="Adam with L2 regularization is not offered; adamw with weight_decay: 0 is plain Adam.",
            )
        return name

    @model_validator(mode="after")
    def _defaults_of_type(self) -> Self:
        for name, value in _DEFAULTS_BY_TYPE[self.type].items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, value)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise expected(
                "a momentum above 0 and dampening 0 beside nesterov: true",
                key="momentum" if self.momentum == 0 else "dampening",
                value=self.momentum if self.momentum == 0 else self.dampening,
            )
        return self
