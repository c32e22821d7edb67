"""Best of n, and a search through a tree of texts, over forks of one session.

A fork goes on from where its session stands, its own way. Pages behind it are shared and counted once: what
a fork costs is what it writes. The same searches run over copies of a ``DynamicCache`` for comparison.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from saved import Saved
from transformers.cache_utils import DynamicCache

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.model.load import load_model
from kvhybrid.model.transformers_cache import PagedSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

PROMPT = """The council meets by torchlight, in the hall above the river. The doors are barred, and the
captain of the guard has counted everyone who came in. Nobody is to speak of what is said here tonight,
neither to his wife nor to his priest, until the ships have sailed and the bridges are down. The old queen
rises first, and all the others with her.

QUEEN MARGARET:
"""
ANSWERS, LENGTH, WIDTH, BLOCK = 8, 24, 4, 16


class Branch(NamedTuple):
    """A text, how likely the model finds it, and the cache that goes on from its end."""

    score: float
    tokens: list[int]
    cache: Any
    logits: torch.Tensor


def fork(cache: Any, n: int) -> list[Any]:
    """Return ``n`` caches that go on from here; all that transformers' own can do is copy itself."""
    return cache.fork(n) if isinstance(cache, PagedSession) else [copy.deepcopy(cache) for _ in range(n)]


@torch.no_grad()
def advance(model: PreTrainedModel, branch: Branch, token: int) -> Branch:
    """Go one token further."""
    score = branch.score + float(branch.logits.log_softmax(-1)[token])
    logits = model(torch.tensor([[token]]), cache=branch.cache).logits[0, -1]
    return Branch(score, [*branch.tokens, token], branch.cache, logits)


def best_of_n(model: PreTrainedModel, root: Branch) -> list[Branch]:
    """Write ``ANSWERS`` answers by chance, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    branches = [root._replace(cache=cache) for cache in fork(root.cache, ANSWERS)]
    for _ in range(LENGTH):
        drawn = [torch.multinomial(branch.logits.softmax(-1), 1, generator=generator) for branch in branches]
        branches = [advance(model, *pair) for pair in zip(branches, map(int, drawn), strict=True)]
    return sorted(branches, key=lambda branch: -branch.score)


def tree_search(model: PreTrainedModel, root: Branch) -> list[Branch]:
    """Keep the ``WIDTH`` likeliest texts of every length, and try each with its likeliest next tokens."""
    kept = [root._replace(cache=fork(root.cache, 1)[0])]
    for _ in range(LENGTH):
        tries = [
            (branch.score + float(chance), branch, int(token))
            for branch in kept
            for chance, token in zip(*branch.logits.log_softmax(-1).topk(WIDTH), strict=True)
        ]
        tries.sort(key=lambda found: -found[0])
        kept = [
            advance(model, branch._replace(cache=fork(branch.cache, 1)[0]), token)
            for _, branch, token in tries[:WIDTH]
        ]
    return kept


def search(model: PreTrainedModel, ids: torch.Tensor, cache: Any, held: Callable[[list[Branch]], int]) -> Any:
    """Search both ways from one prompt; return the texts found and the tokens' room that each took."""
    with torch.no_grad():
        root = Branch(0.0, [], cache, model(ids, cache=cache).logits[0, -1])
    found = []
    for way in (best_of_n, tree_search):
        branches = way(model, root)
        found.append(([branch.tokens for branch in branches], held([root, *branches])))
        del branches
    return found


def main() -> Saved:
    """Search over copies and over forks."""
    model, tokenizer = load_model()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    copies = search(
        model,
        ids,
        DynamicCache(config=model.config),
        lambda held: sum(b.cache.get_seq_length() for b in held),
    )
    with kvhybrid.attach(model, config=KVCacheConfig(max_tokens=8192, block_size=BLOCK)) as attachment:
        pool = attachment.cache.pool
        forks = search(
            model,
            ids,
            attachment.cache.session("council"),
            lambda _: BLOCK * (pool.num_pages - pool.num_free - pool.num_evictable),
        )
    for name, (texts, room), (_, by_copies) in zip(("best of n", "tree"), forks, copies, strict=True):
        print(f"{name}: {len(texts)} texts in the room of {room} tokens, {by_copies} in copies")
        print(f"  {tokenizer.decode(texts[0])!r}")
    equal = [texts for texts, _ in forks] == [texts for texts, _ in copies]
    saved = Saved(sum(room for _, room in copies), sum(room for _, room in forks), equal, what="tokens held")
    print(saved)
    return saved


if __name__ == "__main__":
    main()
