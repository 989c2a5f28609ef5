"""Tiny models of every family that the tests train, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 96


def loss_of(output: Any) -> torch.Tensor:
    loss: torch.Tensor = output["loss"] if isinstance(output, dict) else output.loss
    return loss


def gpt2_config(**others: Any) -> GPT2Config:
    keys = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 24, "bos_token_id": 0, "eos_token_id": 0}
    dropout = others.pop("dropout", 0.0)
    keys |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout, "vocab_size": VOCABULARY}
    return GPT2Config(**(keys | others))


def gpt2(**others: Any) -> nn.Module:
    return GPT2LMHeadModel(gpt2_config(**others))


def llama_config(**others: Any) -> LlamaConfig:
    keys = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LlamaConfig(**(keys | others))


def llama(**others: Any) -> nn.Module:
    return LlamaForCausalLM(llama_config(**others))


def t5_config(**others: Any) -> T5Config:
    keys = {
        "num_layers": 2,
        "d_model": 64,
        "d_ff": 128,
        "d_kv": 32,
        "num_heads": 2,
        "vocab_size": VOCABULARY,
        "dropout_rate": others.pop("dropout", 0.0),
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return T5Config(**(keys | others))


def t5(**others: Any) -> nn.Module:
    return T5ForConditionalGeneration(t5_config(**others))


class Block(nn.Module):
    """A residual block with a scalar parameter, an fp32 buffer, and a Conv1d whose weight is three-dimensional."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width, bias=False)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.outer(torch.nn.functional.gelu(self.inner(self.norm(x) + self.shift.to(x.dtype))))
        return x + self.gain * hidden + self.mix(x.transpose(1, 2)).transpose(1, 2)


class Plain(nn.Module):
    """An nn.Module of no library: blocks in a ModuleList, a tied head, parameters of the root itself."""

    def __init__(self, width: int = 64, depth: int = 2, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(24, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.tokens(input_ids) + self.position[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}


@dataclass(frozen=True)
class Family:
    """A model and its batches. ``build`` takes keys of the architecture."""

    name: str
    build: Callable[..., nn.Module]

    def model(self, **keys: Any) -> nn.Module:
        torch.manual_seed(7)
        model = self.build(**keys)
        return model.train()

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 + index)
        ids = torch.randint(2, VOCABULARY, (2, 12), generator=generator)
        return {"input_ids": ids, "labels": ids}


GPT2 = Family("gpt2", gpt2)
LLAMA = Family("llama", llama)
T5 = Family("t5", t5)
PLAIN = Family("plain", Plain)
FAMILIES = [GPT2, LLAMA, T5, PLAIN]
