"""Under every decoder of the tokenizers library, pieces joined are what the tokenizer makes of all tokens."""

import itertools

import pytest
from families import VOCAB
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from kvhybrid.engine.decoding.answers import ByToken, Windows
from kvhybrid.engine.own_tokenizer import OwnTokenizer
from kvhybrid.engine.text import Detokenizer

SPECIAL = ["<s>", "</s>", "<|sep|>"]
ADDED = ["<tool>", "é<x>", "\ufffd"]
WORDS = [
    "a",
    "the",
    "n't",
    "'s",
    "'",
    ".",
    ",",
    "do",
    "not",
    " do not",
    "of course",
    "\ufffd",
    "\u0301",
    "😀",
    "日",
]
BYTES = [f"<0x{byte:02X}>" for byte in (*"é€😀\n".encode(), 0xFF, 0x80)] + ["<0x+A>", "<0xG0>", "<0xé>"]
BYTE_CHARACTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


class Reversed:
    """A decoder in Python: only the whole list tells the text."""

    def decode_chain(self, tokens):
        return tokens


def spread(*forms):
    return [form.format(word) for word in WORDS for form in forms]


BYTE_LEVEL = [*BYTE_CHARACTERS, "Ġthe", "âĤ", "Ġ😀"]
META = [*spread("{}", "▁{}"), "▁", "▁▁", *BYTES]
KINDS = {
    "byte level": (decoders.ByteLevel(), BYTE_LEVEL),
    "Metaspace": (decoders.Metaspace(), META),
    "Metaspace, first kept": (decoders.Metaspace(prepend_scheme="never"), META),
    "WordPiece": (decoders.WordPiece(), [*spread("{}", "##{}"), "##", "####a"]),
    "WordPiece, as it is": (decoders.WordPiece(prefix="@@", cleanup=False), spread("{}", "@@{}")),
    "byte fallback": (decoders.ByteFallback(), META),
    "suffixes": (decoders.BPEDecoder(), [*spread("{}", "{}</w>", "{}</w>a</w>"), "</w>"]),
    "sounds": (decoders.CTC(), [*"abc|", "<pad>", "|a", "' s", " '", " do not"]),
    "sounds, as they are": (decoders.CTC(pad_token="_", word_delimiter_token="/", cleanup=False), [*"ab_/"]),
    "joined": (decoders.Fuse(), spread("{}", " {}")),
    "stripped": (decoders.Strip(" ", 2, 0), spread("{}", "   {}")),
    "stripped behind": (
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 2)]),
        spread("{}", "{}   "),
    ),
    "replaced": (decoders.Replace("a", "the"), spread("{}a")),
    "replaced by pattern": (decoders.Replace(Regex("[a-m]+ ?"), "·"), spread("{} a")),
    "as Llama's": (decoders.Sequence(LLAMA), META),
    "as Gemma's": (decoders.Sequence(LLAMA[:3]), META),
    "bytes, then spaces": (decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), META),
    "text replaced": (
        decoders.Sequence([decoders.Fuse(), decoders.Replace("▁t", " T"), decoders.Replace(" T", "~")]),
        META,
    ),
    "text of words": (
        decoders.Sequence([decoders.Fuse(), decoders.WordPiece(), decoders.CTC(), decoders.BPEDecoder("he")]),
        spread("{}", " {}", "{} "),
    ),
    "text with marks": (decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]), META),
    "bytes, then stripped": (
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 1, 1)]),
        BYTE_LEVEL,
    ),
    "none": (None, spread("{}")),
}
# The library itself fails on texts that are shorter than what is stripped from their end.
BEGINNINGS = {"stripped behind": ["the"], "bytes, then stripped": ["Ġthe"]}
# Neither written down nor by parts: decoded by windows.
WINDOWS = {
    "in Python": (lambda: decoders.Decoder.custom(Reversed()), spread("{}", " {}")),
    "text by pattern": (
        lambda: decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("[▁_]"), " ")]),
        META,
    ),
}


def tokenizer_of(decoder, words, **options):
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["?", *words]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    raw.add_tokens(ADDED)
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    found = PreTrainedTokenizerFast(tokenizer_object=raw, **options)
    if decoder is not None:  # afterwards, because one in Python cannot be copied
        found.backend_tokenizer.decoder = decoder
    return found


def pieces_of(own, ids):
    detokenizer = Detokenizer(own)
    return [detokenizer.push(token, last=i == len(ids) - 1) for i, token in enumerate(ids)]


OWN = {
    (name, cleans): OwnTokenizer(tokenizer_of(*parts, clean_up_tokenization_spaces=cleans))
    for name, parts in KINDS.items()
    for cleans in (False, True)
}


@pytest.mark.parametrize("cleans", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text_of_all_tokens(kind, cleans):
    own = OWN[kind, cleans]
    assert isinstance(own.decoding(), ByToken)
    size = len(own.tokenizer)
    special = sorted(own.special_tokens)

    # One past the vocabulary: models have embeddings for more tokens than tokenizers know.
    @given(st.lists(st.one_of(st.integers(0, size), st.sampled_from(special)), min_size=1, max_size=24))
    @example([special[0]])
    @example([special[0], 1, special[1], special[1], 2, 3, special[0]])
    def check(ids):
        ids = own.tokenizer.convert_tokens_to_ids(BEGINNINGS.get(kind, [])) + ids
        assert "".join(pieces_of(own, ids)) == own.decode(ids)

    check()


@pytest.mark.parametrize("kind", WINDOWS)
@given(data=st.data())
def test_a_decoder_that_is_not_known_is_asked_again(kind, data):
    make, words = WINDOWS[kind]
    own = OwnTokenizer(tokenizer_of(make(), words))
    assert isinstance(own.decoding(), Windows)
    ids = data.draw(st.lists(st.integers(0, len(own.tokenizer) - 1), min_size=1, max_size=24))
    # What looks unfinished for long is given out as it is.
    if not any("\ufffd" in word for word in own.tokenizer.convert_ids_to_tokens(ids)):
        assert "".join(pieces_of(own, ids)) == own.decode(ids)


@pytest.mark.parametrize("kind", ["byte level", "as Llama's", "WordPiece", "none"])
def test_a_special_token_in_the_middle_costs_nothing(kind):
    own = OWN[kind, False]
    plain = list(range(3, 40, 3))
    end, sep = (own.tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|sep|>"))
    text = "".join(pieces_of(own, plain))
    for at in range(len(plain) + 1):
        for between in ([sep], [end, sep]):
            assert "".join(pieces_of(own, plain[:at] + between + plain[at:])) == text


def test_pieces_come_as_soon_as_they_are_certain():
    own = OWN["as Llama's", False]
    ids = own.tokenizer.convert_tokens_to_ids(["▁the", "▁a", "<0xC3>", "<0xA9>", "▁a", "<s>", "▁a"])
    assert pieces_of(own, ids) == ["the", " a", "", "", "é a", "", " a"]
    own = OWN["byte level", False]
    ids = own.tokenizer.convert_tokens_to_ids(["a", "Ã", "©", "ÿ", "a"])
    assert pieces_of(own, ids) == ["a", "", "é", "\ufffd", "a"]


class InPython(PreTrainedTokenizer):
    """A tokenizer in Python; ``join`` makes a text of tokens."""

    def __init__(self, words, join, **options):
        self.words, self.join = words, join
        super().__init__(**options)
        self.add_tokens(["<tool>"])
        self.add_special_tokens({"additional_special_tokens": SPECIAL})

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)} | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.index(token) if token in self.words else None

    def _convert_id_to_token(self, index):
        return self.words[index]

    def convert_tokens_to_string(self, tokens):
        return self.join(tokens)


JOINS = {
    "spaces": " ".join,
    "marks": lambda tokens: "".join(tokens).replace("▁", " ").removeprefix(" "),
    "suffixes": lambda tokens: "".join(tokens).replace("</w>", " ").strip(),
    "bytes": lambda tokens: b"".join(t.encode("latin-1", "ignore") for t in tokens).decode(
        "utf-8", "replace"
    ),
}


@pytest.mark.parametrize("cleans", [False, True])
@pytest.mark.parametrize("kind", JOINS)
def test_tokenizers_in_python_are_asked_for_a_few_tokens_at_a_time(kind, cleans):
    words = [word for word in spread("{}", "▁{}", "{}</w>") if "\ufffd" not in word] + ["Ã", "©"]
    own = OwnTokenizer(InPython(words, JOINS[kind], clean_up_tokenization_spaces=cleans))
    assert isinstance(own.decoding(), Windows)
    special = sorted(own.special_tokens)
    assert len(special) == len(SPECIAL)

    @given(st.lists(st.one_of(st.integers(0, len(own.tokenizer) - 1), st.sampled_from(special)), min_size=1))
    @example([special[0]])
    @example([special[0], 1, special[1], special[1], 2, 3, special[0]])
    def check(ids):
        assert "".join(pieces_of(own, ids)) == own.decode(ids)

    check()


def test_ids_that_a_tokenizer_in_python_does_not_know_have_no_text():
    own = OwnTokenizer(InPython(["a", "b"], " ".join))
    unknown = len(own.tokenizer) + 5
    with pytest.raises(IndexError):
        own.decode([unknown])
    assert pieces_of(own, [0, unknown, unknown, 1, unknown]) == ["a", "", "", " b", ""]


def test_cleaning_up_that_transformers_leaves_out_is_left_out_in_silence(caplog):
    vocabulary = {token: i for i, token in enumerate(["a", " ", "."])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.decoder = decoders.Fuse()
    own = OwnTokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=True))
    pieces = pieces_of(own, [0, 1, 2])
    assert not caplog.records
    assert "".join(pieces) == own.decode([0, 1, 2])


class Splitting(InPython):
    """One that decodes what lies between special tokens apart, so that half a character stays one."""

    def _decode(self, token_ids, skip_special_tokens=False, **_):
        special = set(self.all_special_ids)
        runs = itertools.groupby(token_ids, special.__contains__)
        texts = [
            self.join(self.convert_ids_to_tokens(list(run))) for is_special, run in runs if not is_special
        ]
        return "".join(texts)

    @property
    def added_tokens_decoder(self):
        raise NotImplementedError("nothing can be added")


def test_a_special_token_counts_where_a_tokenizer_decodes_what_is_around_it_apart():
    own = OwnTokenizer(Splitting(["a", "é", "Ã", "©", "Ã©"], JOINS["bytes"]))
    special = own.tokenizer.all_special_ids
    assert list(own.special_tokens) == sorted(special)

    @given(st.lists(st.one_of(st.integers(0, 4), st.sampled_from(special)), min_size=1, max_size=12))
    @example([2, special[0], 3])
    def check(ids):
        assert "".join(pieces_of(own, ids)) == own.decode(ids)

    check()


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer whose text is not its decoder's."""

    def _decode(self, *args, **options):
        return super()._decode(*args, **options).upper()


def test_a_tokenizer_with_a_decoding_of_its_own_is_heard():
    given_ = tokenizer_of(*KINDS["as Llama's"])
    own = OwnTokenizer(Shouting(tokenizer_object=given_.backend_tokenizer))
    ids = own.tokenizer.convert_tokens_to_ids(["▁the", "▁a", "<s>", "▁of course"])
    assert "".join(pieces_of(own, ids)) == own.decode(ids) == "THE A OF COURSE"


def test_the_work_of_a_token_does_not_grow_with_the_answer(monkeypatch):
    own = OWN["as Llama's", True]
    asked = []
    monkeypatch.setattr(own.tokenizer, "decode", lambda ids, **_: asked.append(len(ids)))
    detokenizer = Detokenizer(own, ["never"])
    ids = own.tokenizer.convert_tokens_to_ids(["▁the"]) * 2000
    assert sum(len(detokenizer.push(token)) for token in ids) > 7000
    assert not asked
    held = vars(detokenizer._search)
    assert sum(len(value) for value in held.values() if isinstance(value, str)) < 20


def test_windows_are_short():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join(map(chr, ids))

    from kvhybrid.engine.decoding.steps import Steps

    windows = Windows(decode, Steps())
    assert "".join(windows.push(ord("a")) for _ in range(500)) == "a" * 500
    assert longest == 2
    assert windows.end() == ""


@pytest.mark.parametrize("kind", ["byte level", "as Llama's", "WordPiece", "suffixes", "none"])
async def test_an_engine_streams_what_the_tokenizer_makes_of_all_its_tokens(make_engine, kind):
    decoder, words = KINDS[kind]
    given = tokenizer_of(decoder, words[: VOCAB - 8])
    assert len(given) <= VOCAB
    async with make_engine(tokenizer=given) as engine:
        for seed in range(4):
            request = {"token_ids": [5, 6, 7], "max_length": 40, "temperature": 4.0, "seed": seed}
            answer = await engine.process_request(request)
            pieces = [piece async for piece in engine.stream(request)]
            assert [piece.token_id for piece in pieces] == answer["token_ids"]
            expected = given.decode(answer["token_ids"], skip_special_tokens=True)
            assert "".join(pieces) == answer["text"] == expected
