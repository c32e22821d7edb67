"""Whatever order texts, tenants, crops, forks and failures come in, no state ever serves another text.

Small pools and few states: pages and states leave all the time. Every answer is compared with the model's
own, computed without a cache.
"""

from __future__ import annotations

from functools import cache as memoised
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import prompt
from hybrids import make_hybrid
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import cache_utils

from kvhybrid import CapacityError, KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model import session_states
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

if not hasattr(cache_utils, "LinearAttentionCacheLayerMixin"):
    pytest.skip("this transformers has no states that can be taken out", allow_module_level=True)

BLOCK = 4
PAGES = 12
NEW = 4
TENANTS = ("", "another")
# Texts are made of these runs, so that they share openings of all lengths and part inside of blocks.
RUNS = [prompt(length, seed=length) for length in (3, 4, 8)]

texts = st.lists(st.integers(0, len(RUNS) - 1), min_size=1, max_size=4).map(tuple)
calls = st.one_of(
    st.tuples(st.just("generate"), texts, st.integers(0, 1)),
    st.tuples(st.just("continue"), texts, st.integers(0, 1)),
    st.tuples(st.just("batch"), st.lists(texts, min_size=2, max_size=2).map(tuple), st.just(0)),
    st.tuples(st.just("fork"), texts, st.integers(0, 1)),
    st.tuples(st.just("crop"), st.integers(0, 12), st.integers(0, 1)),
    st.tuples(st.just("fail"), st.sampled_from([(0,), (1,), (2, 0)]), st.integers(0, 1)),
    st.tuples(st.just("clear"), st.just(()), st.just(0)),
)


@memoised
def model_of(family: str) -> PreTrainedModel:
    model = make_hybrid(family)
    model.failing = False  # type: ignore[assignment]
    head = model.get_output_embeddings()
    forward = head.forward

    def may_fail(hidden: torch.Tensor) -> torch.Tensor:
        """Fail at the pass's end, when every layer's state has gone on."""
        if model.failing:
            raise InterruptedError
        return forward(hidden)

    # For good: with a hook that comes and goes the model would be another one, and so would its pages.
    head.forward = may_fail
    return model


def ids_of(text: Sequence[int]) -> torch.Tensor:
    return torch.cat([RUNS[run] for run in text], dim=1)


@memoised
def own_text(family: str, ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model writes without a cache: ``NEW`` tokens, and the logits behind each token before."""
    model, known = model_of(family), torch.tensor([ids])
    with torch.no_grad():
        for _ in range(NEW):
            logits = type(model).forward(model, input_ids=known, use_cache=False).logits
            known = torch.cat([known, logits[:, -1:].argmax(-1)], dim=1)
    return known[0, -NEW:], logits[0, -NEW:]


class Walk:
    """A cache under random calls: one session a tenant, and prompts without one."""

    def __init__(self, family: str, num_states: int) -> None:
        self.family = family
        self.model = model_of(family)
        layout = KVCache.for_model(self.model, KVCacheConfig(max_tokens=BLOCK, block_size=BLOCK)).layout
        config = KVCacheConfig(
            max_tokens=PAGES * BLOCK,
            block_size=BLOCK,
            state_memory_mb=num_states * layout.state_bytes / 2**20,
        )
        self.cache = KVCache(config, layout=layout)
        self.texts: dict[int, torch.Tensor] = {}

    def session(self, tenant: int) -> Any:
        return self.cache.session("talk", tenant=TENANTS[tenant])

    def write(self, ids: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Generate behind ``ids``, check every row and return the sequences."""
        found = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
        logits = torch.stack(found.logits, dim=1)
        for row, (text, seen) in enumerate(zip(ids, mask.bool(), strict=True)):
            tokens, expected = own_text(self.family, tuple(text[seen].tolist()))
            # Tokens alone hide small differences, and a convolution's state makes small ones.
            assert torch.allclose(logits[row], expected, atol=2e-3 * float(expected.std()))
            assert torch.equal(found.sequences[row, -NEW:], tokens)
        sequences: torch.Tensor = found.sequences
        return sequences

    def logits(self, ids: torch.Tensor, session: Any, text: torch.Tensor) -> None:
        """Feed ``ids`` behind the session's ``text`` and compare the logits."""
        with torch.no_grad():
            found = self.model(input_ids=ids, **over(session), use_cache=True).logits
            whole = torch.cat([text, ids], dim=1)
            expected = type(self.model).forward(self.model, input_ids=whole, use_cache=False).logits
        expected = expected[:, text.shape[1] :]
        assert torch.allclose(found, expected, atol=2e-3 * float(expected.std()))

    def generate(self, text: tuple[int, ...], tenant: int) -> None:
        ids = ids_of(text)
        found = self.write(ids, torch.ones_like(ids), **over(self.session(tenant)))
        self.texts[tenant] = found[:, :-1]

    def batch(self, pair: tuple[tuple[int, ...], ...], _: int) -> None:
        rows = [ids_of(text) for text in pair]
        width = max(row.shape[1] for row in rows)
        ids, mask = torch.zeros((2, width), dtype=torch.long), torch.zeros((2, width), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, -row.shape[1] :], mask[index, -row.shape[1] :] = row, 1
        for row in rows:  # so that the batch finds states
            self.write(row, torch.ones_like(row))
        self.write(ids, mask)

    def go_on(self, text: tuple[int, ...], tenant: int) -> None:
        if tenant in self.texts:
            ids = ids_of(text)
            self.logits(ids, self.session(tenant), self.texts[tenant])
            self.texts[tenant] = torch.cat([self.texts[tenant], ids], dim=1)

    def fork(self, text: tuple[int, ...], tenant: int) -> None:
        if tenant in self.texts:
            (fork,) = self.session(tenant).fork()
            try:
                self.logits(ids_of(text), fork, self.texts[tenant])
            finally:
                fork.close()

    def crop(self, tokens: int, tenant: int) -> None:
        if tenant in self.texts:
            text = self.texts[tenant]
            keep = max(text.shape[1] - tokens, 1)
            self.session(tenant).crop(keep - text.shape[1])
            self.texts[tenant] = text[:, :keep]

    def fail(self, text: tuple[int, ...], tenant: int) -> None:
        """Go on, fail, and go on as if that had not been."""
        self.go_on(text, tenant)
        self.model.failing = True  # type: ignore[assignment]
        try:
            with torch.no_grad(), pytest.raises(InterruptedError):
                if tenant not in self.texts:
                    self.generate(text, tenant)
                self.model(input_ids=ids_of(text), **over(self.session(tenant)), use_cache=True)
        finally:
            self.model.failing = False  # type: ignore[assignment]
        self.go_on(text, tenant)

    def clear(self, *_: object) -> None:
        self.cache.clear()

    def run(self, call: str, argument: Any, tenant: int) -> None:
        try:
            {"continue": self.go_on}.get(call, getattr(self, call, self.clear))(argument, tenant)
        except CapacityError:
            # A text that had no room: whatever the session stands at, it says so, and that must be true.
            if call in ("generate", "fail"):
                self.session(tenant).reset()
                self.texts.pop(tenant, None)


@pytest.mark.parametrize("family", ["lfm2", "qwen3-next"])
@given(st.sampled_from([2, PAGES]), st.lists(calls, min_size=4, max_size=10))
@settings(max_examples=25, phases=[Phase.reuse, Phase.generate])
def test_no_state_ever_serves_another_text(
    family: str, num_states: int, steps: list[tuple[str, Any, int]]
) -> None:
    walk = Walk(family, num_states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_states, "STRIDE", 2 * BLOCK)
        with Attachment(walk.model, walk.cache, Route.PAGED, "test").install():
            walk.run("generate", steps[0][1] if steps[0][0] == "generate" else (2, 1), 0)
            for call, argument, tenant in steps:
                walk.run(call, argument, tenant)
                walk.cache.pool.check()
                stats = walk.cache.get_stats()
                assert stats["state_bytes"] <= stats["state_capacity_bytes"]
    assert walk.cache.pool.num_free + walk.cache.pool.num_evictable == PAGES


def test_pages_that_change_hands_lose_their_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page has a state, and every text takes pages of another one."""
    monkeypatch.setattr(session_states, "STRIDE", BLOCK)
    walk = Walk("qwen3-next", PAGES)
    with Attachment(walk.model, walk.cache, Route.PAGED, "test").install():
        for text in ((2, 2, 2), (1, 2, 1, 2), (0, 2, 2, 2)) * 2:
            for _ in range(2):
                walk.run("generate", text, 0)
        stats = walk.cache.get_stats()
    assert stats["restored_states"] >= 6
    assert stats["evicted_states"] == 0
    assert stats["evicted_pages"] > PAGES


def test_the_walk_reuses_evicts_and_fails_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would pass if nothing were ever kept."""
    monkeypatch.setattr(session_states, "STRIDE", 2 * BLOCK)
    walk = Walk("lfm2", 2)
    with Attachment(walk.model, walk.cache, Route.PAGED, "test").install():
        for text in ((2, 2), (2, 2, 0), (1, 2, 2), (2, 2, 1), (0, 1, 2), (2, 2)):
            walk.run("generate", text, 0)
            walk.run("continue", (0,), 0)
        walk.run("fail", (1,), 0)
        stats = walk.cache.get_stats()
    assert stats["restored_states"] > 0
    assert stats["evicted_states"] > 0
    assert stats["evicted_pages"] > 0
