"""One decode step behind 64 to 8k tokens of context: ours against DynamicCache and a tight StaticCache.

A step is one ``model.forward`` over a cache, the same call for all three. The
context is random K and V written straight into each cache: prefilling it would take longer than the
bench and change nothing. StaticCache is sized to the context and the steps exactly; it can neither share
nor grow. What grows with the context is the step at 8k less the step at 64. Attention alone: ``layer.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from bench_model import DTYPES, VOCAB, dtypes_here, interleaved, make_model
from layer import figures as layer_figures
from report import arguments, write_report
from transformers.cache_utils import DynamicCache, StaticCache

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM

    from kvhybrid.model.transformers_cache import PagedSession

# Contexts from here on are also decoded over pages of 8 and 4 bits.
QUANTIZED = 8192
# Tokens that are put into a session at once.
PART = 256
CONTEXTS = {"64": 64, "512": 512, "2k": 2048, "8k": 8192}


def stepper(model: LlamaForCausalLM, cache: object) -> Callable[[], object]:
    """Return a call that decodes one more token behind what ``cache`` holds."""
    token = torch.zeros((1, 1), dtype=torch.long)

    @torch.inference_mode()
    def step() -> object:
        output = model(token, **over(cache), use_cache=True)
        return output.logits

    return step


def open_session(
    model: LlamaForCausalLM, max_tokens: int, bits: int = 16
) -> tuple[PagedSession, LlamaForCausalLM]:
    """Attach the model and return a session over it, and the model; of fewer bits with quantized pages."""
    config = KVCacheConfig(
        max_tokens=max_tokens, use_quantization=bits < 16, quantization_bits=bits, _env_file=None
    )
    return kvhybrid.attach(model, config=config).cache.session("bench"), model


def fill(session: PagedSession, ids: torch.Tensor, known: list[list[torch.Tensor]]) -> None:
    """Have the session hold these K and V, a part at a time: cold pages are quantized when there is need."""
    for start in range(0, ids.shape[1], PART):
        part = slice(start, start + PART)
        session.rows.begin(ids[:, part], None)
        with torch.inference_mode():
            for layer, (key, value) in enumerate(known):
                session.update(key[:, :, part], value[:, :, part], layer)
        session.rows.finish(success=True)


def measure(name: str, context: int, steps: int) -> dict[str, float]:
    """Return the median seconds of a step for each cache."""
    dtype = DTYPES[name]
    # A model a way: two ways that share weights would warm them for one another.
    model, plain, tight = (make_model(dtype, positions=context + steps + 64) for _ in range(3))
    config = plain.config
    generator = torch.Generator().manual_seed(3)
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    dynamic = DynamicCache(config=config)
    static = StaticCache(config=config, max_cache_len=context + steps + 4)
    sessions = {"ours": open_session(model, context + steps + 128)}
    if context >= QUANTIZED:
        # Three quarters of what is held lies in records; the newest pages are as they were.
        sessions |= {
            f"int{bits}": open_session(make_model(dtype, positions=context + steps + 64), context + 512, bits)
            for bits in (8, 4)
        }
    ids = torch.randint(0, VOCAB, (1, context), generator=generator)
    known = [
        [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
        for _ in range(config.num_hidden_layers)
    ]
    with torch.inference_mode():
        for layer, (key, value) in enumerate(known):
            for cache in (dynamic, static):
                cache.update(key, value, layer)
    for session, _ in sessions.values():
        fill(session, ids, known)
    calls = {
        **{way: stepper(held_by, session) for way, (session, held_by) in sessions.items()},
        "dynamic": stepper(plain, dynamic),
        "static": stepper(tight, static),
    }
    first = {way: np.asarray(call().float()) for way, call in calls.items()}
    if name == "f32":
        for way in ("dynamic", "static"):
            if not np.allclose(first["ours"], first[way], atol=1e-3, rtol=1e-3):
                raise SystemExit(
                    f"logits differ from {way}'s by {np.abs(first['ours'] - first[way]).max():.2g}"
                )
    interleaved(calls, 2)
    return interleaved(calls, steps - 3)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    options = parser.parse_args()
    contexts = {"64": 64, "512": 512, "8k": 8192} if options.quick else CONTEXTS
    steps = 15 if options.quick else 40
    figures: dict[str, float] = {}
    for name in dtypes_here():
        for label, context in contexts.items():
            seconds = measure(name, context, steps)
            for way in ("dynamic", "static"):
                figures[f"{name}_{label}_vs_{way}"] = seconds["ours"] / seconds[way]
            for way in seconds.keys() & {"int8", "int4"}:
                figures[f"{name}_{way}_{label}_vs_full"] = seconds[way] / seconds["ours"]
                if name == "bf16":
                    figures[f"{way}_{label}_vs_bf16"] = seconds[way] / seconds["ours"]
            figures |= {f"{name}_{label}_{way}_ms": value * 1e3 for way, value in seconds.items()}
        for way in ("dynamic", "static"):
            grown = {
                of: figures[f"{name}_8k_{of}_ms"] - figures[f"{name}_64_{of}_ms"] for of in ("ours", way)
            }
            figures[f"{name}_context_vs_{way}"] = grown["ours"] / grown[way]
    figures |= layer_figures(dtypes_here(), quick=options.quick)
    write_report("decode", figures, options.json)


if __name__ == "__main__":
    main()
