"""``process_kv``: what goes in comes back, in its place and in the caller's dtype, or is refused unstored."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid import (
    ClosedError,
    InvalidRequestError,
    KVCache,
    KVCacheConfig,
    KVLayout,
    LayoutError,
)
from kvhybrid.layout import LayerShape

LAYERS, HEADS, WIDTH, VALUE_WIDTH = 2, 3, 4, 6

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make(max_tokens=512, block_size=4, dtype="float32", **changes):
    layout = KVLayout(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=WIDTH,
        value_head_dim=VALUE_WIDTH,
        dtype=dtype,
        block_size=block_size,
    )
    config = KVCacheConfig(max_tokens=max_tokens, block_size=block_size, _env_file=None, **changes)
    return KVCache(config, layout=layout)


def slice_of(tokens, batch=1, dtype=torch.float32):
    return (
        torch.randn(batch, HEADS, tokens, WIDTH).to(dtype),
        torch.randn(batch, HEADS, tokens, VALUE_WIDTH).to(dtype),
    )


def same(found, expected):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found[:2], expected, strict=True))


def joined(*slices):
    return tuple(torch.cat(parts, dim=2) for parts in zip(*slices, strict=True))


def state(cache):
    """What a refused call must leave as it was."""
    counters = cache.get_stats()
    names = ("sessions", "used_bytes", "free_pages", "sequences", "evicted_pages", "sealed_pages")
    return {name: counters[name] for name in names}


def test_the_first_slice_comes_back_to_the_bit():
    cache, given_slice = make(), slice_of(7, batch=2)
    key, value, metadata = cache.process_kv(*given_slice)
    assert same((key, value), given_slice)
    assert metadata == {
        "cached": False,
        "position": 0,
        "tokens": 7,
        "bytes": 2 * 7 * HEADS * (WIDTH + VALUE_WIDTH) * 4,
        "codec": "float32",
        "positions": None,
        "evicted": 0,
    }


def test_slices_without_a_position_are_appended():
    cache, parts = make(), [slice_of(count) for count in (5, 1, 1, 9, 4)]
    for index, part in enumerate(parts):
        key, value, metadata = cache.process_kv(*part)
        assert same((key, value), joined(*parts[: index + 1]))
        assert metadata["position"] == key.shape[2] - part[0].shape[2]
        assert metadata["tokens"] == part[0].shape[2]


@pytest.mark.parametrize(
    "cache_position",
    [0, np.int64(0), torch.arange(6), torch.arange(6, dtype=torch.int32), torch.arange(6).to(torch.uint8)],
)
def test_positions_that_are_cached_are_not_overwritten(cache_position):
    cache, first, other = make(), slice_of(6), slice_of(6)
    cache.process_kv(*first)
    before = state(cache)
    key, value, metadata = cache.process_kv(*other, cache_position)
    assert same((key, value), first)
    assert metadata["cached"] is True
    assert (metadata["position"], metadata["tokens"], metadata["bytes"]) == (0, 0, 0)
    assert state(cache) == before


def test_of_a_slice_that_is_partly_cached_only_the_rest_is_stored():
    cache, first, other = make(), slice_of(6), slice_of(6)
    cache.process_kv(*first)
    key, value, metadata = cache.process_kv(*other, torch.arange(3, 9))
    expected = joined(first, [tensor[:, :, 3:] for tensor in other])
    assert same((key, value), expected)
    assert metadata["cached"] is False
    assert (metadata["position"], metadata["tokens"]) == (3, 3)
    assert metadata["bytes"] == 3 * HEADS * (WIDTH + VALUE_WIDTH) * 4


def test_a_slice_in_the_middle_gives_everything_up_to_its_end():
    cache, first = make(), slice_of(10)
    cache.process_kv(*first)
    key, value, metadata = cache.process_kv(*slice_of(2), 3)
    assert same((key, value), [tensor[:, :, :5] for tensor in first])
    assert metadata["cached"] is True


def test_every_layer_has_its_own_progress():
    cache, low, high = make(), slice_of(9), slice_of(5)
    cache.process_kv(*low, layer_idx=1)
    key, value, metadata = cache.process_kv(*high, layer_idx=0)
    assert same((key, value), high)
    assert metadata["position"] == 0
    more = slice_of(8)
    assert same(cache.process_kv(*more, layer_idx=0), joined(high, more))
    assert same(cache.process_kv(*slice_of(1), 8, layer_idx=1), low)
    assert cache.get_stats()["used_bytes"] == 4 * cache.layout.bytes_per_page


def test_the_pages_are_reserved_once_and_not_once_a_layer():
    cache = make()
    for layer in range(LAYERS):
        cache.process_kv(*slice_of(9), layer_idx=layer)
    stats = cache.get_stats()
    assert stats["plans"] == 1
    assert stats["used_bytes"] == 3 * cache.layout.bytes_per_page


@given(
    counts=st.lists(st.integers(1, 19), min_size=1, max_size=5),
    batch=st.integers(1, 3),
    block_size=st.sampled_from([1, 2, 8, 16]),
    seed=st.integers(0, 2**32),
)
def test_lengths_across_block_boundaries(counts, batch, block_size, seed):
    torch.manual_seed(seed)
    cache = make(block_size=block_size)
    parts = [slice_of(count, batch) for count in counts]
    for index, part in enumerate(parts):
        for layer in range(LAYERS):
            assert same(cache.process_kv(*part, layer_idx=layer), joined(*parts[: index + 1]))
    pages = -(-sum(counts) // block_size)
    assert cache.get_stats()["used_bytes"] == batch * pages * cache.layout.bytes_per_page


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", DTYPES)
def test_results_come_back_in_the_callers_dtype(stored, asked):
    cache, part = make(dtype=stored), slice_of(6, dtype=DTYPES[asked])
    rounded = [tensor.to(DTYPES[stored]).to(DTYPES[asked]) for tensor in part]
    *found, metadata = cache.process_kv(*part)
    assert same(found, rounded)
    assert metadata["codec"] == stored
    if stored in ("float32", asked):
        assert same(found, part)
    # Another caller's dtype is as good, over the same pages.
    again = cache.process_kv(*slice_of(6), 0)
    assert same(again, [tensor.to(DTYPES[stored]).float() for tensor in part])


def test_what_comes_back_now_is_what_comes_back_later():
    cache, part = make(dtype="bfloat16"), slice_of(6)
    now = cache.process_kv(*part)
    assert not same(now, part)
    assert same(cache.process_kv(*part, 0), now[:2])


def test_inputs_need_not_be_contiguous():
    cache = make()
    key = torch.randn(7, WIDTH, 2, HEADS).permute(2, 3, 0, 1)
    value = torch.randn(2, HEADS, 14, 2 * VALUE_WIDTH)[:, :, ::2, ::2]
    expanded = torch.randn(1, HEADS, 1, WIDTH).expand(2, HEADS, 7, WIDTH)
    assert not key.is_contiguous()
    assert same(cache.process_kv(key, value), (key, value))
    assert same(cache.process_kv(expanded, value, session_id="b"), (expanded, value))


def test_gradients_end_here_whatever_the_mode():
    cache = make()
    key, value = (tensor.requires_grad_() for tensor in slice_of(5))
    found = cache.process_kv(key, value)
    assert not found[0].requires_grad
    assert not found[1].requires_grad
    more = slice_of(3)
    with torch.inference_mode():
        found = cache.process_kv(*more)
    assert same(found, joined((key.detach(), value.detach()), more))
    with torch.no_grad():
        assert same(cache.process_kv(*more, 5), joined((key.detach(), value.detach()), more))
    assert same(cache.process_kv(*slice_of(1)), cache.process_kv(*slice_of(1), 8)[:2])


def test_nothing_is_shared_with_the_caller():
    cache, part = make(), slice_of(5)
    kept = [tensor.clone() for tensor in part]
    found = cache.process_kv(*part)
    for tensor in (*part, *found[:2]):
        tensor.fill_(7)
    assert same(cache.process_kv(*slice_of(5), 0), kept)


def test_sessions_and_tenants_are_kept_apart():
    cache = make()
    names = [("a", "x"), ("a", "y"), ("b", "x")]
    parts = {name: slice_of(6) for name in names}
    for tenant, session in names:
        cache.process_kv(*parts[tenant, session], session_id=session, tenant=tenant)
    for tenant, session in names:
        found = cache.process_kv(*slice_of(6), 0, session_id=session, tenant=tenant)
        assert same(found, parts[tenant, session])
    assert cache.get_stats()["sessions"] == 3


def test_a_dropped_session_gives_its_pages_back():
    cache = make()
    cache.process_kv(*slice_of(9))
    assert cache.get_stats()["sessions"] == 1
    assert cache.drop_session() is True
    assert cache.drop_session() is False
    assert state(cache)["used_bytes"] == state(cache)["sessions"] == state(cache)["sequences"] == 0
    part = slice_of(3, batch=2)
    assert same(cache.process_kv(*part), part)


def test_a_truncated_session_goes_on_from_there():
    cache, low, high = make(), slice_of(11), slice_of(6)
    cache.process_kv(*low, layer_idx=0)
    cache.process_kv(*high, layer_idx=1)
    cache.truncate_kv(8)
    assert cache.get_stats()["used_bytes"] == 2 * cache.layout.bytes_per_page
    more = slice_of(3)
    assert same(cache.process_kv(*more, layer_idx=1), joined(high, more))
    assert same(cache.process_kv(*more, layer_idx=0), joined([t[:, :, :8] for t in low], more))
    cache.truncate_kv(5)
    for layer, part in enumerate((low, high)):
        kept = [tensor[:, :, :5] for tensor in part]
        assert same(cache.process_kv(*more, layer_idx=layer), joined(kept, more))


def test_truncating_to_nothing_forgets_the_session():
    cache = make()
    cache.process_kv(*slice_of(9, batch=2))
    cache.truncate_kv(0)
    assert state(cache)["sessions"] == state(cache)["used_bytes"] == 0
    cache.process_kv(*slice_of(9, batch=3))


@pytest.mark.parametrize("length", [10, -1, True, 2.0, None, torch.tensor(3)])
def test_a_truncation_that_means_nothing_is_refused(length):
    cache, part = make(), slice_of(9)
    cache.process_kv(*part)
    with pytest.raises(InvalidRequestError, match=r"length=|cannot truncate session 'default' to 10"):
        cache.truncate_kv(length)
    assert same(cache.process_kv(*slice_of(9), 0), part)


def test_truncating_what_is_not_there_is_refused():
    with pytest.raises(InvalidRequestError, match="no session 'a' of tenant 'default'"):
        make().truncate_kv(0, session_id="a")


REFUSED_POSITIONS = {
    "gap": (6, "layer 0 of session 'default' holds 5 positions: 1 are missing"),
    "far": (2**70, "are missing"),
    "negative": (-1, "whole number of at least 0"),
    "flag": (True, "whole number"),
    "fraction": (5.0, "whole number"),
    "text": ("5", "whole number"),
    "list": ([5, 6, 7], "whole number"),
    "tensor gap": (torch.arange(6, 9), "1 are missing"),
    "tensor negative": (torch.arange(-1, 2), "from -1 to 1"),
    "tensor steps": (torch.arange(5, 11, 2), "from 5 to 9 over 3 tokens: must be consecutive"),
    "tensor down": (torch.tensor([7, 6, 5]), "consecutive"),
    "tensor shuffled": (torch.tensor([5, 7, 7]), "consecutive"),
    "tensor short": (torch.arange(5, 7), r"\[2\] for 3 tokens"),
    "tensor of rows": (torch.arange(5, 8)[None], r"\[1, 3\] for 3 tokens"),
    "tensor of none": (torch.tensor(5), r"\[\] for 3 tokens"),
    "tensor of flags": (torch.ones(3, dtype=torch.bool), "torch.bool: must be whole"),
    "tensor of fractions": (torch.arange(5.0, 8.0), "torch.float32: must be whole"),
    "tensor wrapped": (torch.tensor([254, 255, 0], dtype=torch.uint8), "consecutive"),
}


@pytest.mark.parametrize("name", REFUSED_POSITIONS)
def test_positions_that_leave_a_gap_or_mean_nothing_are_refused(name):
    cache_position, message = REFUSED_POSITIONS[name]
    cache, part = make(), slice_of(5)
    cache.process_kv(*part)
    before = state(cache)
    with pytest.raises(InvalidRequestError, match=message):
        cache.process_kv(*slice_of(3), cache_position)
    assert state(cache) == before
    assert same(cache.process_kv(*slice_of(5), 0), part)


def changed(**parts):
    key, value = slice_of(3)
    return parts.get("key", key), parts.get("value", value)


REFUSED_TENSORS = {
    "K of 3 dimensions": (changed(key=torch.zeros(HEADS, 3, WIDTH)), "4 dimensions, got 3 and 4"),
    "heads": (changed(key=torch.zeros(1, HEADS + 1, 3, WIDTH)), "K has 4 heads of 4"),
    "K's width": (changed(key=torch.zeros(1, HEADS, 3, WIDTH + 1)), "K has 3 heads of 5"),
    "V's width": (changed(value=torch.zeros(1, HEADS, 3, WIDTH)), "V has 3 heads of 4"),
    "tokens": (changed(value=torch.zeros(1, HEADS, 2, VALUE_WIDTH)), "K has 3 tokens, V has 2"),
    "rows": (changed(value=torch.zeros(2, HEADS, 3, VALUE_WIDTH)), "K has 1 rows, V has 2"),
    "no tokens": (slice_of(0), "at least one row and one token"),
    "no rows": (slice_of(3, batch=0), "at least one row and one token"),
    "another batch": (slice_of(3, batch=2), "K has 2 rows, session 'default' was begun with 1"),
    "integers": (changed(key=torch.zeros(1, HEADS, 3, WIDTH).int()), "torch.int32: must be one of float32"),
    "doubles": (slice_of(3, dtype=torch.float64), "torch.float64: must be one of"),
    "two dtypes": (changed(key=torch.zeros(1, HEADS, 3, WIDTH).half()), "K is torch.float16, V is"),
    "another device": (changed(value=torch.zeros(1, HEADS, 3, VALUE_WIDTH, device="meta")), "V is on meta"),
    "sparse": (changed(key=torch.zeros(1, HEADS, 3, WIDTH).to_sparse()), "K must be a dense tensor"),
    "no tensor": (changed(key=np.zeros((1, HEADS, 3, WIDTH), np.float32)), "must be a tensor, got ndarray"),
}


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_tensors_that_do_not_fit_are_refused_before_anything_is_stored(name):
    tensors, message = REFUSED_TENSORS[name]
    cache, part = make(), slice_of(5)
    cache.process_kv(*part)
    before = state(cache)
    with pytest.raises(LayoutError, match=message):
        cache.process_kv(*tensors)
    assert state(cache) == before
    assert same(cache.process_kv(*slice_of(5), 0), part)


@pytest.mark.parametrize(
    ("layer", "error"),
    [(-1, InvalidRequestError), (True, InvalidRequestError), (0.0, InvalidRequestError), (2, LayoutError)],
)
def test_layers_that_are_not_there_are_refused(layer, error):
    cache = make()
    with pytest.raises(error, match="layer"):
        cache.process_kv(*slice_of(3), layer_idx=layer)
    assert cache.get_stats()["sessions"] == 0


@pytest.mark.parametrize("names", [{"session_id": 1}, {"session_id": None}, {"tenant": b"a"}])
def test_names_that_are_no_text_are_refused(names):
    cache = make()
    with pytest.raises(InvalidRequestError, match="must be text"):
        cache.process_kv(*slice_of(3), **names)
    assert cache.get_stats()["sessions"] == 0


@pytest.mark.parametrize("names", [{"session_id": "a\ud83d"}, {"tenant": "\udc00"}])
def test_names_with_half_a_character_are_refused(names):
    cache = make()
    with pytest.raises(InvalidRequestError, match=r"position \d is half of a surrogate pair"):
        cache.process_kv(*slice_of(3), **names)
    assert cache.get_stats()["sessions"] == 0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_numbers_that_would_spoil_all_later_attention_are_refused(number, which):
    cache, part, bad = make(), slice_of(5), slice_of(3, batch=1)
    cache.process_kv(*part)
    before = state(cache)
    bad[which][0, 1, 2, 3] = number
    with pytest.raises(InvalidRequestError, match=f"{'KV'[which]} holds a NaN or an infinity"):
        cache.process_kv(*bad)
    assert state(cache) == before
    assert same(cache.process_kv(*slice_of(5), 0), part)


def test_numbers_that_the_pages_cannot_hold_are_refused():
    cache, bad = make(dtype="float16"), slice_of(3)
    bad[1][0, 1, 2, 3] = -70000.0
    with pytest.raises(InvalidRequestError, match=r"V holds 70000: too large for torch.float16 pages"):
        cache.process_kv(*bad)
    assert cache.get_stats()["sessions"] == 0
    assert same(make(dtype="bfloat16").process_kv(*bad), [t.bfloat16().float() for t in bad])


def test_a_closed_cache_refuses_and_has_given_every_page_back():
    cache = make()
    cache.process_kv(*slice_of(5))
    cache.close()
    assert state(cache)["sessions"] == state(cache)["used_bytes"] == 0
    with pytest.raises(ClosedError, match="the cache is closed"):
        cache.process_kv(*slice_of(5))


def test_a_models_session_of_the_same_name_is_another_and_dropped_with_it():
    class Session:
        closed = 0

        def close(self):
            self.closed += 1

    cache, session = make(), Session()
    cache.on_session(lambda name, tenant: session)
    cache.session("a")
    cache.process_kv(*slice_of(5), session_id="a")
    assert cache.get_stats()["sessions"] == 2
    cache.on_session(None)
    assert cache.get_stats()["sessions"] == 1
    cache.on_session(lambda name, tenant: session)
    cache.session("a")
    assert cache.drop_session("a") is True
    assert session.closed == 2
    assert cache.get_stats()["sessions"] == 0


def test_layers_may_differ_and_one_that_keeps_nothing_takes_nothing():
    shapes = [
        LayerShape(num_kv_heads=2, head_dim=8, value_head_dim=4),
        None,
        LayerShape(num_kv_heads=1, head_dim=3, value_head_dim=5),
    ]
    cache = KVCache(
        KVCacheConfig(max_tokens=64, block_size=4, _env_file=None),
        layout=KVLayout.of_layers(shapes, block_size=4),
    )
    for layer, heads, width, value_width in ((2, 1, 3, 5), (0, 2, 8, 4)):
        part = torch.randn(1, heads, 7, width), torch.randn(1, heads, 7, value_width)
        *found, metadata = cache.process_kv(*part, layer_idx=layer)
        assert same(found, part)
        assert metadata["bytes"] == 7 * heads * (width + value_width) * 4
    with pytest.raises(LayoutError, match="layer 1 keeps no K and V"):
        cache.process_kv(*part, layer_idx=1)
