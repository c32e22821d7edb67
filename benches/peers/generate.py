"""What ``attach`` costs where nothing can be reused, and what it saves where something can.

Plain ``model.generate`` on two equal models, one attached and one never touched, in turns: a prompt that
nobody has sent before, its whole answer timed; and a new question behind 2,048 shared tokens, timed to the
first token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from bench_model import DTYPES, dtypes_here, interleaved, make_model, random_ids
from report import arguments, write_report

import kvhybrid
from kvhybrid import KVCacheConfig

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ANSWER = 64
QUESTION = 32
SHARED = 2048


def generate(model: LlamaForCausalLM, ids: torch.Tensor, count: int) -> list[int]:
    """Generate ``count`` tokens greedily and return them."""
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)[
        0, -count:
    ].tolist()


class Pair:
    """The two models, and prompts that neither has seen."""

    def __init__(self, name: str, tokens: int) -> None:
        self.plain, self.attached = (make_model(DTYPES[name], positions=4096) for _ in range(2))
        self.exact = name == "f32"
        self.attachment = kvhybrid.attach(
            self.attached, config=KVCacheConfig(max_tokens=tokens, _env_file=None)
        )
        self.seed = 0

    def ratio(
        self, rounds: int, length: int, count: int, prefix: torch.Tensor | None = None
    ) -> dict[str, float]:
        """Return each one's median seconds for ``count`` tokens behind new prompts of ``length`` tokens."""
        texts: dict[str, list[list[int]]] = {"ours": [], "plain": []}

        def prompt() -> torch.Tensor:
            new = random_ids(length, 1000 + self.seed)
            return new if prefix is None else torch.cat([prefix, new], dim=1)

        def plain() -> None:
            texts["plain"].append(generate(self.plain, prompt(), count))

        def ours() -> None:
            texts["ours"].append(generate(self.attached, prompt(), count))
            self.seed += 1

        plain(), ours()  # warm-up
        seconds = interleaved({"plain": plain, "ours": ours}, rounds)
        if self.exact and texts["ours"] != texts["plain"]:
            raise SystemExit(f"texts differ: {texts}")
        return seconds


def measure(name: str, *, quick: bool) -> dict[str, float]:
    """Return the figures of one dtype."""
    figures = {}
    pair = Pair(name, tokens=64 * 1024)
    for label, length, rounds in (("128", 128, 15), ("2k", 2048, 7)):
        seconds = pair.ratio(3 if quick else rounds, length, ANSWER)
        figures[f"overhead_{label}"] = seconds["ours"] / seconds["plain"]
        figures[f"total_{label}_ours_ms"] = seconds["ours"] * 1e3
        figures[f"total_{label}_plain_ms"] = seconds["plain"] * 1e3
    prefix = random_ids(SHARED, 1)
    generate(pair.attached, prefix, 1)  # somebody else's request, which leaves the prefix behind
    seconds = pair.ratio(3 if quick else 9, QUESTION, 1, prefix)
    figures["shared_2k_speedup"] = seconds["plain"] / seconds["ours"]
    figures["shared_2k_ours_ms"] = seconds["ours"] * 1e3
    figures["shared_2k_plain_ms"] = seconds["plain"] * 1e3
    return figures if name == "f32" else {f"{name}_{key}": value for key, value in figures.items()}


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    figures: dict[str, float] = {}
    for name in dtypes_here():
        figures |= measure(name, quick=options.quick)
    write_report("generate", figures, options.json)


if __name__ == "__main__":
    main()
