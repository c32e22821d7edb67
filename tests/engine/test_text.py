"""Detokenizing while tokens come: pieces joined are the text, stop strings are found and never shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvhybrid.engine.own_tokenizer import OwnTokenizer
from kvhybrid.engine.text import Detokenizer, Piece


@pytest.fixture(scope="module")
def bytewise():
    """One token a byte, so that most characters come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def push_all(detokenizer, ids):
    pieces = []
    for i, token in enumerate(ids, 1):
        pieces.append(detokenizer.push(token, last=i == len(ids)))
        if detokenizer.stopped:
            break
    return pieces


texts = st.text(
    alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("abé€𝄞")), min_size=1, max_size=30
)


@given(text=texts)
def test_pieces_joined_are_the_text(bytewise, text):
    ids = bytewise(text)["input_ids"]
    pieces = push_all(Detokenizer(OwnTokenizer(bytewise)), ids)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(
    text=st.text(alphabet="abé", min_size=1, max_size=30),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_first_stop_string_ends_the_text(bytewise, text, stops):
    ids = bytewise(text)["input_ids"]
    detokenizer = Detokenizer(OwnTokenizer(bytewise), stops)
    shown = "".join(push_all(detokenizer, ids))
    # Found as soon as one is complete: the one that ends first.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert detokenizer.stopped is bool(ends)
    if not ends:
        assert shown == text
        assert detokenizer.num_kept_tokens() == len(ids)
        return
    assert shown == text[: min(begin for end, begin in ends if end == min(ends)[0])]
    kept = detokenizer.num_kept_tokens()
    assert bytewise.decode(ids[:kept]) == shown


def test_what_may_begin_a_stop_string_is_held_back(bytewise):
    detokenizer = Detokenizer(OwnTokenizer(bytewise), ["END"])
    ids = bytewise("the ENxEND")["input_ids"]
    assert push_all(detokenizer, ids) == ["t", "h", "e", " ", "", "", "ENx", "", "", ""]


def test_bytes_that_are_no_character_are_shown_at_once(bytewise):
    never = bytewise("€")["input_ids"][1]
    pieces = push_all(Detokenizer(OwnTokenizer(bytewise)), [never] * 40)
    assert pieces == ["\ufffd"] * 40


def test_without_a_tokenizer_there_is_no_text():
    detokenizer = Detokenizer(None)
    assert push_all(detokenizer, [1, 2, 3]) == ["", "", ""]
    assert detokenizer.num_kept_tokens() == 3


def test_a_piece_is_a_string_with_its_token():
    piece = Piece("ab", 7)
    assert (piece, piece.token_id, piece + "c", type(str(piece))) == ("ab", 7, "abc", str)
