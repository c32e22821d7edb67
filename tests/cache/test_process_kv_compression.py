"""``process_kv`` with compression: each head keeps its share of what is old, and says which positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid import InvalidRequestError, KVCache, KVCacheConfig, KVLayout, OutOfMemoryError, UnsupportedError
from kvhybrid.cache.compress import rewrite
from kvhybrid.cache.compress.scorers import NEED_QUERIES, SCORERS
from kvhybrid.cache.compress.selection import RECENT, SINKS, choose, gather, kept_tokens
from kvhybrid.presets import CompressionScorer

LAYERS, HEADS, WIDTH, VALUE_WIDTH = 2, 3, 4, 6
BLOCK = 4
KEPT = 0.4


def make(max_tokens=1024, kept=KEPT, block_size=BLOCK, **fields):
    layout = KVLayout(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=WIDTH,
        value_head_dim=VALUE_WIDTH,
        block_size=block_size,
    )
    fields = {"use_compression": True, "compression_ratio": kept, **fields}
    config = KVCacheConfig(max_tokens=max_tokens, block_size=block_size, _env_file=None, **fields)
    return KVCache(config, layout=layout)


def slice_of(tokens, batch=1):
    return torch.randn(batch, HEADS, tokens, WIDTH), torch.randn(batch, HEADS, tokens, VALUE_WIDTH)


class Reference:
    """One layer of a session as plain tensors, compressed by the same rule."""

    def __init__(self, scorer, kept=KEPT):
        self.scorer, self.kept, self.length = scorer, kept, 0
        self.keys = self.values = self.positions = None

    def append(self, keys, values):
        here = torch.arange(self.length, self.length + keys.shape[2]).expand(*keys.shape[:3])
        parts = [(self.keys, keys), (self.values, values), (self.positions, here)]
        joined = [new if old is None else torch.cat([old, new], dim=2) for old, new in parts]
        self.keys, self.values, self.positions = joined
        self.length += keys.shape[2]
        return joined

    def compress(self):
        count = min(kept_tokens(self.length, self.kept), self.keys.shape[2])
        if self.keys.shape[2] - count < BLOCK:
            return
        # Row by row, as sequences lie: a batch's sums may be others in their last bits.
        rows = zip(self.keys.split(1), self.values.split(1), strict=True)
        places = torch.cat([choose(SCORERS[self.scorer](k, v, None), count) for k, v in rows])
        self.keys, self.values = gather(self.keys, places), gather(self.values, places)
        self.positions = self.positions.gather(2, places)


@given(
    counts=st.lists(st.sampled_from([1, 1, 1, 2, 7, 40, 90]), min_size=1, max_size=9),
    batch=st.integers(1, 2),
    scorer=st.sampled_from(sorted(set(CompressionScorer) - NEED_QUERIES)),
    seed=st.integers(0, 1000),
)
def test_what_comes_back_is_what_the_scorer_keeps_and_says_where_it_was(counts, batch, scorer, seed):
    torch.manual_seed(seed)
    cache = make(max_tokens=2048, compression_scorer=scorer)
    layers = [Reference(scorer) for _ in range(LAYERS)]
    for count in counts:
        for index, layer in enumerate(layers):
            new = slice_of(count, batch)
            keys, values, metadata = cache.process_kv(*new, layer_idx=index)
            expected = layer.append(*new)
            assert torch.equal(keys, expected[0])
            assert torch.equal(values, expected[1])
            assert (metadata["tokens"], metadata["position"]) == (count, layer.length - count)
            is_whole = expected[0].shape[2] == layer.length
            assert (metadata["positions"] is None) == is_whole
            if not is_whole:
                assert torch.equal(metadata["positions"], expected[2])
        for layer in layers:
            layer.compress()
    used = batch * -(-layers[0].keys.shape[2] // BLOCK)
    assert cache.pool.num_pages - cache.pool.num_free == used
    assert cache.get_stats()["removed_tokens"] == batch * (layers[0].length - layers[0].keys.shape[2])
    cache.drop_session()
    cache.pool.check()
    assert cache.pool.num_free == cache.pool.num_pages


def fill(cache, counts=(100, 1), **options):
    """Feed these slices to every layer; return the last answer of the last layer."""
    for count in counts:
        for layer in range(LAYERS):
            found = cache.process_kv(*slice_of(count), layer_idx=layer, **options)
    return found


def test_the_first_and_last_positions_stay_and_every_head_keeps_its_own():
    cache = make()
    keys, _, metadata = fill(cache)
    assert keys.shape[2] == kept_tokens(100, KEPT) + 1
    positions = metadata["positions"]
    assert positions.shape == (1, HEADS, keys.shape[2])
    assert (positions[:, :, :SINKS] == torch.arange(SINKS)).all()
    assert (positions[:, :, -RECENT - 1 :] == torch.arange(100 - RECENT, 101)).all()
    assert (positions.diff() > 0).all()
    assert not torch.equal(positions[0, 0], positions[0, 1])


def test_a_prompt_is_answered_whole_and_what_follows_over_what_is_left():
    cache = make()
    for layer in range(LAYERS):
        keys, _, metadata = cache.process_kv(*slice_of(100), layer_idx=layer)
        assert keys.shape[2] == 100
        assert metadata["positions"] is None
    assert cache.get_stats()["compressions"] == 1
    assert cache.process_kv(*slice_of(1))[0].shape[2] == kept_tokens(100, KEPT) + 1


def test_while_a_layer_has_still_to_come_nothing_is_removed():
    cache = make()
    for count in (100, 1):
        assert cache.process_kv(*slice_of(count), layer_idx=0)[2]["positions"] is None
    assert cache.process_kv(*slice_of(101), layer_idx=1)[2]["positions"] is None
    assert cache.get_stats()["compressions"] == 1


def test_a_slice_sent_again_comes_back_whole_or_is_refused():
    cache = make()
    fill(cache, (100,))
    front, free = 100 - RECENT, cache.pool.num_free
    for start, length in ((0, 100), (0, front), (front - 1, 40), (50, 60), (front - 1, 1)):
        with pytest.raises(InvalidRequestError, match=f"from {start} on are asked for.*first {front} of"):
            cache.process_kv(*slice_of(length), start)
        assert cache.pool.num_free == free
    for start in (front, 98):
        keys, _, metadata = cache.process_kv(*slice_of(100 - start), start)
        assert metadata["cached"]
        assert keys.shape[2] == kept_tokens(100, KEPT)
        own = torch.arange(start, 100).expand(*metadata["positions"].shape[:2], -1)
        assert torch.equal(metadata["positions"][..., start - 100 :], own)
    keys, _, metadata = cache.process_kv(*slice_of(5), 98)  # two of them are known
    assert (metadata["cached"], metadata["tokens"]) == (False, 3)
    assert keys.shape[2] == kept_tokens(100, KEPT) + 3


def test_it_is_truncated_behind_what_was_removed_or_to_nothing():
    cache = make()
    keys, values, _ = fill(cache, (100, 3))
    front = 100 - RECENT
    with pytest.raises(InvalidRequestError, match=f"of its first {front} positions each head keeps some"):
        cache.truncate_kv(front - 1)
    cache.truncate_kv(99)
    new = slice_of(1)
    found = cache.process_kv(*new, layer_idx=1)
    assert found[2]["position"] == 99
    assert torch.equal(found[0], torch.cat([keys[:, :, :-4], new[0]], dim=2))
    assert torch.equal(found[1], torch.cat([values[:, :, :-4], new[1]], dim=2))
    cache.truncate_kv(0)
    assert cache.pool.num_free == cache.pool.num_pages
    assert cache.process_kv(*new)[2]["positions"] is None


def test_nothing_goes_while_it_would_be_less_than_a_page():
    cache = make()
    fill(cache, (100,))
    before = cache.get_stats()["compressions"]
    runs = []
    for _ in range(40):
        fill(cache, (1,))
        runs.append(cache.get_stats()["compressions"] - before)
    # 0.6 of a token goes with each: a page of 4 about every 7.
    assert runs[-1] == 6
    assert runs[:5] == [0] * 5


def test_without_room_for_both_a_session_stays_whole():
    cache = make(max_tokens=104)
    keys, _, metadata = fill(cache)
    assert metadata["positions"] is None
    assert keys.shape[2] == 101
    assert cache.get_stats()["skipped_compressions"] > 0
    with pytest.raises(OutOfMemoryError):
        fill(cache, (10,))


def test_a_slice_is_stored_though_nothing_can_be_chosen(monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("not today")

    monkeypatch.setattr(rewrite, "choose", fail)
    cache = make()
    keys, _, metadata = fill(cache)
    assert (keys.shape[2], metadata["positions"]) == (101, None)
    assert cache.get_stats()["skipped_compressions"] == 2
    said = [record.getMessage() for record in caplog.records]
    assert said == ["a process_kv session could not be compressed"] * 2
    cache.drop_session()
    assert cache.pool.num_free == cache.pool.num_pages


@pytest.mark.parametrize("scorer", sorted(NEED_QUERIES))
def test_scorers_that_ask_for_queries_are_refused(scorer):
    cache = make(compression_scorer=scorer)
    with pytest.raises(UnsupportedError, match=f"{scorer.value}.*process_kv never sees"):
        cache.process_kv(*slice_of(3))
    assert cache.get_stats()["sessions"] == 0


@pytest.mark.parametrize(("bits", "error"), [(8, 0.05), (4, 0.7)])
def test_quantized_and_compressed_pages_in_one_session(bits, error):
    """What is kept of a record is rounded once more when its new page grows cold: errors add up."""
    cache = make(
        max_tokens=2048,
        block_size=16,
        use_quantization=True,
        quantization_bits=bits,
        compression_scorer="streaming",  # goes by places, whatever quantization does to K
    )
    layers = [Reference(CompressionScorer.STREAMING) for _ in range(LAYERS)]
    for count in (160, 64, 1, 90):
        for index, layer in enumerate(layers):
            new = slice_of(count)
            found = cache.process_kv(*new, layer_idx=index)
            expected = layer.append(*new)
            for ours, exact in zip(found[:2], expected[:2], strict=True):
                assert (ours - exact).abs().max() < error
            if found[2]["positions"] is not None:
                assert torch.equal(found[2]["positions"], expected[2])
        for layer in layers:
            if layer.keys.shape[2] - kept_tokens(layer.length, KEPT) >= 16:
                layer.compress()
        for name in ("a", "b"):  # what was not written lately grows cold
            fill(cache, (100,), session_id=name)
    stats = cache.get_stats()
    assert stats["quantized_tokens"] > 0
    assert stats["compressions"] > 2
    for name in ("default", "a", "b"):
        cache.drop_session(name)
    cache.pool.check()
