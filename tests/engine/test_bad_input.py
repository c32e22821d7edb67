"""What cannot be served is refused at the door, with the numbers in it; the engine keeps serving."""

import math

import anyio
import numpy as np
import pytest
import torch

from kvhybrid import CapacityError, InvalidRequestError, OverloadedError
from kvhybrid.engine.request import Request

BAD = [
    ({}, r"exactly one of text, messages, token_ids is needed, got none"),
    ({"text": "a", "token_ids": [5]}, r"got text, token_ids"),
    ({"text": ""}, r"text='': must be a non-empty string"),
    ({"text": 5}, r"text=5: must be a non-empty string"),
    ({"messages": []}, r"messages=\[\]: must be a non-empty list"),
    ({"messages": [{"content": "a"}]}, r"messages={'content': 'a'}: must be .* each with a role"),
    ({"messages": "a"}, r"messages='a'"),
    ({"token_ids": []}, r"the prompt is empty: token_ids has 0 tokens"),
    ({"token_ids": np.empty(0, np.int64)}, r"token_ids has 0 tokens"),
    ({"token_ids": [5, 97]}, r"token id 97 is outside the vocabulary \[0, 97\)"),
    ({"token_ids": torch.tensor([5, -1])}, r"token id -1 is outside the vocabulary"),
    ({"token_ids": [5, 2**70]}, r"token_ids"),
    ({"token_ids": [1.5]}, r"whole numbers in one dimension, got float64 \[1\]"),
    ({"token_ids": [True, False]}, r"got bool \[2\]"),
    ({"token_ids": [[5, 6]]}, r"got int64 \[1, 2\]"),
    ({"token_ids": [[5], [6, 7]]}, r"no array of whole numbers"),
    ({"token_ids": "abc"}, r"token_ids='abc': must be"),
    ({"token_ids": 5}, r"token_ids=5: must be"),
    ({"text": "a", "max_length": 0}, r"max_length=0: must be a whole number from 1 to 2048"),
    ({"text": "a", "max_length": 2049}, r"max_length=2049"),
    ({"text": "a", "max_length": 1.5}, r"max_length=1.5"),
    ({"text": "a", "max_length": True}, r"max_length=True"),
    ({"text": "a", "max_length": "5"}, r"max_length='5'"),
    ({"text": "a", "temperature": -0.5}, r"temperature=-0.5: must be a finite number of at least 0"),
    ({"text": "a", "temperature": math.nan}, r"temperature=nan"),
    ({"text": "a", "temperature": math.inf}, r"temperature=inf"),
    ({"text": "a", "top_p": 0}, r"top_p=0: must be a number above 0 and at most 1"),
    ({"text": "a", "top_p": 1.1}, r"top_p=1.1"),
    ({"text": "a", "top_p": math.nan}, r"top_p=nan"),
    ({"text": "a", "seed": -1}, r"seed=-1"),
    ({"text": "a", "seed": 2**63}, r"seed=9223372036854775808"),
    ({"text": "a", "stop": ""}, r"stop=''"),
    ({"text": "a", "stop": []}, r"stop=\[\]"),
    ({"text": "a", "stop": ["x"] * 17}, r"stop="),
    ({"text": "a", "stop": [5]}, r"stop=5"),
    ({"text": "a", "priority": 0.5}, r"priority=0.5"),
    ({"text": "a", "deadline": 0}, r"deadline=0: must be a finite number of seconds above 0"),
    ({"text": "a", "deadline": math.inf}, r"deadline=inf"),
    ({"text": "a", "session_id": ""}, r"session_id=''"),
    ({"text": "a", "tenant": "t" * 257}, r"tenant='t+\.\.\.t+': must be a string of 1 to 256 characters"),
    ({"text": "a", "max_lenght": 5}, r"max_lenght: no such field; did you mean max_length\?"),
    ({"text": "a", "temperature": -1, "top_p": 2}, r"temperature=-1: .*; top_p=2: "),
    ("a", r"a mapping or a Request, got str"),
    (None, r"got NoneType"),
]


async def test_bad_requests_are_refused_and_nothing_is_stored(make_engine, balanced):
    async with make_engine() as engine:
        for request, problem in BAD:
            with pytest.raises(InvalidRequestError, match=problem):
                await engine.process_request(request)
            with pytest.raises(InvalidRequestError, match=problem):
                async with engine.stream(request) as stream:
                    await anext(stream)
        stats = engine.get_stats()
        assert (stats["opens"], stats["requests"], stats["refused"]) == (0, 0, 2 * len(BAD))
        balanced(engine)
        assert await engine.process_request({"text": "still serving", "max_length": 1})


def test_good_requests_are_taken():
    for request in (
        {"text": "a", "temperature": 1, "top_p": 1, "deadline": 2, "priority": -3, "stop": ["a", "b"]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "stop": "end"},
        {"token_ids": (1, 2), "seed": 0, "max_length": 2048},
    ):
        assert Request.parse(request) == Request(**request)


async def test_prompts_beyond_budget_or_context_are_refused_with_the_numbers(make_engine, balanced):
    async with make_engine(max_tokens=64) as engine:
        for length, wanted, numbers in (
            (64, None, "64 tokens and 1 new"),
            (60, 5, "60 tokens and 5 new"),
            (1000, 1, ""),
        ):
            request = {"token_ids": [5] * length, **({"max_length": wanted} if wanted else {})}
            with pytest.raises(CapacityError, match=f"{numbers}.*budget of 64 tokens"):
                await engine.process_request(request)
        assert engine.get_stats()["opens"] == 0
        assert (await engine.process_request({"token_ids": [5] * 60, "max_length": 4}))[
            "completion_tokens"
        ] == 4
        balanced(engine)
    async with make_engine(max_tokens=4096) as engine:
        with pytest.raises(
            CapacityError, match="500 tokens and 13 new ones exceed the model's context of 512"
        ):
            await engine.process_request({"token_ids": [5] * 500, "max_length": 13})


async def test_text_without_a_tokenizer_is_refused(make_engine):
    async with make_engine(tokenizer=None) as engine:
        for request in ({"text": "a"}, {"messages": [{"role": "user"}]}, {"token_ids": [5], "stop": "a"}):
            with pytest.raises(InvalidRequestError, match="tokenizer"):
                await engine.process_request(request)
        assert (await engine.process_request({"token_ids": [5], "max_length": 2}))["text"] == ""


async def test_a_template_that_objects_is_heard(make_engine, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system here') }}")
    async with make_engine() as engine:
        with pytest.raises(InvalidRequestError, match="no system here"):
            await engine.process_request({"messages": [{"role": "system", "content": "a"}]})


async def test_a_full_queue_refuses_and_says_when_to_come_back(make_engine, llama, gate, balanced):
    async with make_engine(num_workers=1, max_queued=2) as engine:
        held = gate(llama)
        answers = []

        async def ask():
            answers.append(await engine.process_request({"text": "hello", "max_length": 2}))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await held.reached()
            tasks.start_soon(ask)
            tasks.start_soon(ask)
            while engine.get_stats()["queued"] < 2:
                await anyio.lowlevel.checkpoint()
            with pytest.raises(OverloadedError, match="2 of 2 places") as refused:
                await engine.process_request({"text": "hello"})
            assert refused.value.retry_after > 0
            assert not await engine.get_health_status()
            held.open()
        assert len(answers) == 3
        assert await engine.get_health_status()
        balanced(engine)


async def test_deadline_passes_while_queued_and_while_running(
    make_engine, llama, gate, monkeypatch, balanced
):
    async with make_engine(num_workers=1) as engine:
        held = gate(llama)
        async with anyio.create_task_group() as tasks:
            abandon = engine._driver.abandon

            async def open_and_abandon(ticket):
                if ticket.running.request.session_id == "runs":
                    held.open()
                await abandon(ticket)

            monkeypatch.setattr(engine._driver, "abandon", open_and_abandon)

            async def run_late():
                with pytest.raises(TimeoutError, match=r"0.05 s"):
                    await engine.process_request(
                        {"text": "runs", "deadline": 0.05, "max_length": 400, "session_id": "runs"}
                    )

            tasks.start_soon(run_late)
            await held.reached()
            with pytest.raises(TimeoutError, match=r"0.001 s"):
                await engine.process_request({"text": "waits", "deadline": 0.001})
            with pytest.raises(TimeoutError, match=r"0.001 s"):
                await anext(engine.stream({"text": "waits", "deadline": 0.001}))
        balanced(engine)
        assert engine.get_stats()["cancelled"] >= 1
        assert await engine.process_request({"text": "still serving", "deadline": 60, "max_length": 1})


async def test_a_failing_forward_pass_fails_its_requests_and_no_others(
    make_engine, llama, monkeypatch, balanced
):
    async with make_engine() as engine:
        expected = await engine.process_request({"text": "hello", "max_length": 4})
        engine.cache.clear()
        failed = []

        async def ask(text):
            with pytest.raises(RuntimeError, match="boom"):
                await engine.process_request({"text": text, "max_length": 4})
            failed.append(text)

        def boom(*args, **kwargs):
            raise RuntimeError("boom")

        with monkeypatch.context() as patch:
            patch.setattr(llama, "forward", boom)
            for _ in range(3):
                async with anyio.create_task_group() as tasks:
                    for text in ("hello", "hello you", "other"):
                        tasks.start_soon(ask, text)
            assert not await engine.get_health_status()
        assert len(failed) == 9
        balanced(engine)
        assert engine.cache.pool.num_free == engine.cache.pool.num_pages
        again = await engine.process_request({"text": "hello", "max_length": 4})
        assert (again["text"], again["cached"]) == (expected["text"], False)
        assert await engine.get_health_status()
        assert engine.get_stats()["failed"] == 9


async def test_logits_without_a_likeliest_token_fail_their_request_alone(
    make_engine, llama, monkeypatch, balanced
):
    forward = llama.forward

    def poisoned(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:, 0] = float("nan")
        return output

    async with make_engine() as engine:
        with monkeypatch.context() as patch:
            patch.setattr(llama, "forward", poisoned)
            with pytest.raises(Exception, match="no finite logits behind 5 tokens"):
                await engine.process_request({"text": "hello"})
        balanced(engine)
        assert await engine.process_request({"text": "hello", "max_length": 1})


async def test_a_defect_in_the_lane_ends_no_engine(make_engine, monkeypatch, balanced):
    async with make_engine() as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._driver._lane, "_admit", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await engine.process_request({"text": "hello"})
        balanced(engine)
        assert await engine.process_request({"text": "hello", "max_length": 1})
