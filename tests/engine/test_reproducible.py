"""``reproducible=True``: an answer depends on the request alone, not on what is cached or running."""

import anyio
import pytest
import torch
from families import make_model, prompt

from kvhybrid import KVCacheConfig, KVEngine
from kvhybrid.engine import intake
from kvhybrid.engine.lane import Lane

GRID = 16
NEW = 20


@pytest.fixture
def spoken(monkeypatch):
    """The logits that each request's tokens were chosen from, by its prompt."""
    found = {}
    choose = Lane._choose

    def record(self, active, logits, out):
        for row, chosen in zip(active, logits, strict=True):
            if row.pending == 0:
                key = tuple(row.span(0, row.num_prompt_tokens).tolist())
                found.setdefault(key, []).append(chosen.clone())
        choose(self, active, logits, out)

    monkeypatch.setattr(Lane, "_choose", record)
    monkeypatch.setattr(intake, "GRID", GRID)
    return found


def requests():
    """Prompts that part from a common one at any place."""
    stem = prompt(90)
    for seed, cut in enumerate((0, 5, 16, 31, 48, 60, 77, 90)):
        yield torch.cat([stem[:, :cut], prompt(3 + 7 * seed % 40, seed=seed + 1)], dim=1)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_tokens", [2048, 224], ids=["roomy", "preempted"])
async def test_logits_in_a_crowd_are_bit_equal_to_those_alone(spoken, tokenizer, dtype, max_tokens):
    model = make_model("llama", dtype=dtype)

    def engine(tokens):
        config = KVCacheConfig(max_tokens=tokens, block_size=8, reproducible=True)
        return KVEngine(model, config, tokenizer=tokenizer, prefill_tokens=24)

    async def ask(crowd, ids):
        await crowd.process_request({"token_ids": ids, "max_length": NEW})

    for ids in requests():
        async with engine(2048) as alone:
            await ask(alone, ids)
    expected = {key: torch.stack(logits) for key, logits in spoken.items()}
    for _ in range(2):
        spoken.clear()
        async with engine(max_tokens) as crowd:
            for _ in range(2):
                async with anyio.create_task_group() as tasks:
                    for ids in requests():
                        tasks.start_soon(ask, crowd, ids)
            assert (crowd.get_stats()["preemptions"] > 0) == (max_tokens == 224)
            stats = crowd.cache.get_stats()
            assert stats["cached_tokens"] > 0
            assert stats["cached_tokens"] % GRID == 0
        for key, logits in spoken.items():
            assert len(logits) == 2 * NEW
            for turn in (logits[:NEW], logits[NEW:]):
                assert torch.equal(torch.stack(turn), expected[key])


async def test_text_is_the_models_own(spoken, tokenizer, llama, own_words):
    config = KVCacheConfig(max_tokens=2048, block_size=8, reproducible=True)
    async with KVEngine(llama, config, tokenizer=tokenizer) as engine:
        for ids in requests():
            answer = await engine.process_request({"token_ids": ids, "max_length": NEW})
            assert answer["token_ids"] == own_words(llama, ids, NEW)
