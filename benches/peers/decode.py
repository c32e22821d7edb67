"""One decode step behind 64 to 8k tokens of context: ours against DynamicCache and a tight StaticCache.

A step is one ``model.forward`` with the cache as ``past_key_values``, the same call for all three. The
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM

CONTEXTS = {"64": 64, "512": 512, "2k": 2048, "8k": 8192}


def stepper(model: LlamaForCausalLM, cache: object) -> Callable[[], object]:
    """Return a call that decodes one more token behind what ``cache`` holds."""
    token = torch.zeros((1, 1), dtype=torch.long)

    @torch.inference_mode()
    def step() -> object:
        output = model(token, past_key_values=cache, use_cache=True)
        return output.logits

    return step


def measure(name: str, context: int, steps: int) -> dict[str, float]:
    """Return the median seconds of a step for each cache."""
    dtype = DTYPES[name]
    plain, model = (make_model(dtype, positions=context + steps + 64) for _ in range(2))
    config = plain.config
    generator = torch.Generator().manual_seed(3)
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    dynamic = DynamicCache(config=config)
    static = StaticCache(config=config, max_cache_len=context + steps + 4)
    attachment = kvhybrid.attach(
        model, config=KVCacheConfig(max_tokens=context + steps + 128, _env_file=None)
    )
    session = attachment.cache.session("bench")
    ids = torch.randint(0, VOCAB, (1, context), generator=generator)
    session.rows.begin(ids, None)
    with torch.inference_mode():
        for layer in range(config.num_hidden_layers):
            key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
            for cache in (dynamic, static, session):
                cache.update(key, value, layer)
    session.rows.finish(success=True)
    calls = {
        "ours": stepper(model, session),
        "dynamic": stepper(plain, dynamic),
        "static": stepper(plain, static),
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
