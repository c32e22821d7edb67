"""Time to first token behind a long shared prefix: automatic reuse against a cache kept by hand, and none.

The peer is the best that transformers offers: a ``DynamicCache`` that holds exactly the prefix, used in
place through ``generate`` and cropped back afterwards (it can serve one text at a time). Ours is plain
``generate`` on an attached model, with nobody telling it what is cached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from bench_model import DTYPES, dtypes_here, interleaved, make_model, random_ids
from report import arguments, write_report
from transformers.cache_utils import DynamicCache

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NEW = 64


def first_token(model: LlamaForCausalLM, ids: torch.Tensor, **kwargs: object) -> int:
    """Generate one token and return it."""
    mask = torch.ones_like(ids)
    return int(model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, **kwargs)[0, -1])


def measure(name: str, shared: int, rounds: int) -> dict[str, float]:
    """Return the figures of one dtype. The peer runs on a model of its own that we never touched."""
    plain, model = (make_model(DTYPES[name], positions=shared + NEW + 64) for _ in range(2))
    prefix = random_ids(shared, 1)
    kept = DynamicCache(config=plain.config)
    with torch.inference_mode():
        plain(prefix, **over(kept))
    config = KVCacheConfig(max_tokens=shared + (rounds + 4) * 2 * NEW, _env_file=None)
    kvhybrid.attach(model, config=config)
    first_token(model, prefix)  # somebody else's request, which leaves the prefix behind

    # Every round is a new text behind the prefix: only the prefix may be reused.
    texts = iter([torch.cat([prefix, random_ids(NEW, 2 + turn)], dim=1) for turn in range(rounds + 1)])
    tokens: dict[str, list[int]] = {"ours": [], "in_place": []}
    text = prefix

    def ours() -> None:
        nonlocal text
        text = next(texts)
        tokens["ours"].append(first_token(model, text))

    def in_place() -> None:
        tokens["in_place"].append(first_token(plain, text, **over(kept)))
        kept.crop(-NEW)

    ours(), in_place()  # warm-up
    seconds = interleaved({"ours": ours, "in_place": in_place}, rounds)
    seconds |= interleaved({"none": lambda: first_token(plain, text)}, 1)
    if name == "f32" and tokens["ours"] != tokens["in_place"]:
        raise SystemExit(f"first tokens differ: {tokens}")
    return {
        f"{name}_vs_in_place": seconds["ours"] / seconds["in_place"],
        f"{name}_vs_none": seconds["none"] / seconds["ours"],
        **{f"{name}_{way}_ms": value * 1e3 for way, value in seconds.items()},
    }


def reproducible(name: str, tokens: int, rounds: int) -> dict[str, float]:
    """Return what ``reproducible=True`` costs a prefill of ``tokens`` that nobody has computed before."""
    ways = {}
    for way in (False, True):
        model = make_model(DTYPES[name], positions=tokens + 64)
        budget = (rounds + 2) * (tokens + 128)
        kvhybrid.attach(model, config=KVCacheConfig(max_tokens=budget, reproducible=way, _env_file=None))
        texts = iter([random_ids(tokens, 100 + turn) for turn in range(rounds + 1)])
        ways[way] = lambda model=model, texts=texts: first_token(model, next(texts))
        ways[way]()  # warm-up
    seconds = interleaved({"usual": ways[False], "grid": ways[True]}, rounds)
    figure = "reproducible_prefill_ratio" if name == "f32" else f"{name}_reproducible_prefill_ratio"
    return {figure: seconds["grid"] / seconds["usual"], "reproducible_tokens": tokens}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    options = parser.parse_args()
    shared, rounds = (2048, 5) if options.quick else (8192, 9)
    figures: dict[str, float] = {"shared_tokens": shared, "new_tokens": NEW}
    for name in dtypes_here():
        figures |= measure(name, shared, rounds)
        figures |= reproducible(name, shared // 2, 3 if options.quick else 5)
    write_report("ttft", figures, options.json)


if __name__ == "__main__":
    main()
