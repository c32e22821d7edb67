"""Every way of calling ``generate`` gives, through the cache, what it gives without: tokens and scores.

Each way runs twice with ``attach`` alone (on a part of the prompt that is cached, then on all of it) and
twice with a session. Random numbers are seeded alike, so sampling must draw the same tokens.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import VOCAB, make_model, prompt
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.errors import CapacityError, UnsupportedError
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import CACHE, over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

CONFIG = {"max_tokens": 2048, "block_size": 16}
PROMPT = prompt(37)
# A prompt that repeats itself, for candidates looked up in it.
ECHO = prompt(12).repeat(1, 3)
GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}
SAMPLED: dict[str, Any] = {"max_new_tokens": 7, "do_sample": True}


class LessOfTheLast(LogitsProcessor):
    """Makes the last token less likely to come again."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter_add(1, input_ids[:, -1:], torch.full((len(scores), 1), -2.0))


class AtLength(StoppingCriteria):
    """Stops at a length that no other option names."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 40)


def greedy_loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A ``custom_generate`` that uses the cache it is given as the documentation says to."""
    past = kwargs[CACHE]
    fed = input_ids[:, past.get_seq_length() :]
    for _ in range(6):
        logits = model(input_ids=fed, **over(past), use_cache=True).logits
        fed = logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, fed], dim=1)
    return input_ids


def contrastive_search(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Look one token ahead for each of the likeliest; take the one that repeats the text's states least."""
    past, width, penalty = kwargs[CACHE], 4, 0.6
    states = model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    logits = model(input_ids=input_ids[:, past.get_seq_length() :], **over(past)).logits[:, -1]
    for _ in range(5):
        chances, tokens = logits.softmax(-1).topk(width)
        past.batch_repeat_interleave(width)
        ahead = model(input_ids=tokens.view(-1, 1), **over(past), output_hidden_states=True)
        new = ahead.hidden_states[-1]
        alike = torch.cosine_similarity(states, new, dim=-1).max(dim=1).values
        best = int(((1 - penalty) * chances[0] - penalty * alike).argmax())
        past.batch_select_indices(torch.tensor([best]))
        states = torch.cat([states, new[best : best + 1]], dim=1)
        input_ids = torch.cat([input_ids, tokens[:, best : best + 1]], dim=1)
        logits = ahead.logits[best : best + 1, -1]
    return input_ids


def diverse_beams(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Two groups of beams; the second is held off the first one's tokens, and rows change places."""
    past = kwargs[CACHE]
    logits = model(input_ids=input_ids[:, past.get_seq_length() :], **over(past)).logits[:, -1]
    past.batch_repeat_interleave(4)
    chances = logits.log_softmax(-1)[0].topk(4)
    scores, texts = chances.values, torch.cat([input_ids.repeat(4, 1), chances.indices[:, None]], dim=1)
    for _ in range(5):
        logits = model(input_ids=texts[:, -1:], **over(past)).logits[:, -1].log_softmax(-1)
        parents, tokens, totals = [], [], []
        for group in ((0, 1), (2, 3)):
            options = scores[list(group), None] + logits[list(group)]
            for taken in tokens:
                options[:, taken] -= 3.0
            best = options.flatten().topk(2)
            parents += [group[int(index) // VOCAB] for index in best.indices]
            tokens += [int(index) % VOCAB for index in best.indices]
            totals.append(best.values)
        past.reorder_cache(torch.tensor(parents))
        texts = torch.cat([texts[parents], torch.tensor(tokens)[:, None]], dim=1)
        scores = torch.cat(totals)
    return texts


WAYS: dict[str, Callable[..., Any]] = {
    "greedy": lambda generate: generate(PROMPT, **GREEDY),
    "one token": lambda generate: generate(PROMPT, do_sample=False, max_new_tokens=1),
    "max_length": lambda generate: generate(PROMPT, do_sample=False, max_length=45),
    "sampling": lambda generate: generate(PROMPT, temperature=1.4, top_k=20, top_p=0.95, **SAMPLED),
    "several answers": lambda generate: generate(PROMPT, num_return_sequences=3, **SAMPLED),
    "several answers each": lambda generate: generate(PROMPT.repeat(2, 1), num_return_sequences=2, **SAMPLED),
    "beams": lambda generate: generate(PROMPT, num_beams=3, **GREEDY),
    "beams, sampled": lambda generate: generate(PROMPT, num_beams=3, **SAMPLED),
    "beams, all returned": lambda generate: generate(
        PROMPT, num_beams=4, num_return_sequences=4, length_penalty=0.3, early_stopping=True, **GREEDY
    ),
    "beams of a batch": lambda generate: generate(PROMPT.view(1, 37).repeat(2, 1), num_beams=2, **GREEDY),
    "prefill in chunks": lambda generate: generate(PROMPT, prefill_chunk_size=7, **GREEDY),
    "prefill in chunks, beams": lambda generate: generate(
        PROMPT, prefill_chunk_size=5, num_beams=2, **GREEDY
    ),
    "prompt lookup": lambda generate: generate(ECHO, prompt_lookup_num_tokens=3, eos_token_id=2, **GREEDY),
    "prompt lookup, sampled": lambda generate: generate(
        ECHO, prompt_lookup_num_tokens=3, eos_token_id=2, **SAMPLED
    ),
    "custom loop": lambda generate: generate(PROMPT, custom_generate=greedy_loop, **GREEDY),
    "contrastive search": lambda generate: generate(PROMPT, custom_generate=contrastive_search, **GREEDY),
    "diverse beams": lambda generate: generate(PROMPT, custom_generate=diverse_beams, **GREEDY),
    "a configuration": lambda generate: generate(
        PROMPT, generation_config=GenerationConfig(num_beams=2, **GREEDY)
    ),
    "a configuration in second place": lambda generate: generate(PROMPT, GenerationConfig(**GREEDY)),
    "inputs by name": lambda generate: generate(inputs=PROMPT, **GREEDY),
    "input_ids by name": lambda generate: generate(input_ids=PROMPT, **GREEDY),
    "int32": lambda generate: generate(PROMPT.int(), **GREEDY),
    "a mask of floats": lambda generate: generate(PROMPT, attention_mask=torch.ones(1, 37), **GREEDY),
    "a mask of bools": lambda generate: generate(PROMPT, attention_mask=PROMPT > 0, **GREEDY),
    "more logits": lambda generate: generate(PROMPT, logits_to_keep=5, **GREEDY),
    "logits processors": lambda generate: generate(
        PROMPT, logits_processor=LogitsProcessorList([LessOfTheLast()]), **GREEDY
    ),
    "built-in processors": lambda generate: generate(
        PROMPT, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=3, **GREEDY
    ),
    "stopping criteria": lambda generate: generate(
        PROMPT, stopping_criteria=StoppingCriteriaList([AtLength()]), **GREEDY
    ),
    "allowed tokens": lambda generate: generate(
        PROMPT, prefix_allowed_tokens_fn=lambda row, ids: [3, 4, 5, 6], **GREEDY
    ),
    "classifier-free guidance": lambda generate: generate(PROMPT, guidance_scale=1.5, **GREEDY),
    "a negative prompt": lambda generate: generate(
        PROMPT, guidance_scale=1.5, negative_prompt_ids=prompt(9, seed=4), **GREEDY
    ),
    "ends at different times": lambda generate: generate(
        torch.cat([PROMPT, prompt(37, seed=3)]), eos_token_id=[*range(3, 30)], pad_token_id=0, **GREEDY
    ),
    "scores and logits": lambda generate: _parts(
        generate(PROMPT, return_dict_in_generate=True, output_scores=True, output_logits=True, **GREEDY)
    ),
    "scores of beams": lambda generate: _parts(
        generate(PROMPT, num_beams=3, return_dict_in_generate=True, output_scores=True, **GREEDY)
    ),
}


def _parts(output: Any) -> tuple[torch.Tensor, ...]:
    scores = output.get("sequences_scores")
    logits = [] if output.get("logits") is None else [torch.stack(output.logits)]
    return output.sequences, torch.stack(output.scores), *logits, *([] if scores is None else [scores])


def same(found: Any, expected: Any) -> bool:
    """Tokens equal, scores as close as another order of summing leaves them."""
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if expected.is_floating_point():
        return torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    return torch.equal(found, expected)


def run(way: Callable[..., Any], model: PreTrainedModel, **options: Any) -> Any:
    torch.manual_seed(11)
    return way(lambda *args, **kwargs: model.generate(*args, **options, **kwargs))


@pytest.fixture(scope="module")
def own() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(params=list(Route))
def attached(request: pytest.FixtureRequest) -> Iterator[Attachment]:
    model = make_model("llama")
    cache = KVCache.for_model(model, KVCacheConfig(**CONFIG))
    with Attachment(model, cache, request.param, "test").install() as attachment:
        yield attachment
    cache.pool.check()
    assert cache.pool.num_free + cache.pool.num_evictable == cache.pool.num_pages


def cached(attachment: Attachment) -> int:
    return int(attachment.cache.get_stats()["cached_tokens"])


@pytest.mark.parametrize("name", WAYS)
def test_it_gives_the_same_through_the_cache(attached: Attachment, own: PreTrainedModel, name: str) -> None:
    way, model = WAYS[name], attached.model
    expected = run(way, own)
    model.generate(torch.cat([PROMPT[:, :25], prompt(5, seed=9)], dim=1), **GREEDY)
    before = cached(attached)
    for _ in range(2):
        assert same(run(way, model), expected)
    assert cached(attached) > before
    session = attached.cache.session("talk")
    for _ in range(2):
        assert same(run(way, model, **over(session)), expected)
    attached.cache.drop_session("talk")


@pytest.mark.filterwarnings("ignore:generate runs without the cache.*position_ids")
@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
@pytest.mark.parametrize("draft", ["plain", "attached", "the model itself"])
def test_a_draft_model_may_be_attached_too(
    attached: Attachment, own: PreTrainedModel, draft: str, options: dict[str, Any]
) -> None:
    small = make_model("llama", seed=5)
    torch.manual_seed(3)
    expected = own.generate(PROMPT, assistant_model=own if draft == "the model itself" else small, **options)
    if draft == "attached":
        kvhybrid.attach(small, config=KVCacheConfig(**CONFIG))
    assistant = attached.model if draft == "the model itself" else small
    for options_of_session in ({}, {}, over(attached.cache.session("talk"))):
        torch.manual_seed(3)
        found = attached.model.generate(PROMPT, assistant_model=assistant, **options_of_session, **options)
        assert torch.equal(found, expected)
    assert cached(attached) > 0
    kvhybrid.detach(small)
    attached.cache.drop_session("talk")


# Transformers 4 sends no positions to the draft.
@pytest.mark.filterwarnings("ignore:generate runs without the cache.*position_ids")
def test_a_draft_models_small_cache_may_lose_its_pages_between_two_drafts(own: PreTrainedModel) -> None:
    small = make_model("llama", seed=5)
    expected = own.generate(PROMPT, assistant_model=small, **GREEDY)
    with kvhybrid.attach(own, config=KVCacheConfig(**CONFIG)) as attachment:
        with (
            kvhybrid.attach(small, config=KVCacheConfig(**CONFIG)) as drafts,
            pytest.MonkeyPatch.context() as patch,
        ):
            generate = small.generate

            def forgetful(*args: Any, **kwargs: Any) -> Any:
                try:
                    return generate(*args, **kwargs)
                finally:
                    drafts.cache.clear()

            patch.setitem(small.__dict__, "generate", forgetful)
            found = own.generate(PROMPT, assistant_model=small, **GREEDY)
        assert torch.equal(found, expected)
        assert cached(attachment) == 0


def test_hidden_states_of_the_whole_prompt_are_given_whatever_is_cached(
    attached: Attachment, own: PreTrainedModel
) -> None:
    options = {"return_dict_in_generate": True, "output_hidden_states": True, **GREEDY}
    expected = own.generate(PROMPT, **options).hidden_states
    attached.model.generate(PROMPT, **GREEDY)
    with pytest.warns(UserWarning, match="output_hidden_states"):
        found = attached.model.generate(PROMPT, **options).hidden_states
    assert found[0][1].shape == expected[0][1].shape == (1, 37, 48)
    assert torch.allclose(found[0][1], expected[0][1], atol=1e-5)
    session = attached.cache.session("talk")
    within = attached.model.generate(PROMPT, **over(session), **options).hidden_states
    assert within[0][1].shape == (1, 1, 48)  # as with any cache that holds the rest
    assert torch.allclose(within[0][1][:, -1], expected[0][1][:, -1], atol=1e-4)
    attached.cache.drop_session("talk")


PASSING: dict[str, dict[str, Any]] = {
    "assistant_early_exit": {"assistant_early_exit": 2},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "position_ids": {"position_ids": torch.arange(37)[None]},
    "after position 0": {"attention_mask": (torch.arange(37) != 12).long()[None]},
    "other values than 0 and 1": {"attention_mask": torch.full((1, 37), 2)},
    "hides all": {"attention_mask": torch.zeros((1, 37), dtype=torch.long)},
    r"\[1, 40\] for input_ids of \[1, 37\]": {"attention_mask": torch.ones((1, 40), dtype=torch.long)},
}


@pytest.mark.parametrize("reason", PASSING)
def test_what_cannot_be_cached_runs_without_and_is_said_once(
    attached: Attachment, own: PreTrainedModel, reason: str
) -> None:
    options = {**GREEDY, **PASSING[reason]}
    expected = own.generate(PROMPT, **options)
    attached.model.generate(PROMPT, **GREEDY)
    before = cached(attached)
    with pytest.warns(UserWarning, match=f"runs without the cache.*{reason}") as said:
        found = [attached.model.generate(PROMPT, **options) for _ in range(3)]
    if isinstance(expected, dict):
        found, expected = [output["sequences"] for output in found], expected["sequences"]
    assert all(torch.equal(text, expected) for text in found)
    ours = [warning for warning in said if "runs without the cache" in str(warning.message)]
    assert len(ours) == 1
    assert ours[0].filename == __file__
    assert cached(attached) == before
    session = attached.cache.session("talk")
    with pytest.raises((UnsupportedError, kvhybrid.errors.InvalidRequestError)):
        attached.model.generate(PROMPT, **over(session), **options)
    assert session.get_seq_length() == 0
    assert torch.equal(
        attached.model.generate(PROMPT, **over(session), **GREEDY), own.generate(PROMPT, **GREEDY)
    )
    attached.cache.drop_session("talk")


@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_run_without_the_cache_and_that_is_said_once(
    attached: Attachment, own: PreTrainedModel, with_ids: bool
) -> None:
    embeddings = own.get_input_embeddings()(PROMPT).detach()
    ids = {"input_ids": PROMPT} if with_ids else {}
    expected = own.generate(inputs_embeds=embeddings, **ids, **GREEDY)
    with pytest.warns(UserWarning, match="embed") as said:
        found = [attached.model.generate(inputs_embeds=embeddings, **ids, **GREEDY) for _ in range(3)]
    assert all(torch.equal(text, expected) for text in found)
    assert len(said) == 1
    assert cached(attached) == 0
    session = attached.cache.session("talk")
    with pytest.raises(UnsupportedError, match="embed"):
        attached.model.generate(inputs_embeds=embeddings, **over(session), **ids, **GREEDY)
    attached.cache.drop_session("talk")


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "dynamic"}])
def test_whoever_asks_for_another_cache_or_none_gets_it_in_silence(
    attached: Attachment, own: PreTrainedModel, options: dict[str, Any]
) -> None:
    attached.model.generate(PROMPT, **GREEDY)
    assert torch.equal(
        attached.model.generate(PROMPT, **options, **GREEDY), own.generate(PROMPT, **options, **GREEDY)
    )
    assert cached(attached) == 0


def test_a_generate_without_a_prompt_begins_at_the_beginning(
    attached: Attachment, own: PreTrainedModel
) -> None:
    assert torch.equal(attached.model.generate(**GREEDY), own.generate(**GREEDY))


def test_what_generate_returns_as_its_cache_goes_on(attached: Attachment, own: PreTrainedModel) -> None:
    output = attached.model.generate(PROMPT, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([output.sequences, prompt(4, seed=2)], dim=1)
    found = attached.model.generate(longer, **over(output[CACHE]), **GREEDY)
    assert torch.equal(found, own.generate(longer, **GREEDY))
    assert output[CACHE].cached_tokens == [output.sequences.shape[1] - 1]
    output[CACHE].close()


def test_two_threads_write_their_own_texts_on_one_model(attached: Attachment, own: PreTrainedModel) -> None:
    texts = [prompt(18 + row, seed=row % 3) for row in range(6)]
    expected = [own.generate(text, **GREEDY) for text in texts]
    found: dict[int, torch.Tensor] = {}
    failed: list[BaseException] = []

    def write(rows: range) -> None:
        try:
            for row in rows:
                found[row] = attached.model.generate(texts[row], **GREEDY)
        except BaseException as error:  # noqa: BLE001  # shown below, in the thread that can fail the test
            failed.append(error)

    threads = [threading.Thread(target=write, args=(range(start, 6, 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(torch.equal(found[row], expected[row]) for row in range(6))


def test_a_text_that_outgrows_the_budget_goes_on_over_a_cache_of_the_models_own(own: PreTrainedModel) -> None:
    model = make_model("llama")
    options = {"do_sample": False, "max_new_tokens": 30}
    with kvhybrid.attach(model, config=KVCacheConfig(max_tokens=64, block_size=16)) as attachment:
        with pytest.raises(CapacityError):
            model.generate(PROMPT, **options, **over(attachment.cache.session("long")))
        attachment.cache.drop_session("long")
        with pytest.warns(UserWarning, match="there are no pages for all of it"):
            assert torch.equal(model.generate(PROMPT, **options), own.generate(PROMPT, **options))
        assert attachment.cache.get_stats()["passed_by[there are no pages for all of it]"] == 1
        assert torch.equal(model.generate(PROMPT, **GREEDY), own.generate(PROMPT, **GREEDY))
        pool = attachment.cache.pool
        assert pool.num_free + pool.num_evictable == pool.num_pages
