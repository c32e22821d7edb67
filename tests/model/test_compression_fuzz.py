"""Random lives of compressed sessions, beside transformers' own cache with the same tokens gone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from families import make_model, prompt
from gapped import Gapped

from kvhybrid import KVCacheConfig
from kvhybrid.cache.compress.selection import RECENT, gather, kept_tokens
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

SCORERS = ("streaming", "keydiff", "lagkv", "knorm")
STEPS = 14


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-3)


class Life:
    """A session and what it must be: its ids, and a cache beside it."""

    def __init__(self, attachment: Attachment, seed: int) -> None:
        self.attachment = attachment
        self.twin = make_model("llama")
        self.dice = random.Random(seed)
        self.session = attachment.cache.session("life")
        self.forks: list[Any] = []
        self.ids = torch.empty((1, 0), dtype=torch.long)
        self.front = 0
        self.past = Gapped(config=self.twin.config)
        self.seed = seed

    def fresh(self, count: int) -> torch.Tensor:
        self.seed += 1
        return prompt(count, seed=self.seed)

    @torch.no_grad()
    def feed(self) -> None:
        new = self.fresh(self.dice.choice([1, 1, 2, 9, 40]))
        found = self.attachment.model(new, **over(self.session), use_cache=True).logits
        expected = self.twin(new, **over(self.past), use_cache=True).logits
        close(found, expected)
        self.ids = torch.cat([self.ids, new], dim=1)

    def generate(self) -> None:
        ids = torch.cat([self.ids, self.fresh(self.dice.randint(1, 20))], dim=1)
        options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
        found = self.attachment.model.generate(ids, **over(self.session), **options)
        assert torch.equal(found, self.twin.generate(ids, **over(self.past), **options))
        self.ids = found[:, :-1]

    def compress(self) -> None:
        stored = self.ids.shape[1] - self.past.gap
        kept = self.dice.choice([0.1, 0.4, 0.7, 1.0])
        left = min(kept_tokens(self.ids.shape[1], kept), stored)
        assert self.session.compress(kept, scorer=self.dice.choice(SCORERS)) == stored - left
        if left == stored:
            return
        self.front = max(self.ids.shape[1] - RECENT, self.front)
        self.past.gap = self.ids.shape[1] - left
        for layer, its in zip(self.past.layers, self.session.layers, strict=True):
            # Which tokens is its own choice, but they are of the text and in its order.
            places = torch.cdist(its.keys, layer.keys).argmin(dim=-1)
            assert (places[..., 1:] > places[..., :-1]).all()
            close(its.keys, gather(layer.keys, places))
            close(its.values, gather(layer.values, places))
            layer.keys, layer.values = its.keys, its.values

    def truncate(self) -> None:
        total = self.ids.shape[1]
        columns = max(total - self.dice.choice([1, 5, RECENT, RECENT + 1, 60]), 1)
        self.session.truncate(columns)
        self.ids = self.ids[:, :columns]
        if self.past.gap and columns < self.front:
            self.whole()
        elif columns < total:  # to transformers 4 a crop by 0 is a crop to 0
            self.past.crop(columns - total)

    def evict(self) -> None:
        if self.attachment.cache.compressed.make_room() and self.session.rows.gap == 0:
            self.whole()
            self.feed()  # its pages are gone: there is nothing to compress before it has run

    def fork(self) -> None:
        self.forks.append(self.session)
        (self.session,) = self.session.fork()

    @torch.no_grad()
    def whole(self) -> None:
        """The text will be computed again."""
        self.front, self.past = 0, Gapped(config=self.twin.config)
        self.twin(self.ids, **over(self.past), use_cache=True)

    def step(self) -> None:
        acts = [self.feed, self.feed, self.generate, self.compress, self.compress, self.truncate]
        self.dice.choice([*acts, self.evict, self.fork])()
        assert self.session.get_seq_length() == self.past.get_seq_length() == self.ids.shape[1]
        assert self.session.rows.text().texts[0].tolist() == self.ids[0].tolist()
        self.attachment.cache.pool.check()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("route", list(Route))
def test_a_compressed_session_lives_as_its_cache_beside_it(route: Route, seed: int) -> None:
    model = make_model("llama")
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=4096, block_size=16, _env_file=None))
    with Attachment(model, cache, route, "test").install() as attachment:
        life = Life(attachment, 1000 * seed)
        life.feed()
        life.feed()
        for _ in range(STEPS):
            life.step()
    assert cache.get_stats()["mutable_pages"] == 0
