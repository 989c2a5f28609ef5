"""Known architectures by name: keyword arguments for transformers' ``AutoConfig.for_model``. Data only."""

from __future__ import annotations

from typing import Any


def _gpt2(layers: int, width: int, heads: int, **others: Any) -> dict[str, Any]:
    return {"model_type": "gpt2", "config": {"n_layer": layers, "n_embd": width, "n_head": heads, **others}}


def _gpt3(layers: int, width: int, heads: int) -> dict[str, Any]:
    """Sizes as in table 2.1 of "Language Models are Few-Shot Learners", heads dividing the width; GPT-2's block."""
    return _gpt2(layers, width, heads, n_positions=2048)


def _qwen2(layers: int, width: int, heads: int, kv_heads: int, inner: int, **others: Any) -> dict[str, Any]:
    return {**_llama(layers, width, heads, kv_heads, inner, **others), "model_type": "qwen2"}


def _t5(layers: int, width: int, heads: int, inner: int) -> dict[str, Any]:
    """Of version 1.1: gated GELU, no tied head, heads of 64. ``layers`` in the encoder, and as many in the decoder."""
    shape = {"num_layers": layers, "d_model": width, "num_heads": heads, "d_ff": inner, "d_kv": 64}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return {"model_type": "t5", "config": {**shape, **gated, **_STARTS}}


def _switch(layers: int, width: int, heads: int, inner: int, experts: int) -> dict[str, Any]:
    """A T5 in which every other block has experts, of which a token takes one (Switch Transformers, table 1)."""
    shape = {"num_layers": layers, "d_model": width, "num_heads": heads, "d_ff": inner, "d_kv": 64}
    sparse = {"num_sparse_encoder_layers": layers // 2, "num_sparse_decoder_layers": layers // 2}
    return {
        "model_type": "switch_transformers",
        "config": {**shape, **sparse, "num_decoder_layers": layers, "num_experts": experts, **_STARTS},
    }


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

_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 5e5}
_STARTS: dict[str, Any] = {"decoder_start_token_id": 0}

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
    "gpt3-30b": _gpt3(48, 7168, 56),  # no size of that table: as others have filled the gap
    "gpt3-175b": _gpt3(96, 12288, 96),
    "llama-demo": _llama(6, 384, 6, 6, 1024, max_position_embeddings=256, **_BYTES),
    "llama-7b": _llama(32, 4096, 32, 32, 11008, vocab_size=32000, max_position_embeddings=4096),
    "llama3-8b": _llama(32, 4096, 32, 8, 14336, **_LLAMA3),
    "llama3-70b": _llama(80, 8192, 64, 8, 28672, **_LLAMA3),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18944, vocab_size=152064, max_position_embeddings=32768, rope_theta=1e6),
    "qwen2.5-32b": _qwen2(64, 5120, 40, 8, 27648, vocab_size=152064, max_position_embeddings=32768, rope_theta=1e6),
    "t5-3b": _t5(24, 2048, 32, 5120),
    "t5-11b": _t5(24, 4096, 64, 10240),
    # 1.2 T parameters, nearly all of them in 2,048 experts of 12 blocks each way.
    "switch-1.2t": _switch(24, 2048, 32, 6144, 2048),
}
