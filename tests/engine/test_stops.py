"""Stops end answers where they would appear, in the text or among special tokens, and are never shown."""

import itertools

import numpy as np
import pytest
import torch
from families import make_model
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kvhybrid.engine.own_tokenizer import OwnTokenizer
from kvhybrid.engine.text import Detokenizer

SPECIAL = ["<|end|>", "<|x", "|>"]
BYTES = ["<0x0A>", "<0xC3>", "<0xA9>", "<0xFF>"]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def own_of(decoder, words):
    vocabulary = {word: i for i, word in enumerate(["?", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    if decoder is not None:
        raw.decoder = decoder
    raw.add_tokens(["<tool>"])
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return OwnTokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))


@pytest.fixture(scope="module")
def own():
    """One token a character, and special ones."""
    return own_of(decoders.Fuse(), [*"ab<|>xend "])


@pytest.fixture(scope="module")
def llama():
    return own_of(decoders.Sequence(LLAMA), ["▁a", "▁b", "b", "日", *BYTES])


def said(own, tokens, stops):
    """Return pieces up to the stop, whether there was one, and the tokens that are kept."""
    ids = own.tokenizer.convert_tokens_to_ids(tokens)
    detokenizer = Detokenizer(own, stops)
    pieces = []
    for i, token in enumerate(ids):
        pieces.append(detokenizer.push(token, last=i == len(ids) - 1))
        if detokenizer.stopped:
            break
    return pieces, detokenizer.stopped, tokens[: detokenizer.num_kept_tokens()]


def first_stop(units, stops):
    """Return after how many units the first stop is complete, and before which unit it begins, naively."""

    def begin(some):
        return any(text in stops for text in itertools.accumulate(some))

    for count in range(1, len(units) + 1):
        tails = [(start, units[start:count]) for start in range(count)]
        found = [start for start, tail in tails if begin(tail)]
        found += [
            start
            for start, tail in tails
            if tail[0] not in SPECIAL and begin(u for u in tail if u not in SPECIAL)
        ]
        if found:
            return count, min(found)
    return None


units = st.lists(st.sampled_from([*"ab<|>xend ", *SPECIAL]), min_size=1, max_size=12)
stops = st.lists(
    st.lists(st.sampled_from(["a", "b", "|", "end", *SPECIAL]), min_size=1, max_size=3).map("".join),
    min_size=1,
    max_size=3,
)


@given(units=units, stops=stops)
@example(units=[*"a", "<|end|>", *"b"], stops=["ab"])
@example(units=[*"a", "<|end|>", *"b"], stops=["a<|end|>b"])
@example(units=["<|end|>", "<|end|>", *"a"], stops=["<|end|><|end|>"])
@example(units=["<|end|>", *"a"], stops=["|", "end", ">a"])
@example(units=[*"<|x", "<|x", "|>"], stops=["<|x|>"])
@example(units=["a", "<|end|>", "<|x", "|>", "|>", "|>", "<|x"], stops=["a<|x"])
def test_the_first_stop_that_is_complete_ends_the_text(own, units, stops):
    pieces, stopped, kept = said(own, units, stops)
    expected = first_stop(units, stops)
    shown = own.decode(own.tokenizer.convert_tokens_to_ids(kept)) if kept else ""
    assert "".join(pieces) == shown
    if expected is None:
        assert (stopped, kept) == (False, units)
    else:
        assert (len(pieces), stopped, kept) == (expected[0], True, units[: expected[1]])


@pytest.mark.parametrize(
    ("tokens", "stop", "shown"),
    [
        ([*"ab", "<|end|>", *"a"], "<|end|>", ["a", "b", ""]),
        ([*"ab", "<|end|>", *"a"], "b<|end|>", ["a", "", ""]),
        ([*"ab", "<|end|>", *"ax"], "b<|end|>a", ["a", "", "", ""]),
        ([*"ab", "<|end|>", *"xa"], "b<|end|>a", ["a", "", "", "bx", "a"]),
        (["<|end|>", *"a"], "<|end|>", [""]),
        ([*"a", "<tool>", *"b"], "<tool>", ["a", ""]),
        ([*"a", "<tool>", *"b"], "tool", ["a", "<"]),
        ([*"a<|end|>b"], "<|end|>", ["a", *[""] * 7]),
        ([*"a", "<|end|>", *"b"], "|", ["a", "", "b"]),
        ([*"a", "<|end|>", *"b"], "ab", ["", "", ""]),
    ],
)
def test_a_stop_may_be_or_contain_a_special_or_added_token(own, tokens, stop, shown):
    assert said(own, tokens, [stop])[0] == shown


def test_special_tokens_in_a_row_are_bounded(own):
    detokenizer = Detokenizer(own, ["<|end|>b", "a<|end|>"])
    end = own.tokenizer.convert_tokens_to_ids("<|end|>")
    for _ in range(1000):
        assert detokenizer.push(end) == ""
    assert len(detokenizer._search._specials) <= 2 * len("a<|end|>") + 1
    assert not detokenizer.stopped
    detokenizer.push(own.tokenizer.convert_tokens_to_ids("b"))
    assert detokenizer.stopped
    assert detokenizer.num_kept_tokens() == 999


def test_a_stop_in_bytes_that_are_not_yet_certain_is_found_at_once(llama):
    pieces, stopped, kept = said(llama, ["▁a", "<0xC3>", "<0xA9>", "<0x0A>", "▁b"], ["\n"])
    assert (pieces, stopped, kept) == (["a", "", "", "é"], True, ["▁a", "<0xC3>", "<0xA9>"])
    assert said(llama, ["▁a", "<0xC3>", "<0xA9>", "日"], ["é"])[0] == ["a", "", ""]
    assert said(llama, ["▁a", "<0xC3>", "<0xFF>", "<0x0A>", "日"], ["\n"])[1] is False


def test_a_special_token_behind_half_a_character_ends_the_text_there(llama):
    pieces, stopped, kept = said(llama, ["▁a", "<0xC3>", "<|end|>", "<0xA9>"], ["<|end|>"])
    assert (pieces, stopped, kept) == (["a", "", "\ufffd"], True, ["▁a", "<0xC3>"])
    assert "".join(said(llama, ["▁a", "<0xC3>", "<|x", "<0xA9>"], ["<|end|>"])[0]) == "aé"


@pytest.mark.parametrize(
    ("decoder", "words"),
    [(decoders.WordPiece(), ["a", "b"]), (decoders.BPEDecoder(), ["a</w>", "b</w>"]), (None, ["a", "b"])],
)
def test_a_stop_is_found_with_the_spaces_that_a_decoder_puts(decoder, words):
    own = own_of(decoder, words)
    a, b = words
    for stop in ("<|end|>", "a<|end|>", "<|end|> b"):
        pieces, stopped, _ = said(own, [a, "<|end|>", b, a], [stop])
        assert (stopped, "".join(pieces)) == (True, "" if stop.startswith("a") else "a")
    assert said(own, [a, "<|end|>", b], ["a <|end|>"])[1]


@pytest.mark.parametrize("one", [True, False])
async def test_an_engine_stops_at_a_special_token_that_is_no_end_token(
    make_engine, llama_saying, tokenizer, one
):
    model, ids, words, at = llama_saying
    async with make_engine(model) as engine:
        whole = await engine.process_request({"token_ids": ids, "max_length": len(words)})
        assert whole["token_ids"] == words
        request = {"token_ids": ids, "max_length": 12, "stop": "<|bos|>" if one else ["never", "<|bos|>"]}
        answer = await engine.process_request(request)
        assert (answer["finish_reason"], answer["completion_tokens"]) == ("stop", at + 1)
        assert answer["text"] == tokenizer.decode(words[:at], skip_special_tokens=True)
        streamed = [piece async for piece in engine.stream(request)]
        assert "".join(streamed) == answer["text"]


async def test_a_session_goes_on_from_before_a_special_stop(
    make_engine, llama_saying, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    model, ids, words, at = llama_saying
    async with make_engine(model) as engine:
        session = engine.session()
        answer = await session.send(tokenizer.decode(ids), max_length=12, stop="<|bos|>")
        assert answer["finish_reason"] == "stop"
        assert np.frombuffer(session.tokens(), np.uint32).tolist() == ids + words[:at]


@pytest.fixture
def llama_saying(tokenizer, own_words):
    """A model that says ``<|bos|>`` in the middle: the model, a prompt, what it says, and where."""
    model = make_model("llama")
    ids, bos = tokenizer("hello")["input_ids"], tokenizer.convert_tokens_to_ids("<|bos|>")
    for victim in itertools.islice(dict.fromkeys(own_words(model, ids, 8)[3:]), 8):
        head = model.lm_head.weight
        with torch.no_grad():
            head[[victim, bos]] = head[[bos, victim]]
        words = own_words(model, ids, 12)
        if bos in words[2:]:
            return model, ids, words, words.index(bos)
        with torch.no_grad():
            head[[victim, bos]] = head[[bos, victim]]
    raise AssertionError("no such model")
