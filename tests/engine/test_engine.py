"""One request and many: the answers are the model's own, the second time from the cache."""

import json

import anyio
import pytest
from families import make_model, prompt

from kvhybrid import ClosedError, ConfigError, KVEngine, LayoutError, UnsupportedError


async def test_second_time_is_cached_and_says_the_same(make_engine, llama, tokenizer, own_words, balanced):
    text = "what is said twice is said once"
    expected = own_words(llama, tokenizer(text)["input_ids"], 12)
    async with make_engine() as engine:
        first = await engine.process_request({"text": text, "max_length": 12})
        again = await engine.process_request({"text": text, "max_length": 12})
    assert (first["cached"], first["cached_tokens"]) == (False, 0)
    assert (again["cached"], again["cached_tokens"]) == (True, len(text) - 1)
    assert first["token_ids"] == again["token_ids"] == expected
    assert first["text"] == again["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    balanced(engine)


async def test_prompts_shorter_than_a_page_are_cached_too(make_engine):
    async with make_engine(block_size=64) as engine:
        for cached in (0, 4):
            answer = await engine.process_request({"text": "hello", "max_length": 3})
            assert answer["cached_tokens"] == cached


async def test_answer_is_plain_data_with_everything_promised(make_engine):
    async with make_engine() as engine:
        answer = await engine.process_request({"text": "hello", "max_length": 3, "session_id": "s"})
    assert json.loads(json.dumps(answer)) == answer
    assert (answer["prompt_tokens"], answer["completion_tokens"], answer["session_id"]) == (5, 3, "s")
    assert answer["finish_reason"] == "length"
    assert 0 < answer["time_to_first_token_ms"] <= answer["latency_ms"]


@pytest.mark.parametrize(
    ("family", "implementation", "packing"),
    [
        ("llama", "sdpa", "ragged"),
        ("gpt2", "sdpa", "ragged"),
        ("gpt-neox", "sdpa", "ragged"),
        ("mistral-window", "sdpa", "ragged"),
        ("llama", "eager", "rowwise"),
        ("gpt2", "eager", "rowwise"),
        ("mistral-window", "eager", "rowwise"),
    ],
)
async def test_concurrent_requests_say_what_generate_says(
    make_engine, own_words, balanced, family, implementation, packing
):
    model = make_model(family)
    model.set_attn_implementation(implementation)
    shared = prompt(43)[0].tolist()
    prompts = [shared[: 5 + 9 * i] + prompt(3 + 5 * i, seed=i)[0].tolist() for i in range(6)]
    prompts += [shared, shared, shared[:17], [7]]
    expected = [own_words(model, ids, 5 + i) for i, ids in enumerate(prompts)]
    found = [None] * len(prompts)

    async def ask(index):
        request = {"token_ids": prompts[index], "max_length": 5 + index}
        found[index] = (await engine.process_request(request))["token_ids"]

    engine = make_engine(model, num_workers=4, prefill_tokens=32)
    assert str(engine.packing) == packing
    async with engine, anyio.create_task_group() as tasks:
        for index in range(len(prompts)):
            tasks.start_soon(ask, index)
    assert found == expected
    assert model.config._attn_implementation == implementation
    balanced(engine)


@pytest.mark.parametrize("prefill_tokens", [1, 7, 8, 64])
async def test_prefill_in_chunks_changes_nothing(make_engine, llama, own_words, prefill_tokens):
    ids = prompt(61)[0].tolist()
    expected = own_words(llama, ids, 6)
    async with make_engine(prefill_tokens=prefill_tokens) as engine:
        answer = await engine.process_request({"token_ids": ids, "max_length": 6})
        steps = engine.get_stats()["steps"]
    assert answer["token_ids"] == expected
    assert steps == -(-61 // prefill_tokens) + 5


async def test_embedded_model_is_the_default():
    async with KVEngine() as engine:
        answer = await engine.process_request(
            {"messages": [{"role": "user", "content": "hi"}], "max_length": 4}
        )
        assert answer["text"] == engine.tokenizer.decode(answer["token_ids"], skip_special_tokens=True)


async def test_end_token_ends_the_answer(make_engine, llama, own_words):
    ids = prompt(20)[0].tolist()
    words = own_words(llama, ids, 12)
    end = words[7]
    llama.generation_config.eos_token_id = [end]
    try:
        async with make_engine() as engine:
            answer = await engine.process_request({"token_ids": ids, "max_length": 12})
    finally:
        llama.generation_config.eos_token_id = None
    assert answer["token_ids"] == words[: words.index(end) + 1]
    assert answer["finish_reason"] == "stop"


async def test_stop_string_ends_the_answer_before_it(make_engine, llama, tokenizer, own_words):
    words = tokenizer.decode(
        own_words(llama, tokenizer("stop me")["input_ids"], 16), skip_special_tokens=True
    )
    stop = words[6:9]
    async with make_engine() as engine:
        answer = await engine.process_request({"text": "stop me", "max_length": 16, "stop": ["never", stop]})
    assert answer["text"] == words[: words.index(stop)]
    assert answer["finish_reason"] == "stop"


async def test_draws_depend_on_the_seed_and_on_no_neighbour(make_engine):
    request = {"text": "roll the dice", "max_length": 10, "temperature": 2.0, "top_p": 0.9}
    async with make_engine() as engine:
        alone = await engine.process_request({**request, "seed": 5})
        found = {}

        async def ask(seed):
            found[seed] = await engine.process_request({**request, "seed": seed})

        async with anyio.create_task_group() as tasks:
            for seed in range(8):
                tasks.start_soon(ask, seed)
    assert found[5]["text"] == alone["text"]
    assert len({answer["text"] for answer in found.values()}) > 4


async def test_default_length_is_what_the_budget_has_room_for(make_engine):
    async with make_engine(max_tokens=64) as engine:
        answer = await engine.process_request({"token_ids": prompt(40)[0]})
    assert answer["completion_tokens"] == 24


async def test_tenants_never_share_pages(make_engine):
    async with make_engine() as engine:
        for tenant, cached in (("a", False), ("b", False), ("a", True)):
            answer = await engine.process_request({"text": "a secret", "max_length": 2, "tenant": tenant})
            assert answer["cached"] is cached


async def test_health_and_statistics_are_mappings_of_plain_data(make_engine):
    async with make_engine() as engine:
        await engine.process_request({"text": "hello", "max_length": 4})
        health, stats = await engine.get_health_status(), engine.get_stats()
    assert health
    assert set(health["checks"]) == {"lane", "queue", "cache"}
    assert json.loads(json.dumps(health)) == health
    assert json.loads(json.dumps(stats)) == stats
    expected = {"requests": 1, "completed": 1, "running": 0, "queued": 0, "failed": 0, "cancelled": 0}
    assert stats.items() >= {**expected, "generated_tokens": 4, "computed_tokens": 8, "steps": 4}.items()
    assert 0 < stats["latency_p50_ms"] == stats["latency_p99_ms"]


async def test_engine_outside_its_block_is_closed(make_engine):
    engine = make_engine()
    for opened in (False, True):
        for call in (
            engine.get_stats,
            engine.session,
            lambda: engine.stream({"text": "a"}),
            engine.drop_session,
        ):
            with pytest.raises(ClosedError):
                call()
        for call in (lambda: engine.process_request({"text": "a"}), engine.get_health_status):
            with pytest.raises(ClosedError):
                await call()
        if not opened:
            async with engine:
                session = engine.session()
    with pytest.raises(ClosedError):
        await session.send("a")
    with pytest.raises(ClosedError, match="entered once"):
        async with engine:
            pass


async def test_leaving_ends_what_runs_and_passes_the_callers_error_on(make_engine, balanced):
    engine, ended = make_engine(), []

    async def ask():
        try:
            await engine.process_request({"text": "long", "max_length": 400})
        except ClosedError:
            ended.append(True)

    async with anyio.create_task_group() as tasks:
        with pytest.raises(ZeroDivisionError):
            async with engine:
                tasks.start_soon(ask)
                async for _ in engine.stream({"text": "other", "max_length": 5}):
                    pass
                raise ZeroDivisionError
    assert ended == [True]
    balanced(engine)


async def test_engine_is_cancelled_with_its_surroundings(make_engine, balanced):
    engine = make_engine()
    with anyio.CancelScope() as scope:
        async with engine:
            async for _ in engine.stream({"text": "other", "max_length": 50}):
                scope.cancel()
    assert scope.cancelled_caught
    balanced(engine)


def test_model_without_attention_is_refused_at_construction():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises((LayoutError, UnsupportedError), match=r"attention|recurrent"):
        KVEngine(model)


def test_what_is_no_model_is_refused(tmp_path):
    import torch

    with pytest.raises(UnsupportedError, match="Linear"):
        KVEngine(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no readable local"):
        KVEngine(tmp_path)


@pytest.mark.parametrize("name", ["max_queued", "prefill_tokens"])
def test_settings_out_of_range_are_refused(make_engine, name):
    for value in (0, True, 1.5):
        with pytest.raises(ConfigError, match=f"{name}={value!r}"):
            make_engine(**{name: value})
