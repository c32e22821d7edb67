"""Token ids are judged by the embeddings that the model has when they come, for sessions and plain calls."""

import pytest
import torch
from families import VOCAB, make_model

import kvhybrid
from kvhybrid import InvalidRequestError, KVCache, KVCacheConfig


@pytest.fixture
def model():
    return make_model("llama")


@pytest.fixture
def session(model):
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=256, block_size=8))
    attachment = kvhybrid.attach(model, cache)
    yield cache.session("mine")
    attachment.detach()


def ask(model, session, *ids, count=2):
    return model.generate(torch.tensor([ids]), past_key_values=session, max_new_tokens=count, do_sample=False)


@pytest.mark.parametrize("wrong", [VOCAB, -1, 2**40])
def test_an_id_without_an_embedding_is_refused_and_the_session_goes_on(model, session, wrong):
    known = ask(model, session, 5, 6, 7)[0].tolist()
    with pytest.raises(
        InvalidRequestError, match=rf"token id {wrong} is outside the vocabulary \[0, {VOCAB}\)"
    ):
        ask(model, session, *known, wrong)
    assert ask(model, session, *known, 8)[0].tolist()[: len(known)] == known


def test_an_id_is_taken_once_it_has_an_embedding(model, session):
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        ask(model, session, 5, VOCAB)
    model.resize_token_embeddings(VOCAB + 8)
    found = ask(model, session, 5, VOCAB)
    assert torch.equal(found, model.generate(torch.tensor([[5, VOCAB]]), max_new_tokens=2, do_sample=False))
    with pytest.raises(InvalidRequestError, match=rf"outside the vocabulary \[0, {VOCAB + 8}\)"):
        ask(model, session, 5, VOCAB + 8)


def test_an_id_is_refused_once_its_embedding_is_gone(model, session):
    known = ask(model, session, 5, 90)[0].tolist()
    model.resize_token_embeddings(20)
    with pytest.raises(InvalidRequestError, match=r"outside the vocabulary \[0, 20\)"):
        ask(model, session, *known, 6)
    assert ask(model, session, 5, 6).shape == (1, 4)
