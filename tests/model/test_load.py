"""Models come from a path, ready loaded, or with the package; nothing is fetched."""

import pytest
import torch
from families import make_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config

from kvhybrid import ConfigError, UnsupportedError
from kvhybrid.model.load import load_model


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))


@pytest.fixture
def saved(tmp_path, tokenizer):
    model = make_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_path_loads_model_and_tokenizer_in_float32(saved):
    for path in (saved, str(saved)):
        model, tokenizer = load_model(path)
        assert (model.dtype, model.training, len(tokenizer)) == (torch.float32, False, 2)


def test_dtype_and_tokenizer_may_be_named(saved, tokenizer):
    model, chosen = load_model(saved, dtype=torch.bfloat16, tokenizer=tokenizer)
    assert model.dtype == torch.bfloat16
    assert chosen is tokenizer


def test_a_loaded_model_stays_as_it_is_and_finds_the_tokenizer_beside_its_weights(saved):
    model = load_model(saved, dtype=torch.bfloat16)[0].train()
    again, tokenizer = load_model(model)
    assert again is model
    assert (model.dtype, model.training, len(tokenizer)) == (torch.bfloat16, False, 2)
    assert load_model(make_model("llama"))[1] is None


def test_the_embedded_model_is_the_default():
    model, tokenizer = load_model()
    assert tokenizer.chat_template
    assert not model.training


def test_what_cannot_be_loaded_is_an_error_that_names_it(saved, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.*no readable local Hugging Face model: there is nothing"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="some-owner/some-model"):
        load_model("some-owner/some-model")
    (saved / "tokenizer.json").unlink()
    (saved / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="no readable tokenizer"):
        load_model(saved)
    with pytest.raises(UnsupportedError, match="got dict"):
        load_model({})


def test_a_kind_of_model_that_is_no_decoder_is_named_in_one_line(tmp_path):
    T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"of the kind 't5'.*only decoders are served$"):
        load_model(tmp_path)
