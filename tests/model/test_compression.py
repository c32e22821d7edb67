"""A compressed session: what it says, how long it is, and that nobody else notices."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import make_model, prompt
from gapped import Gapped

import kvhybrid
from kvhybrid import InvalidRequestError, KVCacheConfig, UnsupportedError
from kvhybrid.cache.compress.scorers import SCORERS
from kvhybrid.cache.compress.selection import RECENT, choose, gather, kept_tokens
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over
from kvhybrid.presets import CompressionScorer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvhybrid.model.transformers_cache import PagedSession

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
LENGTH = 149  # no multiple of a block
BY_KEYS = [scorer for scorer in CompressionScorer if scorer not in ("snapkv", "tova")]


def attached(route: Route, family: str = "llama", **fields: Any) -> Attachment:
    model = make_model(family)
    config = KVCacheConfig(**{"max_tokens": 2048, "block_size": 16, **fields})
    return Attachment(model, KVCache.for_model(model, config), route, "test").install()


@pytest.fixture(params=list(Route))
def attachment(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    with attached(request.param) as attachment:
        yield attachment
    pool = attachment.cache.pool
    pool.check()
    assert pool.num_free + pool.num_evictable == pool.num_pages


@torch.no_grad()
def feed(attachment: Attachment, past: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    return attachment.model(ids, **over(past), use_cache=True, **more).logits


def generate(attachment: Attachment, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = attachment.model.generate(ids, **{**GREEDY, **options})
    return found


def compressed(attachment: Attachment, kept: float = 0.4, ids: torch.Tensor | None = None) -> PagedSession:
    session: PagedSession = attachment.cache.session("compressed")
    feed(attachment, session, prompt(LENGTH) if ids is None else ids)
    assert session.compress(kept) > 0
    return session


@torch.no_grad()
def gapped(model: Any, ids: torch.Tensor, kept: float, scorer: CompressionScorer) -> Gapped:
    past = Gapped(config=model.config)
    model(ids, **over(past), use_cache=True)
    count = kept_tokens(ids.shape[1], kept)
    for layer in past.layers:
        places = choose(SCORERS[scorer](layer.keys, layer.values, None), count)
        layer.keys, layer.values = gather(layer.keys, places), gather(layer.values, places)
    past.gap = ids.shape[1] - count
    return past


@torch.no_grad()
def own_logits(model: Any, past: Gapped, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, **over(past), use_cache=True).logits
    return logits


@pytest.mark.parametrize("scorer", BY_KEYS)
def test_what_follows_is_what_transformers_says_without_the_same_tokens(
    attachment: Attachment, scorer: CompressionScorer
) -> None:
    ids = prompt(293)  # two partitions of LagKV
    session = attachment.cache.session("compressed")
    feed(attachment, session, ids)
    session.compress(0.4, scorer=scorer)
    model = make_model("llama")
    past = gapped(model, ids, 0.4, scorer)
    for width in (7, 1, 1, 12):
        more = prompt(width, seed=width)
        expected = own_logits(model, past, more)
        torch.testing.assert_close(feed(attachment, session, more), expected, atol=2e-4, rtol=1e-4)
    assert session.get_seq_length() == past.get_seq_length()


def test_heads_keep_tokens_of_their_own_and_all_the_first_and_last(attachment: Attachment) -> None:
    session = attachment.cache.session("compressed")
    feed(attachment, session, prompt(LENGTH))
    whole = session.layers[1].keys
    session.compress(0.4)
    left = session.layers[1].keys
    count = kept_tokens(LENGTH, 0.4)
    assert left.shape == (1, 2, count, 8)
    assert torch.equal(left[:, :, :4], whole[:, :, :4])
    assert torch.equal(left[:, :, -RECENT:], whole[:, :, -RECENT:])
    places = [(whole[0, head, :, None] == left[0, head]).all(-1).int().argmax(0) for head in range(2)]
    assert all(bool((each[1:] > each[:-1]).all()) for each in places)
    assert not torch.equal(places[0], places[1])


def test_a_compressed_session_is_as_long_as_its_text(attachment: Attachment) -> None:
    session = compressed(attachment)
    gap = LENGTH - kept_tokens(LENGTH, 0.4)
    assert (session.get_seq_length(), session.get_query_offset()) == (LENGTH, LENGTH)
    assert session.get_mask_sizes(5, 0) == (LENGTH - gap + 5, gap)
    feed(attachment, session, prompt(3, seed=2))
    assert session.get_seq_length() == LENGTH + 3
    assert session.layers[0].keys.shape[2] == LENGTH + 3 - gap
    assert session.rows.text().texts[0].tolist() == [
        *prompt(LENGTH)[0].tolist(),
        *prompt(3, seed=2)[0].tolist(),
    ]


def test_generating_from_all_ids_equals_explicit_positions_to_the_bit(attachment: Attachment) -> None:
    session = compressed(attachment)
    twin = session.fork()[0]
    ids = torch.cat([prompt(LENGTH), prompt(5, seed=3)], dim=1)
    found = generate(attachment, ids, **over(session), return_dict_in_generate=True, output_logits=True)
    fed, logits = ids[:, LENGTH:], []
    for _ in range(GREEDY["max_new_tokens"]):
        start = twin.get_seq_length()
        positions = torch.arange(start, start + fed.shape[1])[None]
        logits.append(feed(attachment, twin, fed, position_ids=positions, logits_to_keep=1)[:, -1])
        fed = logits[-1].argmax(-1, keepdim=True)
    assert torch.equal(torch.stack(found.logits), torch.stack(logits))


@pytest.mark.parametrize("route", list(Route))
def test_a_ratio_of_one_is_no_compression(route: Route) -> None:
    ids = prompt(LENGTH)
    with attached(route) as plain:
        expected = generate(plain, ids, **over(plain.cache.session("a")))
    with attached(route, use_compression=True, compression_ratio=1.0) as attachment:
        session = attachment.cache.session("a")
        assert torch.equal(generate(attachment, ids, **over(session)), expected)
        assert session.compress() == 0
        assert attachment.cache.get_stats()["compressions"] == 0
        assert attachment.cache.get_stats()["mutable_pages"] == 0


@pytest.mark.parametrize("route", list(Route))
def test_a_session_is_compressed_behind_each_turn_and_keeps_its_share_of_the_whole(route: Route) -> None:
    with attached(route, use_compression=True, compression_ratio=0.4) as attachment:
        session = attachment.cache.session("a")
        text = generate(attachment, prompt(LENGTH), **over(session))
        with attached(route) as plain:  # the first answer is nobody's loss
            assert torch.equal(text, generate(plain, prompt(LENGTH), **over(plain.cache.session("a"))))
        for turn in range(3):
            columns = text.shape[1] - 1  # the last token was never fed
            assert session.get_seq_length() == columns
            assert columns - session.rows.gap == kept_tokens(columns, 0.4)
            text = torch.cat([text, prompt(11, seed=turn)], dim=1)
            text = generate(attachment, text, **over(session))
            assert session.cached_tokens == [columns]
        stats = attachment.cache.get_stats()
        assert stats["compressions"] == 4
        assert stats["removed_tokens"] == session.rows.gap
        assert stats["removed_bytes"] == session.rows.gap * attachment.cache.layout.bytes_per_token


def test_compressed_twice_with_one_share_nothing_more_goes(attachment: Attachment) -> None:
    session = compressed(attachment, 0.4)
    left = session.layers[0].keys
    assert session.compress(0.4) == 0
    assert torch.equal(session.layers[0].keys, left)
    stronger = kept_tokens(LENGTH, 0.4) - kept_tokens(LENGTH, 0.2)
    assert session.compress(removed=0.8) == stronger
    assert session.layers[0].keys.shape[2] == kept_tokens(LENGTH, 0.2)


def test_others_that_stand_on_the_same_pages_see_no_change(attachment: Attachment) -> None:
    ids, more = prompt(LENGTH), prompt(7, seed=1)
    first, second = attachment.cache.session("first"), attachment.cache.session("compressed")
    generate(attachment, ids, **over(first))
    feed(attachment, first, prompt(1, seed=9))
    before = [(layer.keys, layer.values) for layer in first.layers]
    generate(attachment, ids, **over(second))
    second.compress(0.3)
    after = [(layer.keys, layer.values) for layer in first.layers]
    for (keys, values), (its_keys, its_values) in zip(before, after, strict=True):
        assert torch.equal(keys, its_keys)
        assert torch.equal(values, its_values)
    feed(attachment, second, more)
    third = attachment.cache.session("third")
    found = generate(attachment, torch.cat([ids, more], dim=1), **over(third))
    # What was computed over the compressed text is found by nobody.
    assert third.cached_tokens[0] <= LENGTH + 6
    assert torch.equal(found, generate(attachment, torch.cat([ids, more], dim=1), use_cache=False))
    assert torch.equal(generate(attachment, ids), generate(attachment, ids, use_cache=False))


def test_left_padding_hides_what_was_removed_of_each_row(attachment: Attachment) -> None:
    ids = torch.cat([prompt(LENGTH), prompt(LENGTH, seed=5)])
    mask = torch.ones_like(ids)
    mask[0, :31] = 0
    mask[1, :2] = 0
    session = attachment.cache.session("batch")
    feed(attachment, session, ids, attention_mask=mask)
    session.compress(0.4)
    steps = [prompt(width, seed=width).repeat(2, 1) for width in (6, 1, 1)]
    found, seen = [], mask
    for step in steps:
        seen = torch.cat([seen, torch.ones_like(step)], dim=1)
        found.append(feed(attachment, session, step, attention_mask=seen))
    for row, pad in enumerate((31, 2)):
        alone = attachment.cache.session(f"row {row}")
        feed(attachment, alone, ids[row : row + 1, pad:])
        alone.compress(0.4)
        for step, logits in zip(steps, found, strict=True):
            expected = feed(attachment, alone, step[:1])
            torch.testing.assert_close(logits[row : row + 1], expected, atol=2e-4, rtol=1e-4)
    assert session.get_seq_length() == LENGTH + 8


def test_a_row_too_short_to_lose_anything_stays_whole_beside_others(attachment: Attachment) -> None:
    ids = torch.cat([prompt(LENGTH), prompt(LENGTH, seed=5)])
    mask = torch.ones_like(ids)
    mask[0, : LENGTH - 20] = 0
    session = attachment.cache.session("batch")
    feed(attachment, session, ids, attention_mask=mask)
    assert session.compress(0.4) == LENGTH - kept_tokens(LENGTH, 0.4)
    step = prompt(6, seed=1).repeat(2, 1)
    seen = torch.cat([mask, torch.ones_like(step)], dim=1)
    found = feed(attachment, session, step, attention_mask=seen)
    whole = torch.cat([ids[:1, LENGTH - 20 :], step[:1]], dim=1)
    expected = feed(attachment, attachment.cache.session("whole"), whole)[:, -6:]
    torch.testing.assert_close(found[:1], expected, atol=2e-4, rtol=1e-4)
    alone = attachment.cache.session("alone")
    feed(attachment, alone, ids[1:])
    alone.compress(0.4)
    torch.testing.assert_close(found[1:], feed(attachment, alone, step[1:]), atol=2e-4, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="compressed"):
        session.export()


def test_a_padded_batch_of_a_model_that_counts_columns_itself_is_refused(
    attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.cat([prompt(LENGTH), prompt(LENGTH, seed=5)])
    mask = torch.ones_like(ids)
    mask[0, :31] = 0
    session = attachment.cache.session("batch")
    feed(attachment, session, ids, attention_mask=mask)
    session.compress(0.4)
    monkeypatch.setattr(attachment._stepping, "_parameters", ["input_ids", "attention_mask"])
    with pytest.raises(UnsupportedError, match="padded batch of a model without position_ids"):
        feed(attachment, session, ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], dim=1))
    assert session.get_seq_length() == LENGTH


def test_a_padded_batch_goes_on_generating(attachment: Attachment) -> None:
    ids = torch.cat([prompt(LENGTH), prompt(LENGTH, seed=5)])
    mask = torch.ones_like(ids)
    mask[0, :31] = 0
    session = attachment.cache.session("batch")
    text = generate(attachment, ids, attention_mask=mask, **over(session))
    session.compress(0.4)
    columns = session.get_seq_length()
    seen = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], dim=1)
    both = generate(attachment, text, attention_mask=seen, **over(session))
    assert session.cached_tokens == [columns - 31, columns]
    alone = attachment.cache.session("alone")
    generate(attachment, ids[:1, 31:], **over(alone))
    alone.compress(0.4)
    assert torch.equal(both[:1, 31:], generate(attachment, text[:1, 31:], **over(alone)))


@pytest.mark.parametrize("back", [1, 20, RECENT])
def test_a_text_is_cut_where_every_head_has_every_token(attachment: Attachment, back: int) -> None:
    session = compressed(attachment)
    feed(attachment, session, prompt(9, seed=2))
    session.truncate(LENGTH - back)
    assert session.rows.gap > 0
    model = make_model("llama")
    past = gapped(model, prompt(LENGTH), 0.4, CompressionScorer.KEYDIFF)
    past.crop(-back)
    more = prompt(5, seed=7)
    expected = own_logits(model, past, more)
    torch.testing.assert_close(feed(attachment, session, more), expected, atol=2e-4, rtol=1e-4)


def test_compressed_again_where_heads_differ_stays_cut_behind(attachment: Attachment) -> None:
    session = compressed(attachment, 0.6)
    session.truncate(LENGTH - RECENT + 3)  # three tokens that every head has
    assert session.compress(0.3) > 0
    session.truncate(LENGTH - RECENT)
    assert session.rows.gap > 0
    session.truncate(LENGTH - RECENT - 1)
    assert session.rows.gap == 0


def test_a_text_cut_within_the_compressed_part_is_computed_again(attachment: Attachment) -> None:
    session = compressed(attachment)
    session.truncate(60)
    assert (session.get_seq_length(), session.rows.gap) == (60, 0)
    ids = torch.cat([prompt(LENGTH)[:, :60], prompt(8, seed=4)], dim=1)
    found = generate(attachment, ids, **over(session))
    assert torch.equal(found, generate(attachment, ids, use_cache=False))


def test_another_text_in_place_of_the_compressed_is_computed_as_ever(attachment: Attachment) -> None:
    session = compressed(attachment)
    ids = prompt(LENGTH).clone()
    ids[0, 50] = 3 if ids[0, 50] != 3 else 4
    found = generate(attachment, ids, **over(session))
    assert torch.equal(found, generate(attachment, ids, use_cache=False))
    assert session.rows.gap == 0


def test_the_same_prompt_again_computes_its_last_token_over_what_is_left(attachment: Attachment) -> None:
    session = compressed(attachment)
    found = generate(attachment, prompt(LENGTH), **over(session))
    assert session.cached_tokens == [LENGTH - 1]
    assert session.rows.gap > 0
    assert torch.equal(found[:, :LENGTH], prompt(LENGTH))


def test_forks_share_compressed_pages_and_go_their_own_way(attachment: Attachment) -> None:
    session = compressed(attachment)
    pool = attachment.cache.pool
    used = pool.num_pages - pool.num_free
    forks = [*session.fork(2), copy.deepcopy(session)]
    assert pool.num_pages - pool.num_free == used
    ways = [prompt(5, seed=seed) for seed in range(3)]
    found = [feed(attachment, fork, way) for fork, way in zip(forks, ways, strict=True)]
    for way, logits in zip(ways, found, strict=True):
        torch.testing.assert_close(feed(attachment, session, way), logits)
        session.truncate(LENGTH)


def test_beams_and_several_answers_run_over_a_compressed_text(attachment: Attachment) -> None:
    session = compressed(attachment)
    ids = torch.cat([prompt(LENGTH), prompt(4, seed=3)], dim=1)
    model = make_model("llama")
    past = gapped(model, prompt(LENGTH), 0.4, CompressionScorer.KEYDIFF)
    past.batch_repeat_interleave(3)
    found = generate(attachment, ids, **over(session), num_beams=3)
    assert torch.equal(found, model.generate(ids, **over(past), num_beams=3, **GREEDY))
    # One of the three goes on.
    longer = torch.cat([found, prompt(2, seed=1)], dim=1)
    generate(attachment, longer, **over(session))
    assert session.cached_tokens[0] >= LENGTH + 4
    assert session.num_rows == 1


def test_prompt_lookup_crops_behind_a_compressed_text(attachment: Attachment) -> None:
    session = compressed(attachment)
    twin = session.fork()[0]
    ids = torch.cat(
        [prompt(LENGTH), prompt(LENGTH)[:, 60:75]], dim=1
    )  # an echo, so that there are candidates
    expected = generate(attachment, ids, **over(twin), eos_token_id=2)
    found = generate(attachment, ids, **over(session), prompt_lookup_num_tokens=3, eos_token_id=2)
    assert torch.equal(found, expected)
    assert session.rows.gap > 0


def test_a_prompt_fed_in_chunks_goes_on_from_a_compressed_text(attachment: Attachment) -> None:
    session = compressed(attachment)
    twin = session.fork()[0]
    ids = torch.cat([prompt(LENGTH), prompt(24, seed=3)], dim=1)
    expected = generate(attachment, ids, **over(twin))
    found = generate(attachment, ids, **over(session), prefill_chunk_size=7)
    assert torch.equal(found, expected)


def test_changed_weights_make_compressed_pages_strangers(attachment: Attachment) -> None:
    session = compressed(attachment)
    with torch.no_grad():
        attachment.model.model.layers[0].self_attn.v_proj.weight.mul_(0.5)
    ids = torch.cat([prompt(LENGTH), prompt(3, seed=3)], dim=1)
    found = generate(attachment, ids, **over(session))
    assert torch.equal(found, generate(attachment, ids, use_cache=False))
    assert session.rows.gap == 0


def test_a_compressed_session_is_exported_without_its_pages(attachment: Attachment) -> None:
    session = compressed(attachment)
    with pytest.raises(UnsupportedError, match=r"compressed.*export\(pages=False\)"):
        session.export()
    other = attachment.cache.session("other")
    other.import_(session.export(pages=False))
    assert other.get_seq_length() == LENGTH
    assert session.rows.gap > 0


def test_resetting_and_dropping_give_the_pages_back(attachment: Attachment) -> None:
    session = compressed(attachment)
    session.reset()
    assert attachment.cache.get_stats()["mutable_pages"] == 0
    session = compressed(attachment)
    attachment.cache.drop_session("compressed")
    assert attachment.cache.get_stats()["mutable_pages"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kept": 0}, "kept=0: must be above 0"),
        ({"kept": 1.5}, "kept=1.5"),
        ({"kept": True}, "kept=True: must be a number"),
        ({"removed": 1.0}, "removed=1.0"),
        ({"removed": -0.1}, "removed=-0.1"),
        ({"kept": 0.5, "removed": 0.5}, "give one"),
        ({"kept": 0.5, "scorer": "guess"}, "scorer='guess': must be one of streaming, keydiff"),
        ({"kept": float("nan")}, "kept=nan"),
    ],
)
def test_what_is_no_share_is_refused(arguments: dict[str, Any], message: str) -> None:
    with attached(Route.MATERIALISED) as attachment:
        session = attachment.cache.session("a")
        feed(attachment, session, prompt(LENGTH))
        with pytest.raises(InvalidRequestError, match=message):
            session.compress(**arguments)
        assert session.rows.gap == 0


def test_an_empty_or_short_session_has_nothing_to_remove(attachment: Attachment) -> None:
    session = attachment.cache.session("a")
    with pytest.raises(InvalidRequestError, match="holds nothing yet"):
        session.compress(0.5)
    feed(attachment, session, prompt(36))
    assert session.compress(0.1) == 0
    assert session.rows.rows is not None
    assert not session.rows.rows.is_compressed


def test_a_session_at_rest_is_compressed_if_its_pages_are_still_there(attachment: Attachment) -> None:
    session = attachment.cache.session("a")
    generate(attachment, prompt(LENGTH), **over(session))
    assert session.compress(0.4) > 0
    other = attachment.cache.session("b")
    generate(attachment, prompt(LENGTH, seed=2), **over(other))
    attachment.cache.clear()
    with pytest.raises(InvalidRequestError, match="evicted: run it through"):
        other.compress(0.4)
    assert other.get_seq_length() == LENGTH + 5


@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize("family", ["qwen3", "gpt-neox", "gpt2"])
def test_other_families_are_compressed_the_same(route: Route, family: str) -> None:
    with attached(route, family) as attachment:
        session = compressed(attachment)
        model = make_model(family)
        past = gapped(model, prompt(LENGTH), 0.4, CompressionScorer.KEYDIFF)
        more = prompt(9, seed=3)
        expected = own_logits(model, past, more)
        torch.testing.assert_close(feed(attachment, session, more), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("route", list(Route))
def test_windows_are_refused_by_name(route: Route) -> None:
    with attached(route, "mistral-window") as attachment:
        session = attachment.cache.session("a")
        feed(attachment, session, prompt(LENGTH))
        with pytest.raises(UnsupportedError, match="sliding_window=24: a window is counted in tokens"):
            session.compress(0.5)
        assert session.get_seq_length() == LENGTH
    with pytest.raises(UnsupportedError, match="sliding_window=24"):
        attached(route, "mistral-window", use_compression=True, compression_ratio=0.5)


def test_what_promises_whole_texts_is_not_compressed() -> None:
    with pytest.raises(kvhybrid.ConfigError, match="contradicts reproducible=True"):
        KVCacheConfig(use_compression=True, reproducible=True)
    with attached(Route.PAGED, reproducible=True) as attachment:
        session = attachment.cache.session("a")
        feed(attachment, session, prompt(LENGTH))
        with pytest.raises(UnsupportedError, match="reproducible=True"):
            session.compress(0.5)
