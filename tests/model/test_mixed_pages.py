"""One text in pages of every kind, its beginning compressed: whatever is done with it reads what is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from families import make_model, prompt
from gapped import Gapped

from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvhybrid.model.transformers_cache import PagedSession

BLOCK = 16
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=list(Route))
def attachment(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    model = make_model("llama")
    config = KVCacheConfig(
        max_tokens=160 * BLOCK,
        block_size=BLOCK,
        use_quantization=True,
        quantization_bits=4,
        cache_strategy="paged",
    )
    with Attachment(model, KVCache.for_model(model, config), request.param, "test").install() as attachment:
        yield attachment
    attachment.cache.pool.check()


@torch.no_grad()
def feed(attachment: Attachment, past: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = attachment.model(ids, **over(past), use_cache=True).logits
    return logits


def kinds(attachment: Attachment, session: PagedSession) -> list[int]:
    """How many pages of each class the session stands on, full ones first."""
    storage, rows = attachment.cache.storage, session.rows.rows
    assert rows is not None
    pages = np.frombuffer(rows.sequences[0].block_table(), np.int32).tolist()
    return [sum(page < storage.num_full for page in pages)] + [
        sum(page in records for page in pages) for records in storage.records
    ]


def mixed(attachment: Attachment) -> tuple[PagedSession, torch.Tensor]:
    """Return a session of full, 8-bit and 4-bit pages behind a compressed front, and its text."""
    session: PagedSession = attachment.cache.session("mixed")
    text = prompt(260)
    feed(attachment, session, text)
    session.compress(0.4)
    for seed in range(1, 12):
        more = prompt(90, seed=seed)
        feed(attachment, session, more)
        text = torch.cat([text, more], dim=1)
        if all(kinds(attachment, session)):
            break
    assert all(kinds(attachment, session))
    assert session.rows.rows is not None
    assert session.rows.rows.is_compressed
    return session, text


def make_way(attachment: Attachment) -> None:
    """Have others' pages there, which may leave: of pages that two sessions hold none steps down."""
    attachment.model.generate(prompt(150, seed=50), max_new_tokens=1)


def told(session: PagedSession, columns: int) -> Gapped:
    """Return transformers' own cache with copies of what the session reads of its first columns."""
    past, stored = Gapped(), columns - session.rows.gap
    for index, layer in enumerate(session.layers):
        past.update(layer.keys[:, :, :stored], layer.values[:, :, :stored], index)
    past.gap = session.rows.gap
    return past


def feed_and_told(
    attachment: Attachment, session: PagedSession, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed ``ids``; return the logits, and the bare model's behind what was read: steps move pages first."""
    held = session.get_seq_length()
    session.rows.reader.forget(0)  # a mirror of it would be as exact as what was computed
    logits = feed(attachment, session, ids)
    return logits, feed(attachment, told(session, held), ids)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 7, 20])
def test_new_tokens_see_what_pages_of_every_kind_hold(attachment: Attachment, count: int) -> None:
    session, _ = mixed(attachment)
    close(*feed_and_told(attachment, session, prompt(count, seed=9)))


def test_a_whole_text_is_answered_from_what_is_left_of_it(attachment: Attachment) -> None:
    session, text = mixed(attachment)
    held, more = session.get_seq_length(), prompt(6, seed=8)
    session.rows.reader.forget(0)
    answer = attachment.model.generate(torch.cat([text, more], dim=1), **over(session), **GREEDY)
    assert session.cached_tokens == [held]
    past, ids, said = told(session, held), more, []
    for _ in range(GREEDY["max_new_tokens"]):
        ids = feed(attachment, past, ids)[:, -1:].argmax(-1)
        said.append(int(ids))
    assert answer[0, -len(said) :].tolist() == said


def test_forks_and_cuts_of_it_go_on_from_the_same_pages(attachment: Attachment) -> None:
    session, text = mixed(attachment)
    ids = prompt(4, seed=7)
    make_way(attachment)
    (fork,) = session.fork()
    close(*feed_and_told(attachment, fork, ids))
    close(*feed_and_told(attachment, session, ids))
    session.truncate(text.shape[1] - 3)
    close(*feed_and_told(attachment, session, ids))
    fork.close()
    assert attachment.cache.get_stats()["undone_compressions"] == 0


def test_beams_and_samples_start_from_it(attachment: Attachment) -> None:
    session, text = mixed(attachment)
    whole = torch.cat([text, prompt(3, seed=6)], dim=1)
    make_way(attachment)
    (fork,) = session.fork()
    beams = attachment.model.generate(whole, **over(fork), num_beams=3, **GREEDY)
    assert beams.shape == (1, whole.shape[1] + 5)
    fork.close()
    # Without an end token transformers 4 fails to look candidates up.
    assisted = {"do_sample": False, "prompt_lookup_num_tokens": 4, "eos_token_id": 2}
    for options in ({"do_sample": True}, assisted):
        torch.manual_seed(0)
        found = attachment.model.generate(whole, **over(session), max_new_tokens=5, **options)
        assert torch.equal(found[:, : whole.shape[1]], whole)
    assert attachment.cache.get_stats()["undone_compressions"] == 0


def test_compressed_once_more_it_reads_its_own_records(attachment: Attachment) -> None:
    session, text = mixed(attachment)
    session.compress(0.3)
    assert session.layers[0].keys.shape[2] < 0.4 * text.shape[1]
    close(*feed_and_told(attachment, session, prompt(5, seed=5)))
