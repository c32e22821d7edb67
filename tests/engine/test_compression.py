"""Conversations whose old context is compressed: what attached sessions say, in steps of many rows."""

import anyio
import numpy as np
import pytest
import torch
from families import make_model, prompt

import kvhybrid
from kvhybrid import ConfigError, KVCacheConfig, KVEngine, UnsupportedError
from kvhybrid.cache.compress.selection import kept_tokens
from kvhybrid.engine.held import Held
from kvhybrid.model.runner import Packing
from kvhybrid.model.versions import over

BLOCK = 8
KEPT = 0.3
LONG = "the quick brown fox jumps over the lazy dog; " * 3
TURNS = ((LONG, 7), ("and then?", 5), (LONG[:40], 6), ("at last", 4))


@pytest.fixture(scope="module", params=list(Packing))
def model(request):
    made = make_model("llama")
    if request.param is Packing.ROWWISE:
        made.set_attn_implementation("eager")
    return made


@pytest.fixture
def make(model, tokenizer):
    def make(max_tokens=4096, kept=KEPT, **fields):
        config = KVCacheConfig(
            max_tokens=max_tokens, block_size=BLOCK, use_compression=True, compression_ratio=kept, **fields
        )
        return KVEngine(model, config, tokenizer=tokenizer)

    return make


def config_of(max_tokens=4096, **fields):
    fields = {"use_compression": True, "compression_ratio": KEPT, **fields}
    return KVCacheConfig(max_tokens=max_tokens, block_size=BLOCK, **fields)


def tokens_of(session):
    return np.frombuffer(session.tokens(), np.uint32).tolist()


def attached_turns(model, prompts, config=None):
    """What an attached session of the same configuration answers to these prompts, one after the other."""
    answers = []
    with kvhybrid.attach(model, config=config or config_of()) as attachment:
        session = attachment.cache.session("reference")
        for tokens, count in prompts:
            ids = torch.tensor([tokens])
            text = model.generate(ids, **over(session), max_new_tokens=count, do_sample=False)
            answers.append(text[0, ids.shape[1] :].tolist())
    return answers


async def talk(engine, name, turns=TURNS):
    """Hold a conversation; return each turn's prompt, and its answer's tokens."""
    session, prompts, answers = engine.session(name), [], []
    for text, count in turns:
        answer = await session.send(text, max_length=count)
        prompts.append((tokens_of(session)[: answer["prompt_tokens"]], count))
        answers.append(answer)
    return prompts, answers


def held_pages(engine):
    pool = engine.cache.pool
    return pool.num_pages - pool.num_free - pool.num_evictable


async def test_turns_are_those_of_an_attached_session(make, model, balanced):
    async with make() as engine:
        prompts, answers = await talk(engine, "a")
        stats = engine.get_stats()
        assert stats["compressions"] == len(TURNS)
        total = len(tokens_of(engine.session("a"))) - 1  # the last token was chosen and never computed
        assert stats["removed_tokens"] == total - kept_tokens(total, KEPT)
        assert held_pages(engine) == -(-kept_tokens(total, KEPT) // BLOCK)
        # All of a turn before was there, but for the token that was never computed.
        for (ids, count), answer, (following, _) in zip(prompts[:-1], answers[1:], prompts[1:], strict=True):
            assert answer["cached_tokens"] == len(ids) + count - 1 < len(following)
    balanced(engine)
    assert [answer["token_ids"] for answer in answers] == attached_turns(model, prompts)


async def test_it_is_not_what_the_whole_text_would_say(make, own_words, model):
    async with make() as engine:
        prompts, answers = await talk(engine, "a")
    whole = [own_words(model, ids, count) for ids, count in prompts]
    found = [answer["token_ids"] for answer in answers]
    assert found[0] == whole[0]
    assert found != whole


async def test_rows_with_gaps_of_their_own_run_beside_whole_ones(make, model, own_words, balanced):
    talks = {
        "a": TURNS,
        "b": ((LONG * 2, 9), ("b", 3), (LONG, 8)),
        "c": (("short", 12), (LONG, 2), ("c", 5), ("more", 6)),
    }
    found, plain = {}, []
    async with make() as engine:

        async def hold(name):
            found[name] = await talk(engine, name, talks[name])

        async def ask(seed):
            ids = prompt(50 + seed, seed=seed)[0].tolist()
            answer = await engine.process_request({"token_ids": ids, "max_length": 14})
            plain.append((ids, answer["token_ids"]))

        async with anyio.create_task_group() as tasks:
            for name in talks:
                tasks.start_soon(hold, name)
            for seed in range(3):
                tasks.start_soon(ask, seed)
    balanced(engine)
    for prompts, answers in found.values():
        assert [answer["token_ids"] for answer in answers] == attached_turns(model, prompts)
    for ids, words in plain:
        assert words == own_words(model, ids, 14)


async def test_requests_are_whole_and_find_what_a_conversation_computed_whole(make, model, own_words):
    async with make() as engine:
        prompts, answers = await talk(engine, "a", TURNS[:1])
        ids = prompts[0][0] + answers[0]["token_ids"][:-1]
        again = await engine.process_request({"token_ids": ids, "max_length": 5, "session_id": "a"})
        assert again["token_ids"] == own_words(model, ids, 5)
        assert again["cached_tokens"] == len(ids) - 1
        compressions = engine.get_stats()["compressions"]
        # Behind a compressed beginning K and V are others, and nobody else may find them.
        prompts, answers = await talk(engine, "a", TURNS[:2])
        ids = prompts[1][0] + answers[1]["token_ids"][:-1]
        stranger = await engine.process_request({"token_ids": ids, "max_length": 5})
        assert stranger["token_ids"] == own_words(model, ids, 5)
        assert stranger["cached_tokens"] <= len(prompts[0][0]) + len(answers[0]["token_ids"]) + BLOCK
        assert engine.get_stats()["compressions"] > compressions == 1


async def test_a_short_conversation_loses_nothing(make, model, own_words):
    async with make() as engine:
        prompts, answers = await talk(engine, "a", (("hi", 3), ("ho", 3)))
        assert engine.get_stats()["compressions"] == 0
        assert held_pages(engine) == 0
    for (ids, count), answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == own_words(model, ids, count)


async def test_without_room_for_others_a_conversation_is_whole_again(make, model, own_words, balanced):
    async with make(max_tokens=64 * BLOCK) as engine:
        await talk(engine, "a", TURNS[:1])
        assert held_pages(engine) > 0
        await engine.process_request({"token_ids": prompt(62 * BLOCK)[0].tolist(), "max_length": 9})
        assert held_pages(engine) == 0
        assert engine.get_stats()["undone_compressions"] == 1
        session = engine.session("a")
        answer = await session.send("and then?", max_length=6)
        ids = tokens_of(session)[: answer["prompt_tokens"]]
        assert answer["token_ids"] == own_words(model, ids, 6)
        assert held_pages(engine) > 0
    balanced(engine)


async def test_a_text_without_room_for_both_stays_whole(make, model, own_words, balanced):
    # 18 pages of text, and the 8 that would be left of it do not fit beside them.
    async with make(max_tokens=22 * BLOCK) as engine:
        prompts, answers = await talk(engine, "a", ((LONG[:-8], 7), ("?", 4)))
        assert engine.get_stats()["skipped_compressions"] == 2
        assert engine.get_stats()["compressions"] == 0
    balanced(engine)
    for (ids, count), answer in zip(prompts, answers, strict=True):
        assert answer["token_ids"] == own_words(model, ids, count)


async def test_a_cancelled_turn_brings_back_what_it_took(make, model, balanced):
    async with make() as engine:
        prompts, answers = await talk(engine, "a", TURNS[:1])
        before = held_pages(engine)
        session = engine.session("a")
        async with session.stream("never mind", max_length=40) as pieces:
            async for _ in pieces:
                break
        assert session.num_turns == 1
        assert held_pages(engine) >= before
        more, further = await talk(engine, "a", TURNS[1:])
        # And the opening of the turn that never was, which is that of every turn.
        assert further[0]["cached_tokens"] >= len(prompts[0][0]) + 6
    balanced(engine)
    found = [answer["token_ids"] for answer in answers + further]
    assert found == attached_turns(model, prompts + more)


async def test_a_failed_step_loses_no_compressed_text(make, model, monkeypatch, balanced):
    async with make() as engine:
        prompts, answers = await talk(engine, "a", TURNS[:1])
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", fail)
            with pytest.raises(RuntimeError, match="not today"):
                await engine.session("a").send("again", max_length=3)
        more, further = await talk(engine, "a", TURNS[1:])
    balanced(engine)
    found = [answer["token_ids"] for answer in answers + further]
    assert found == attached_turns(model, prompts + more)


def fail(*args, **kwargs):
    raise RuntimeError("not today")


async def test_an_answer_is_given_though_its_text_cannot_be_scored(make, monkeypatch, caplog, balanced):
    monkeypatch.setattr(Held, "_score", fail)
    async with make() as engine:
        _, answers = await talk(engine, "a", TURNS[:2])
        assert [answer["completion_tokens"] for answer in answers] == [7, 5]
        assert engine.get_stats()["skipped_compressions"] == 2
        balanced(engine)
    assert {record.getMessage() for record in caplog.records if record.exc_info} == {
        "a conversation could not be compressed"
    }


async def test_dropped_conversations_give_their_pages_back(make, balanced):
    async with make() as engine:
        await talk(engine, "a", TURNS[:1])
        dropped = engine.session("a")
        assert engine.drop_session("a")
        balanced(engine)
        # Whoever kept it goes on, from a whole text and to one.
        await dropped.send("still there?", max_length=3)
        balanced(engine)
        await talk(engine, "a", TURNS[:1])
        assert held_pages(engine) > 0
    balanced(engine)


async def test_dropped_while_its_turn_runs(make, model, gate, balanced):
    async with make() as engine:
        await talk(engine, "a", TURNS[:1])
        held = gate(model)
        session = engine.session("a")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(session.send, "and then?")
            await held.reached()
            assert engine.drop_session("a")
            held.open()
        balanced(engine)


@pytest.mark.parametrize("pages", [40, 52])
async def test_under_pressure_all_turns_end_within_the_budget(make, pages, balanced):
    async with make(max_tokens=pages * BLOCK, num_workers=8) as engine:
        done = []

        async def hold(name):
            done.extend((await talk(engine, name, ((LONG, 6), ("and?", 20), (LONG[:60], 6))))[1])

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for index in range(6):
                    tasks.start_soon(hold, str(index))
        assert [answer["completion_tokens"] for answer in done].count(20) == 6
        stats = engine.get_stats()
        assert stats["used_bytes"] <= stats["capacity_bytes"]
        assert stats["undone_compressions"] + stats["skipped_compressions"] > 0
    balanced(engine)


async def test_a_prompt_that_changes_within_the_front_is_computed_whole(make, model, own_words):
    async with make() as engine:
        await talk(engine, "a", TURNS[:1])
        session = engine.session("a")
        session._tokens.truncate(40)
        answer = await session.send("else", max_length=5)
        ids = tokens_of(session)[: answer["prompt_tokens"]]
        assert answer["token_ids"] == own_words(model, ids, 5)
        assert answer["cached_tokens"] >= 40 - 40 % BLOCK  # of the whole text's pages


def test_what_cannot_be_compressed_is_refused_when_the_engine_is_built(tokenizer):
    with pytest.raises(ConfigError, match=r"compression_scorer='snapkv'.*an engine does not keep.*keydiff"):
        KVEngine(config=config_of(compression_scorer="snapkv"))
    with pytest.raises(UnsupportedError, match="sliding_window=24"):
        KVEngine(make_model("mistral-window"), config_of(), tokenizer=tokenizer)


async def test_quantized_and_compressed_multiply(model, tokenizer, balanced):
    config = KVCacheConfig(
        max_tokens=1024,
        block_size=16,
        use_compression=True,
        compression_ratio=KEPT,
        use_quantization=True,
        quantization_bits=8,
    )
    async with KVEngine(model, config, tokenizer=tokenizer) as engine:
        for index in range(6):
            _, answers = await talk(engine, str(index), TURNS)
            assert [answer["completion_tokens"] for answer in answers] == [7, 5, 6, 4]
        stats = engine.get_stats()
        assert stats["quantized_tokens"] > 0
        assert stats["compressions"] >= 6
        assert stats["used_bytes"] <= stats["capacity_bytes"]
    balanced(engine)


@pytest.mark.parametrize("preset", ["balanced", "high_traffic", "memory_efficient", "memory_constrained"])
async def test_presets_that_compress_serve_conversations(preset):
    async with KVEngine(config=KVCacheConfig.preset(preset, enable_persistence=False)) as engine:
        _, answers = await talk(engine, "a", TURNS[:2])
        assert engine.get_stats()["compressions"] == 2
        assert answers[1]["cached_tokens"] > answers[0]["prompt_tokens"]
