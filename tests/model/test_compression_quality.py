"""Perplexity behind a compressed prefix: what costs nothing costs nothing, and windows add up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from families import make_model, prompt

from kvhybrid import InvalidRequestError, KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.compression_quality import WHOLE, Setting, measure_compression
from kvhybrid.model.routes import Route
from kvhybrid.presets import CompressionScorer

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=list(Route))
def attachment(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    model = make_model("llama")
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=4096, block_size=16, _env_file=None))
    with Attachment(model, cache, request.param, "test").install() as attachment:
        yield attachment
    assert cache.get_stats()["sequences"] == 0


def test_a_setting_that_removes_nothing_costs_nothing_and_the_rest_is_the_models_own(
    attachment: Attachment,
) -> None:
    ids = prompt(3 * 91)[0]
    settings = [Setting(CompressionScorer.KNORM, 1.0), Setting(CompressionScorer.KNORM, 0.2)]
    found = measure_compression(attachment, ids, settings, prefix=70, scored=20, batch_size=2)
    with torch.no_grad():
        logits = attachment.model(ids.view(3, 91)[:, :-1], use_cache=False).logits[:, 70:]
    chosen = torch.log_softmax(logits, -1).gather(-1, ids.view(3, 91)[:, 71:, None])
    assert found[WHOLE].perplexity == pytest.approx(math.exp(-float(chosen.mean())), rel=1e-4)
    assert found["knorm 1"].change == found["knorm 1"].divergence == 0.0
    assert found["knorm 0.2"].divergence > 1e-3
    ratio = found["knorm 0.2"].perplexity / found[WHOLE].perplexity
    assert found["knorm 0.2"].change == pytest.approx(ratio - 1, rel=1e-6)


def test_windows_are_counted_and_a_text_without_one_is_refused(attachment: Attachment) -> None:
    ticks: list[int] = []
    measure_compression(
        attachment,
        prompt(3 * 91)[0],
        [],
        prefix=70,
        scored=20,
        windows=2,
        batch_size=1,
        tick=lambda: ticks.append(1),
    )
    assert len(ticks) == 2
    with pytest.raises(InvalidRequestError, match="90 tokens, and a window takes 91"):
        measure_compression(attachment, prompt(90)[0], [], prefix=70, scored=20)
