"""What clients do with a model, attached and bare: the same answers, and the same errors."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from families import make_model, prompt
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.model.load import load_model
from kvhybrid.model.obstacles import changes_values
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    Call = Callable[[PreTrainedModel], Any]

IDS = prompt(37)
BATCH = torch.cat([prompt(20, seed=1), prompt(20, seed=2)])
MASK = torch.ones_like(BATCH)
MASK[0, :6] = 0
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def generate(ids: torch.Tensor = IDS, **options: Any) -> Call:
    def call(model: PreTrainedModel) -> Any:
        torch.manual_seed(3)
        return model.generate(ids, **{**GREEDY, **options})

    return call


class Forbid(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 37] = -torch.inf
        return scores


class StopAfter(StoppingCriteria):
    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.left -= 1
        return torch.full((len(input_ids),), self.left <= 0)


def stopped(model: PreTrainedModel) -> Any:
    return generate(stopping_criteria=StoppingCriteriaList([StopAfter(3)]))(model)


def in_eager_code(model: PreTrainedModel) -> Any:
    model.set_attn_implementation("eager")
    found = generate()(model)
    model.set_attn_implementation("sdpa")
    return found


def by_hand(model: PreTrainedModel) -> torch.Tensor:
    cache, ids, text = DynamicCache(config=model.config), IDS, [IDS]
    for _ in range(5):
        ids = model(ids, **over(cache), use_cache=True).logits[:, -1:].argmax(-1)
        text.append(ids)
    return torch.cat(text, dim=1)


def without_a_cache(model: PreTrainedModel) -> torch.Tensor:
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def train_and_generate(model: PreTrainedModel) -> Any:
    """Do as reinforcement learning does: sample, step on it, sample again."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(3):
        model.eval()
        with torch.no_grad():
            found.append(model.generate(IDS, **GREEDY))
        model.train()
        model(found[-1], labels=found[-1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return [*found, model.generate(IDS, **GREEDY)]


def in_threads(model: PreTrainedModel) -> list[Any]:
    found: list[Any] = [None] * 3

    def work(index: int) -> None:
        found[index] = model.generate(IDS[:, : 20 + index], **GREEDY)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def with_adapters(model: PreTrainedModel) -> list[Any]:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    whole = peft.get_peft_model(model, config)
    found = [whole.generate(input_ids=IDS, **GREEDY)]
    whole.add_adapter("second", config)
    whole.set_adapter("second")
    found.append(whole.generate(input_ids=IDS, **GREEDY))
    with whole.disable_adapter():
        found.append(whole.generate(input_ids=IDS, **GREEDY))
    whole.set_adapter("default")
    found.append(whole.generate(input_ids=IDS, **GREEDY))
    merged = whole.merge_and_unload()
    return [*found, merged.generate(IDS, **GREEDY)]


def offloaded(model: PreTrainedModel) -> Any:
    accelerate = pytest.importorskip("accelerate")
    shown = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    found = [shown.generate(IDS, **GREEDY) for _ in range(2)]
    accelerate.hooks.remove_hook_from_submodules(model)
    return [*found, model.generate(IDS, **GREEDY)]


def hooked_by_accelerate(model: PreTrainedModel) -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    found = [model.generate(IDS, **GREEDY) for _ in range(2)]
    accelerate.hooks.remove_hook_from_module(model)
    return [*found, model.generate(IDS, **GREEDY)]


def copied(model: PreTrainedModel) -> list[Any]:
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(written, weights_only=False)]
    return [twin.generate(IDS, **GREEDY) for twin in twins]


def saved(model: PreTrainedModel, folder: Any) -> Any:
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    return again.generate(IDS, **GREEDY)


def wrapped(model: PreTrainedModel) -> Any:
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]
    found = [model.generate(IDS, **GREEDY) for _ in range(2)]
    model.forward = own  # type: ignore[method-assign]
    return [*found, model.generate(IDS, **GREEDY)]


def in_batches(model: PreTrainedModel) -> Any:
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = {}  # or it takes most of the memory there is
    if hasattr(transformers, "ContinuousBatchingConfig"):
        room = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
        small = {"continuous_batching_config": room}
    found = model.generate_batch(
        inputs=[row.tolist() for row in BATCH], generation_config=config, progress_bar=False, **small
    )
    return sorted(list(each.generated_tokens) for each in found.values())


def fails(error: type[Exception] | tuple[type[Exception], ...], call: Call) -> Call:
    """Return a call that must fail in the same way, whoever it is asked of."""

    def failing(model: PreTrainedModel) -> str:
        with pytest.raises(error) as caught:
            call(model)
        return type(caught.value).__name__

    return failing


CALLS: dict[str, Call] = {
    "greedy": generate(),
    "sampled": generate(do_sample=True, temperature=0.8, top_k=9),
    "nucleus": generate(do_sample=True, top_p=0.7),
    "beams": generate(num_beams=3),
    "beams, several": generate(num_beams=4, num_return_sequences=2),
    "several sampled": generate(do_sample=True, num_return_sequences=3),
    "a padded batch": generate(BATCH, attention_mask=MASK),
    "a padded batch of beams": generate(BATCH, attention_mask=MASK, num_beams=2),
    "min length": generate(min_new_tokens=4),
    "repetition": generate(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "forbidden words": generate(bad_words_ids=[[37], [24]]),
    "a configuration": lambda m: m.generate(IDS, GenerationConfig(max_new_tokens=5, do_sample=False)),
    "prefix function": generate(prefix_allowed_tokens_fn=lambda _, ids: [int(ids[-1]) % 97, 5, 9]),
    "processor": generate(logits_processor=LogitsProcessorList([Forbid()])),
    "stopping": stopped,
    "prompt lookup": generate(prompt_lookup_num_tokens=3, eos_token_id=96, pad_token_id=0),
    "scores": generate(return_dict_in_generate=True, output_scores=True, output_logits=True),
    "hidden states": generate(return_dict_in_generate=True, output_hidden_states=True),
    "attentions": generate(return_dict_in_generate=True, output_attentions=True),
    "a cache of its own": lambda m: m.generate(IDS, **over(DynamicCache(config=m.config)), **GREEDY),
    "a static cache": generate(cache_implementation="static"),
    "no cache": generate(use_cache=False),
    "embeddings": lambda m: m.generate(inputs_embeds=m.get_input_embeddings()(IDS), **GREEDY),
    "embeddings and ids": lambda m: m.generate(IDS, inputs_embeds=m.get_input_embeddings()(IDS), **GREEDY),
    "ids by name": lambda m: m.generate(input_ids=IDS, **GREEDY),
    "chunks": generate(prefill_chunk_size=8),
    "guidance": generate(guidance_scale=1.5),
    "a mask with a hole": generate(attention_mask=(torch.arange(37) != 12).long()[None]),
    "longer than the pages": generate(torch.cat([prompt(400, seed=seed) for seed in range(4)])),
    "one token": generate(IDS[:, :1]),
    "under inference mode": torch.inference_mode()(generate()),
    "under autocast": torch.autocast("cpu", torch.bfloat16)(generate()),
    "by hand": by_hand,
    "without a cache by hand": without_a_cache,
    "a loss": lambda m: m(IDS, labels=IDS).loss,
    "positional arguments": lambda m: m(IDS, torch.ones_like(IDS)).logits,
    "logits of the last": lambda m: m(IDS, logits_to_keep=1).logits,
    "a tuple": lambda m: m(IDS, return_dict=False)[0],
    "training": train_and_generate,
    "threads": in_threads,
    "adapters": with_adapters,
    "offloaded": offloaded,
    "a hook of accelerate": hooked_by_accelerate,
    "copies": copied,
    "a wrapper of the caller's": wrapped,
    "generate_batch": in_batches,
    "compiled": lambda m: torch.compile(m, backend="eager").generate(IDS, **GREEDY),
    "eager attention": in_eager_code,
    "no prompt": fails(
        (RuntimeError, IndexError), lambda m: m.generate(torch.zeros((1, 0), dtype=torch.long), **GREEDY)
    ),
    "ids outside the vocabulary": fails(IndexError, lambda m: m.generate(torch.tensor([[5, 99]]), **GREEDY)),
    "an unknown argument": fails(ValueError, generate(not_an_argument=3)),
    "a forward with an unknown argument": fails(
        (TypeError, AttributeError), lambda m: m(IDS, position_ids="none")
    ),
}


def flat(found: Any) -> list[torch.Tensor]:
    """Return every tensor of an answer but those of caches."""
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, dict):
        found = [value for name, value in found.items() if name not in ("past_key_values", "cache")]
    if isinstance(found, list | tuple):
        return [tensor for each in found for tensor in flat(each)]
    return [torch.tensor(hash(found) % 2**31)] if isinstance(found, int | str) else []


@pytest.fixture
def attached() -> Iterator[kvhybrid.model.attach.Attachment]:
    with kvhybrid.attach(make_model("llama"), config=KVCacheConfig(max_tokens=1024, block_size=16)) as found:
        yield found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_what_the_bare_model_gives(name: str, attached: Any) -> None:
    call = CALLS[name]
    torch.compiler.reset()
    expected = flat(call(make_model("llama")))
    if name == "generate_batch" and not expected:
        pytest.skip("this transformers generates no batch of such a model")
    model = attached.model
    if name not in (
        "adapters",
        "training",
        "offloaded",
        "generate_batch",
    ):  # which leave another model behind
        call(model)
    found = flat(call(model))
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one.float(), other.float(), atol=2e-3, rtol=1e-3)
        if not one.is_floating_point():
            assert torch.equal(one, other)
    attached.detach()
    assert not any("kvhybrid" in str(key) for key in vars(model))


@pytest.mark.filterwarnings("ignore")
def test_a_saved_model_is_the_bare_one(attached: Any, tmp_path: Any) -> None:
    assert torch.equal(saved(attached.model, tmp_path / "a"), saved(make_model("llama"), tmp_path / "b"))
    for file in (tmp_path / "a").glob("*.json"):
        assert "kvhybrid" not in file.read_text()


@pytest.mark.filterwarnings("ignore")
def test_pipelines_streamers_and_assistants_of_the_embedded_model_give_the_same() -> None:
    own, tokenizer = load_model()
    text = "Good morrow, masters. What news?"
    chat = pipeline("text-generation", model=own, tokenizer=tokenizer)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]

    def streamed() -> str:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        options = {"streamer": streamer, "stop_strings": ["king"], "tokenizer": tokenizer, **GREEDY}
        thread = threading.Thread(target=functools.partial(own.generate, ids, **options))
        thread.start()
        found = "".join(streamer)
        thread.join()
        return found

    def answers() -> list[Any]:
        return [
            chat(text, max_new_tokens=8, do_sample=False),
            chat([text, text + " Speak."], max_new_tokens=8, do_sample=False, batch_size=2),
            streamed(),
            own.generate(ids, assistant_model=own, **GREEDY).tolist(),
        ]

    expected = answers()
    with kvhybrid.attach(own, config=KVCacheConfig(max_tokens=2048)):
        for _ in range(2):
            assert answers() == expected


def causal_classes() -> list[type]:
    names = sorted({name for each in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in (each,)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = (getattr(transformers, name, None) for name in names if isinstance(name, str))
        return [kind for kind in found if kind is not None and hasattr(kind, "forward")]


# What every model's forward may be given without another K or V, and what some of them would compute from.
HARMLESS = (
    "output_hidden_states",
    "return_dict",
    "use_cache",
    "labels",
    "logits_to_keep",
    "output_router_logits",
)
SHAPING = ("inputs_embeds", "token_type_ids", "pixel_values", "head_mask", "input_features", "langs", "mems")


def test_the_rule_judges_every_causal_class_alike() -> None:
    kinds = causal_classes()
    assert len(kinds) > 50
    seen: set[str] = set()
    for kind in kinds:
        parameters = {
            name: parameter.default for name, parameter in inspect.signature(kind.forward).parameters.items()
        }
        for name, default in parameters.items():
            seen.add(name)
            assert not changes_values(name, None, parameters)
            if isinstance(default, bool | int | float | str):
                assert not changes_values(name, default, parameters), f"{kind.__name__}: {name}"
            if name in HARMLESS:
                assert not changes_values(name, True, parameters), f"{kind.__name__}: {name}"
            if name in SHAPING:
                assert changes_values(name, torch.ones(1, 2), parameters), f"{kind.__name__}: {name}"
        # What a forward does not name: objects that it cannot compute with, and numbers that it may hand on.
        assert not changes_values("tokenizer", object(), parameters)
        assert changes_values("is_causal", 1, parameters)
    assert {"inputs_embeds", "labels"} <= seen


@pytest.mark.parametrize(
    "place", ["survey", "settings_of", "obstacle_to_reuse", "mask_of", "prepare", "_stepping"]
)
def test_a_fault_of_ours_is_no_fault_of_a_plain_call(
    attached: Any, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("a bug of ours")

    expected = generate()(make_model("llama"))
    owner = {
        "survey": (attached.weights, "survey"),
        "prepare": (kvhybrid.model.session_rows.SessionRows, "prepare"),
        "_stepping": (attached._stepping, "_run"),
    }.get(place, (kvhybrid.model.generating, place))
    monkeypatch.setattr(*owner, fail)
    with pytest.warns(UserWarning, match="it failed in the cache"):
        assert torch.equal(generate()(attached.model), expected)
    assert torch.equal(generate()(attached.model), expected)
    assert attached.passed_by.reasons == {"it failed in the cache": 2}
    assert len([record for record in caplog.records if record.exc_info]) <= 1
    with pytest.raises(KeyError):
        generate(**over(attached.cache.session("a")))(attached.model)
