"""The caller's tokenizer is the caller's: what it is set to, and who uses it, is nothing to an engine."""

import copy
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from families import VOCAB, make_model
from tokenizers import NormalizedString, PreTokenizedString, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from kvhybrid import InvalidRequestError
from kvhybrid.engine.own_tokenizer import OwnTokenizer, Tokenizers
from kvhybrid.model.load import load_model

WORDS = "abcdefghij"


def fast(**options):
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="?", unk_token="?", **options)


class Words(PreTrainedTokenizer):
    """A tokenizer in Python: one token a word."""

    def __init__(self, **options):
        self.words = ["?", *WORDS]
        super().__init__(unk_token="?", pad_token="?", **options)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)} | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.index(token) if token in self.words else 0

    def _convert_id_to_token(self, index):
        return self.words[index]

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens)


class Held(PreTrainedTokenizerFast):
    """A tokenizer with something that has no copy."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


class HeldWholly(Held):
    """A tokenizer that no copy can be had of at all."""

    def __copy__(self):
        raise TypeError("cannot be copied")


class HeldWords(Words):
    """The same in Python."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


class Split:
    """A part in Python, which a native tokenizer cannot write down."""

    def split(self, i: int, text: NormalizedString) -> list[NormalizedString]:
        return [piece for piece in text.split(" ", "removed") if str(piece)]

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(self.split)


def with_a_part_in_python():
    given = fast()
    given.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Split())
    given.add_tokens(["<x>"])
    return given


def held(kind):
    return kind(tokenizer_object=fast().backend_tokenizer, pad_token="?", unk_token="?")


KINDS = {
    "fast": fast,
    "in Python": Words,
    "held": lambda: held(Held),
    "held wholly": lambda: held(HeldWholly),
    "held, in Python": HeldWords,
    "with a part in Python": with_a_part_in_python,
}
TEXT = "a b c d e f g h i j"


@pytest.fixture(params=KINDS)
def given_(request):
    return KINDS[request.param]()


def test_what_a_caller_cuts_and_pads_is_whole_for_us(given_):
    whole = list(range(1, 11))
    own = OwnTokenizer(given_)
    assert own.encode(TEXT, special=True) == whole
    given_(["a", TEXT], truncation=True, max_length=3, padding=True)
    assert own.encode(TEXT, special=True) == whole
    assert OwnTokenizer(given_).encode(TEXT, special=True) == whole


def test_our_use_leaves_the_caller_what_was_set(given_):
    if isinstance(given_, PreTrainedTokenizerFast):
        given_.backend_tokenizer.enable_truncation(max_length=4, stride=1, direction="left")
        given_.backend_tokenizer.enable_padding(length=7, pad_token="?")
        before = given_.backend_tokenizer.truncation, given_.backend_tokenizer.padding
    own = OwnTokenizer(given_)
    assert len(own.encode(TEXT, special=True)) == 10
    assert own.decode([1, 2]) == "a b"
    if isinstance(given_, PreTrainedTokenizerFast):
        assert (given_.backend_tokenizer.truncation, given_.backend_tokenizer.padding) == before
        assert len(given_.backend_tokenizer.encode("a").ids) == 7


def test_only_what_cannot_be_copied_is_not(given_):
    assert OwnTokenizer(given_).is_copy is not isinstance(given_, HeldWholly | HeldWords)


def test_added_tokens_and_special_ones_are_noticed(given_):
    tokenizers = Tokenizers(given_)
    first = tokenizers.look()
    given_("a b", truncation=True, max_length=1)
    assert tokenizers.look() is first
    given_.add_tokens(["<y>"])
    second = tokenizers.look()
    number = given_.convert_tokens_to_ids("<y>")
    assert second.encode("a <y>", special=True) == [1, number]
    assert second.decode([1, number]) == "a <y>"
    given_.add_special_tokens({"eos_token": "<z>"})
    third = tokenizers.look()
    ending = given_.convert_tokens_to_ids("<z>")
    assert third.encode("a <z>", special=True) == [1, ending]
    assert third.decode([1, ending]) == "a"
    assert third.tokenizer.eos_token_id == ending
    assert tokenizers.look() is third


def test_an_ordinary_token_that_becomes_special_is_noticed():
    given = fast()
    tokenizers = Tokenizers(given)
    assert tokenizers.look().decode([1, 2]) == "a b"
    given.add_tokens(["b"], special_tokens=True)
    assert tokenizers.look().decode([1, 2]) == "a"


def test_a_chat_template_set_later_is_noticed():
    given = fast()
    tokenizers = Tokenizers(given)
    with pytest.raises(InvalidRequestError, match="need a tokenizer with a chat template"):
        tokenizers.look().render([{"role": "user", "content": "a"}])
    assert not tokenizers.has_template
    given.chat_template = "{{ messages[0].content }}!"
    assert tokenizers.has_template
    assert tokenizers.look().render([{"role": "user", "content": "a"}]) == "a!"


def test_a_post_processor_set_later_is_noticed():
    from tokenizers.processors import TemplateProcessing

    given = fast()
    tokenizers = Tokenizers(given)
    assert tokenizers.look().encode("a", special=True) == [1]
    given.backend_tokenizer.post_processor = TemplateProcessing(single="j $A", special_tokens=[("j", 10)])
    assert tokenizers.look().encode("a", special=True) == [10, 1]
    assert tokenizers.look().encode("a", special=False) == [1]


class Stubborn(Words):
    def _tokenize(self, text, **_):
        raise RuntimeError("no such word")


def test_what_a_tokenizer_objects_is_heard():
    own = OwnTokenizer(Stubborn())
    with pytest.raises(InvalidRequestError, match="cannot read this text: RuntimeError: no such word"):
        own.encode("a", special=True)


def test_threads_read_while_the_caller_cuts_pads_and_adds():
    given = fast()
    tokenizers = Tokenizers(given)
    over = threading.Event()

    def read():
        return [len(tokenizers.look().encode(TEXT * 20, special=True)) for _ in range(200)]

    def use():
        rounds = itertools.takewhile(lambda _: not over.is_set(), itertools.count())
        for i in rounds:
            given([TEXT] * 8, truncation=True, max_length=1 + i % 5, padding="max_length")
            if i % 200 == 0:
                given.add_tokens([f"<{i}>"])

    with ThreadPoolExecutor(4) as threads:
        user = threads.submit(use)
        readers = [threads.submit(read) for _ in range(3)]
        found = {length for reader in readers for length in reader.result()}
        over.set()
        user.result()
    assert found == {len(fast()(TEXT * 20)["input_ids"])}


async def test_an_engine_neither_sets_the_tokenizer_nor_heeds_what_it_is_set_to(make_engine):
    model, given = load_model()
    written = given.backend_tokenizer.to_str()
    attributes = json.dumps(vars(given), default=str, sort_keys=True)
    text = "What news from the harbour, good sir?"
    whole = len(copy.deepcopy(given)(text)["input_ids"])
    async with make_engine(model, tokenizer=given) as engine:
        assert engine.tokenizer is given
        first = await engine.process_request({"text": text, "max_length": 3})
        assert given.backend_tokenizer.to_str() == written
        assert json.dumps(vars(given), default=str, sort_keys=True) == attributes
        given.backend_tokenizer.enable_truncation(max_length=4)
        second = await engine.process_request({"text": text, "max_length": 3})
        session = await engine.session().send("Good morrow", max_length=3)
        assert given.backend_tokenizer.truncation["max_length"] == 4
    assert first["prompt_tokens"] == second["prompt_tokens"] == whole
    assert first["text"] == second["text"]
    assert session["prompt_tokens"] > 4


async def test_embeddings_and_end_tokens_are_those_of_now(make_engine, own_words):
    model = make_model("llama")
    async with make_engine(model) as engine:
        request = {"token_ids": [5, 6, VOCAB], "max_length": 2}
        with pytest.raises(
            InvalidRequestError, match=rf"token id {VOCAB} is outside the vocabulary \[0, {VOCAB}\)"
        ):
            await engine.process_request(request)
        model.resize_token_embeddings(VOCAB + 8)
        await engine.process_request(request)
        with pytest.raises(InvalidRequestError, match=rf"outside the vocabulary \[0, {VOCAB + 8}\)"):
            await engine.process_request({"token_ids": [VOCAB + 8]})
        words = own_words(model, [5, 6, 7], 8)
        assert (await engine.process_request({"token_ids": [5, 6, 7], "max_length": 8}))["token_ids"] == words
        model.generation_config.eos_token_id = [words[3], 0]
        answer = await engine.process_request({"token_ids": [5, 6, 7], "max_length": 8})
        assert (answer["token_ids"], answer["finish_reason"]) == (words[: words.index(words[3]) + 1], "stop")


async def test_a_conversation_of_tokens_that_are_gone_is_refused(make_engine, tokenizer, balanced):
    model = make_model("llama")
    async with make_engine(model) as engine:
        session = engine.session()
        await session.send("hello", max_length=2)
        before = session.tokens()
        model.resize_token_embeddings(20)
        with pytest.raises(InvalidRequestError, match=r"outside the vocabulary \[0, 20\)"):
            await session.send("and?", max_length=2)
        assert (session.num_turns, session.tokens()) == (1, before)
        assert (await engine.process_request({"token_ids": [5], "max_length": 2}))["completion_tokens"] == 2
        balanced(engine)
