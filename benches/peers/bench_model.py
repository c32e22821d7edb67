"""The model that the benches of whole forward passes share, and how they take a time.

A random Llama of 33.6 M parameters: 8 layers, hidden 512, 8 query and 4 KV heads of 64, SwiGLU 1,536,
vocabulary 8,192, embeddings untied. 16 KiB of K and V a token in float32, so that at 8k of context the
cache is as large as the weights.
"""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvhybrid.report import interleaved

__all__ = ["DTYPES", "VOCAB", "dtypes_here", "interleaved", "make_model", "native_bfloat16", "random_ids"]

VOCAB = 8192
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# A float32 matmul of this size takes a millisecond or two; emulated bfloat16 takes hundreds of times that.
SLOW_MATMUL_RATIO = 20


def make_model(dtype: torch.dtype, *, positions: int) -> LlamaForCausalLM:
    """Return the bench model with room for ``positions`` tokens, always the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_ids(count: int, seed: int) -> torch.Tensor:
    """Return ``[1, count]`` token ids."""
    return torch.randint(0, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


def native_bfloat16() -> bool:
    """Time one small matmul in both dtypes: False where the CPU emulates bfloat16."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(256, 512).to(dtype)
        b = torch.randn(512, 512).to(dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(3):
            a @ b
        times[dtype] = time.perf_counter() - start
    return times[torch.bfloat16] < SLOW_MATMUL_RATIO * times[torch.float32]


def dtypes_here() -> list[str]:
    """Return the dtypes worth timing on this CPU; says which one is left out and why on stderr."""
    if native_bfloat16():
        return ["f32", "bf16"]
    import sys

    print("bfloat16 skipped: this CPU emulates its matmuls", file=sys.stderr)
    return ["f32"]
