"""Conversations: tokens stay where they are, each turn tokenises what is new, a failed turn never was."""

import anyio
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvhybrid import CapacityError, InvalidRequestError


def held(session):
    return np.frombuffer(session.tokens(), np.uint32).tolist()


@pytest.fixture
def encoded(tokenizer, monkeypatch):
    """Every text that is tokenised from here on."""
    from kvhybrid.engine.door import Door

    texts, encode = [], Door.encode

    def watched(self, text, **options):
        texts.append(text)
        return encode(self, text, **options)

    monkeypatch.setattr(Door, "encode", watched)
    return texts


async def test_turns_go_on_from_the_tokens_before(make_engine, llama, own_words, encoded, balanced):
    async with make_engine() as engine:
        session = engine.session("chat")
        assert engine.session("chat") is session
        first = await session.send("hello there", max_length=9)
        second = await session.send("and then?", max_length=9)
        third = await session.send([{"role": "user", "content": "at last"}], max_length=9)
        assert (session.num_turns, first["session_id"]) == (3, "chat")
        # All but the last token, which was chosen and never computed.
        assert second["cached_tokens"] == first["prompt_tokens"] + 8
        assert third["cached_tokens"] == second["prompt_tokens"] + 8
        tokens = held(session)
        assert len(tokens) == session.num_tokens == third["prompt_tokens"] + 9
        balanced(engine)
    assert encoded == [
        "<|user|>hello there<|end|><|assistant|>",
        "<|end|><|user|>and then?<|end|><|assistant|>",
        "<|end|><|user|>at last<|end|><|assistant|>",
    ]
    assert own_words(llama, tokens[:-9], 9) == tokens[-9:]
    assert third["token_ids"] == tokens[-9:]


async def test_an_end_token_is_not_said_twice(make_engine, llama, own_words, encoded, monkeypatch):
    async with make_engine() as engine:
        words = (
            await engine.process_request({"messages": [{"role": "user", "content": "a"}], "max_length": 9})
        )["token_ids"]
    end = words[4]
    monkeypatch.setattr(llama.generation_config, "eos_token_id", end)
    async with make_engine() as engine:
        session = engine.session()
        monkeypatch.setattr(engine._door, "end_text", lambda token: "<|end|>" if token == end else "")
        first = await session.send("a", max_length=9)
        assert first["finish_reason"] == "stop"
        await session.send("b", max_length=2)
    assert encoded[-1] == "<|user|>b<|end|><|assistant|>"


async def test_raw_text_goes_on_without_a_template(
    make_engine, llama, tokenizer, own_words, encoded, monkeypatch
):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    async with make_engine() as engine:
        session = engine.session()
        first = await session.send("once upon", max_length=5)
        assert first["text"] == tokenizer.decode(held(session)[-5:])
        second = await session.send(" a time", max_length=5)
        assert second["cached_tokens"] == first["prompt_tokens"] + 4
        assert tokenizer.decode(held(session)) == "once upon" + first["text"] + " a time" + second["text"]
        with pytest.raises(InvalidRequestError, match="chat template"):
            await session.send([{"role": "user", "content": "a"}])
    assert encoded == ["once upon", " a time"]


async def test_a_stop_string_is_not_kept(make_engine, tokenizer):
    async with make_engine() as engine:
        text = (await engine.session("a").send("tell me", max_length=20))["text"]
        session = engine.session("b")
        stop = text[6:9]
        answer = await session.send("tell me", max_length=20, stop=stop)
        assert answer["text"] == text[: text.index(stop)]
        kept = held(session)[answer["prompt_tokens"] :]
        assert tokenizer.decode(kept, skip_special_tokens=True) == answer["text"]


async def test_failed_cancelled_and_abandoned_turns_never_were(make_engine, llama, monkeypatch, balanced):
    async with make_engine(max_tokens=256) as engine:
        session = engine.session()
        await session.send("hello", max_length=5)
        before = held(session)

        def boom(*args, **kwargs):
            raise RuntimeError("boom")

        with monkeypatch.context() as patch:
            patch.setattr(llama, "forward", boom)
            with pytest.raises(RuntimeError, match="boom"):
                await session.send("again", max_length=5)
        with pytest.raises(InvalidRequestError, match="temperature=-1"):
            await session.send("again", temperature=-1)
        with pytest.raises(InvalidRequestError, match="tenant='x': a session has its own"):
            await session.send("again", tenant="x")
        with pytest.raises(InvalidRequestError, match="text=''"):
            await session.send("")
        with pytest.raises(CapacityError, match="budget of 256"):
            await session.send("again" * 100)
        with anyio.CancelScope() as scope:
            async with session.stream("again", max_length=100) as stream:
                await anext(stream)
                with pytest.raises(InvalidRequestError, match="turn 2 is still under way"):
                    await session.send("and")
                scope.cancel()
                await anext(stream)
        async for _ in session.stream("again", max_length=100):
            break
        assert (held(session), session.num_turns) == (before, 1)
        streamed = [piece async for piece in session.stream("again", max_length=5)]
        assert session.num_turns == 2
        assert held(session)[-5:] == [piece.token_id for piece in streamed]
        balanced(engine)


async def test_sessions_of_different_tenants_never_mix(make_engine):
    async with make_engine() as engine:
        mine, yours = engine.session("same", tenant="me"), engine.session("same", tenant="you")
        assert mine is not yours
        first = await mine.send("my secret", max_length=3)
        second = await yours.send("my secret", max_length=3)
        assert (first["cached"], second["cached"]) == (False, False)
        assert engine.drop_session("same", tenant="me")
        assert not engine.drop_session("same", tenant="me")
        assert engine.session("same", tenant="me").num_turns == 0
        assert engine.session("same", tenant="you").num_turns == 1
        with pytest.raises(InvalidRequestError, match="session_id=''"):
            engine.session("")


def marked(prepend):
    """A tokenizer that marks where words begin, and byte tokens for what it does not know."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "<0x0A>", *"▁abcdefhilmnoprtuxy?:.0"])}
    raw = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    return fast


SPECIAL = ["<|pad|>", "<|end|>"]
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '\nu: ' + m.content + '\na: ' }}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
async def test_text_that_goes_on_begins_no_word(make_engine, prepend):
    given = marked(prepend)
    async with make_engine(tokenizer=given) as engine:
        session = engine.session()
        first = await session.send("once upon", max_length=4)
        before = held(session)
        second = await session.send(" a time", max_length=4)
        added = held(session)[len(before) : second["prompt_tokens"]]
        assert given.convert_ids_to_tokens(added) == [*"▁a▁time"]
        assert first["prompt_tokens"] == len(given("once upon")["input_ids"])


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("prepend", ["first", "always", "never"])
async def test_what_a_template_adds_is_tokenised_as_in_the_whole_chat(
    make_engine, llama, monkeypatch, prepend, ended
):
    given = marked(prepend)
    given.chat_template = PLAIN
    end = given.convert_tokens_to_ids("<|end|>")
    async with make_engine(tokenizer=given) as engine:
        session = engine.session()
        first = await session.send("hello", max_length=4)
        if ended:
            monkeypatch.setattr(llama.generation_config, "eos_token_id", first["token_ids"][-1])
            monkeypatch.setattr(engine._door, "end_text", lambda token: "<|end|>")
            engine.drop_session()
            session = engine.session()
            assert (await session.send("hello", max_length=4))["finish_reason"] == "stop"
        before = held(session)
        second = await session.send("and?", max_length=4)
        added = held(session)[len(before) : second["prompt_tokens"]]
    whole = given("\nu: hello\na: x<|end|>\nu: and?\na: ", add_special_tokens=False)["input_ids"]
    tail = whole[whole.index(end) + ended :]
    assert added == tail
