"""The embedded model is what its card says, and its chats only ever grow at the end."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kvhybrid.model.embedded_model import embedded_model_path, load_embedded_model

TEXT = Path(__file__).resolve().parents[2].parent / "shared/data/tinyshakespeare.txt"
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Message = dict[str, str]

contents = st.text(max_size=60).filter(lambda text: not any(token in text for token in SPECIAL))
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": contents}),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_embedded_model()


@pytest.fixture(scope="module")
def tokenizer(loaded: Loaded) -> PreTrainedTokenizerBase:
    return loaded[1]


def render(tokenizer: PreTrainedTokenizerBase, chat: list[Message], *, prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))


def test_model_is_a_small_grouped_query_llama(loaded: Loaded) -> None:
    model, tokenizer = loaded
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert model.dtype == torch.float32
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert len(tokenizer) == model.config.vocab_size


def test_model_loads_in_the_dtype_asked_for() -> None:
    assert load_embedded_model(dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_missing_transformers_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install kvhybrid\[transformers\]"):
        runpy.run_path(str(embedded_model_path().with_name("embedded_model.py")))


def test_files_are_small_readable_by_all_and_hold_no_pickle_or_path() -> None:
    files = {path.name: path for path in embedded_model_path().iterdir()}
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files["model.safetensors"].stat().st_size <= 6_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files.values())
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        written = files[name].read_text(encoding="utf-8")
        assert "_name_or_path" not in written
        assert "/" not in written


def test_special_tokens_are_single_tokens_and_distinct(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [len(tokenizer(token)["input_ids"]) for token in SPECIAL] == [1] * len(SPECIAL)
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(ids) == 3
    assert tokenizer.eos_token == "<|end|>"


@settings(deadline=None)
@given(text=contents)
def test_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_chat_template_renders_roles_and_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [
        {"role": "system", "content": "Be ROMEO."},
        {"role": "user", "content": " Who comes here?\n"},
        {"role": "assistant", "content": "A friend."},
    ]
    text = "<|bos|><|system|>Be ROMEO.<|end|><|user|> Who comes here?\n<|end|><|assistant|>A friend.<|end|>"
    assert render(tokenizer, chat) == text
    assert render(tokenizer, chat[:2], prompt=True) == text.removesuffix("A friend.<|end|>")


def test_chat_template_refuses_an_unknown_role(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="unknown role: tool"):
        render(tokenizer, [{"role": "tool", "content": ""}])


@settings(deadline=None)
@given(chat=messages)
def test_chat_is_a_prefix_of_its_continuation(
    tokenizer: PreTrainedTokenizerBase, chat: list[Message]
) -> None:
    renderings = [render(tokenizer, chat[:count]) for count in range(1, len(chat) + 1)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in renderings]
    for index in range(len(chat) - 1):
        assert renderings[index + 1].startswith(renderings[index])
        assert ids[index + 1][: len(ids[index])] == ids[index]


def test_reply_to_a_chat_ends_by_itself(loaded: Loaded) -> None:
    model, tokenizer = loaded
    prompt = render(tokenizer, [{"role": "user", "content": "Who comes here?"}], prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=200, num_return_sequences=8)
    replies = output[:, inputs["input_ids"].size(1) :]
    assert (replies == tokenizer.eos_token_id).any(dim=1).sum() >= 6


@pytest.mark.skipif(not TEXT.exists(), reason="the training text is not beside the checkout")
def test_validation_loss_is_what_the_card_says(loaded: Loaded) -> None:
    model, tokenizer = loaded
    results = ModelCard.load(embedded_model_path() / "README.md").data.eval_results
    claimed = {result.metric_type: result.metric_value for result in results}["nats_per_byte"]
    text = TEXT.read_text(encoding="utf-8")
    text = text[int(len(text) * 0.9) :]
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, 4 * 1024):
            inputs, targets = ids[:-1][start : start + 4 * 1024], ids[1:][start : start + 4 * 1024]
            # The last window of 1,024 is padded behind its end, where nothing that is scored sees it.
            inputs = functional.pad(inputs, (0, -len(inputs) % 1024)).view(-1, 1024)
            logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)[: len(targets)]
            total += functional.cross_entropy(logits, targets, reduction="sum").item()
    first = len(tokenizer.decode(ids[:1].tolist()).encode())
    assert total / (len(text.encode()) - first) == pytest.approx(claimed, rel=0.005)
