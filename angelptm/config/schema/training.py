"""What is trained on what, for how long: model, data, training length and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from angelptm.config.schema.types import Section, UserPath, expected
from angelptm.config.suggest import did_you_mean
from angelptm.model.presets import PRESETS


class Model(Section):
    """A transformers model: a preset, a ``model_type`` with overrides, or a folder of weights with its config.json."""

    preset: str | None = Field(default=None, description="Name of a preset (angelptm/model/presets.py).")
    model_type: str | None = Field(default=None, description="A transformers model type, such as 'gpt2' or 'llama'.")
    config: dict[str, Any] = Field(
        default={}, description="Keys of the transformers config that differ from the defaults or from the preset."
    )
    weights: UserPath | None = Field(
        default=None,
        description="Folder of *.safetensors to start from; its config.json may name the model. null: random weights.",
    )

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise expected(f"one of {', '.join(PRESETS)}", remedy=did_you_mean(value, PRESETS))
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.preset and self.model_type:
            raise expected(
                "no model_type beside a preset", key="model_type", value=self.model_type, remedy="Keep one of the two."
            )
        if self.named:
            return self
        if self.weights is not None and not (self.weights / "config.json").is_file():
            raise expected(
                "a folder with a config.json",
                key="weights",
                value=str(self.weights),
                remedy="Or say what the weights belong to with model.preset or model.model_type.",
            )
        if self.config and self.weights is None:
            raise expected("a preset or model_type beside config", key="config", value=self.config)
        return self

    @property
    def named(self) -> bool:
        """Whether preset or model_type says which architecture it is."""
        return self.preset is not None or self.model_type is not None

    @property
    def given(self) -> bool:
        """Whether the config describes a model at all; ``initialize`` of the user's own module needs none."""
        return self.named or self.weights is not None

    def architecture(self) -> tuple[str, dict[str, Any]] | None:
        """(model_type, keyword arguments) for ``AutoConfig.for_model``; None when only ``weights`` names the model."""
        if self.preset is not None:
            preset: Mapping[str, Any] = PRESETS[self.preset]
            return str(preset["model_type"]), {**preset["config"], **self.config}
        return (self.model_type, dict(self.config)) if self.model_type is not None else None


class Data(Section):
    """The tokens to train on."""

    kind: Literal["text", "nanogpt", "megatron"] = Field(
        default="text", description="text: files or folders; nanogpt: a .bin of tokens; megatron: a .bin/.idx pair."
    )
    path: UserPath | None = Field(
        default=None,
        description="File or folder (text, nanogpt) or the .bin/.idx prefix (megatron). "
        "null: the source text of the Python standard library.",
    )
    tokenizer: str = Field(default="byte", description="'byte', or the path of a tokenizer.json (kind text).")
    extensions: list[str] = Field(
        default=[
            ".txt",
            ".md",
            ".rst",
            ".py",
            ".c",
            ".h",
            ".cpp",
            ".js",
            ".ts",
            ".rs",
            ".go",
            ".java",
            ".tex",
            ".html",
        ],
        min_length=1,
        description="Endings of the files to take from a folder (kind text).",
    )
    sequence_length: int = Field(default=256, ge=2, description="Tokens in one sample.")
    micro_batch_size: int = Field(default=8, ge=1, description="Samples in one forward and backward.")
    validation_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Share held out: by file for text, the tail for token files."
    )
    dtype: Literal["uint16", "uint32"] = Field(default="uint16", description="Token type of a .bin (kind nanogpt).")

    @model_validator(mode="after")
    def _path_given(self) -> Self:
        if self.path is None and self.kind != "text":
            raise expected(f"the path of the token file, as data.kind is {self.kind!r}", key="path")
        if self.tokenizer != "byte" and self.kind != "text":
            raise expected(
                f"no tokenizer, as data.kind {self.kind!r} holds tokens already", key="tokenizer", value=self.tokenizer
            )
        return self

    @field_validator("extensions")
    @classmethod
    def _dotted(cls, value: list[str]) -> list[str]:
        if any(not ending.startswith(".") or ending == "." for ending in value):
            raise expected("endings that begin with a dot, such as '.txt'")
        return value


class Training(Section):
    """How long to train and what to show meanwhile. ``initialize`` needs none of it, ``train`` needs steps."""

    steps: int = Field(default=0, ge=0, description="Optimizer steps. 0: not set.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of initialization, data order and dropout.")
    eval_every: int = Field(default=0, ge=0, description="Optimizer steps between evaluations. 0: first and last only.")
    eval_batches: int = Field(default=8, ge=1, description="Micro-batches in one evaluation.")
    log_every: int = Field(default=1, ge=1, description="Optimizer steps between log lines.")
    sample_tokens: int = Field(default=0, ge=0, description="Tokens of sample text to generate at the end.")
    sample_prompt: str | None = Field(
        default=None,
        min_length=1,
        description="Text that the sample starts with. null: the start of a held-out sample.",
    )
    threads: int | None = Field(default=None, ge=1, description="torch intra-op threads. null: torch's choice.")


class Schedule(Section):
    """The learning rate over the steps: linear warmup from 0, then the named shape."""

    type: Literal["constant", "linear", "cosine"] = Field(default="constant", description="Shape after the warmup.")
    warmup_steps: int = Field(default=0, ge=0, description="Optimizer steps of linear warmup.")
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Factor on lr that linear and cosine reach at the last step."
    )
