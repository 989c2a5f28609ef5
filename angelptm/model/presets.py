"""Known architectures by name: keyword arguments for transformers' ``AutoConfig.for_model``. Data only."""

from __future__ import annotations

from typing import Any


def _gpt2(layers: int, width: int, heads: int, **others: Any) -> dict[str, Any]:
    return {"model_type": "gpt2", "config": {"n_layer": layers, "n_embd": width, "n_head": heads, **others}}


def _gpt3(layers: int, width: int, heads: int) -> dict[str, Any]:
    """Sizes as in table 2.1 of "Language Models are Few-Shot Learners", heads dividing the width; GPT-2's block."""
    return _gpt2(layers, width, heads, n_positions=2048)


def _llama(layers: int, width: int, heads: int, kv_heads: int, inner: int, **others: Any) -> dict[str, Any]:
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
    }
    return {"model_type": "llama", "config": {**shape, **others}}


_BYTES: dict[str, Any] = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
"""Byte tokens: 256 of them; token 0 occurs in no text and separates documents."""

PRESETS: dict[str, dict[str, Any]] = {
    # 10.8 M parameters in 6 blocks of 1.77 M. No dropout: a short run sees no text twice.
    "gpt2-demo": _gpt2(6, 384, 6, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_BYTES),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "llama-demo": _llama(6, 384, 6, 6, 1024, max_position_embeddings=256, **_BYTES),
    "llama-7b": _llama(32, 4096, 32, 32, 11008, vocab_size=32000, max_position_embeddings=4096),
}
