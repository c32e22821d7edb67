"""The model of a live engine changes: nothing that it computed before is found, and what comes back is."""

import gc
import tracemalloc
from contextlib import contextmanager

import anyio
import anyio.lowlevel
import pytest
import torch
from families import make_model

from kvhybrid.model.watch import weight_watch

IDS = torch.randint(5, 97, (75,), generator=torch.Generator().manual_seed(5)).tolist()
REQUEST = {"token_ids": IDS, "max_length": 6}


@pytest.fixture
def model():
    """A model of the test's own, to be changed."""
    return make_model("llama")


def projection(model):
    return model.model.layers[0].mlp.down_proj


@contextmanager
def weights_written_in_place(model):
    weight = projection(model).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-1)
    yield
    with torch.no_grad():
        weight.copy_(before)


@contextmanager
def weights_written_past_the_count(model):
    projection(model).weight.data.mul_(-1)
    yield
    projection(model).weight.data.mul_(-1)


@contextmanager
def weights_loaded(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor * 1.5 for name, tensor in before.items()}, assign=True)
    yield
    model.load_state_dict(before)


@contextmanager
def an_optimizer_has_stepped(model):
    before = projection(model).weight.detach().clone()
    optimizer = torch.optim.AdamW([projection(model).weight], lr=0.5)
    projection(model).weight.grad = torch.ones_like(before)
    optimizer.step()
    yield
    projection(model).weight.data.copy_(before)


@contextmanager
def a_hook(model):
    handle = projection(model).register_forward_hook(lambda module, given, output: output * -1)
    yield
    handle.remove()


@contextmanager
def a_hook_before(model):
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda module, given: (given[0] * -1, *given[1:])
    )
    yield
    handle.remove()


@contextmanager
def a_hook_of_all_modules(model):
    def halve(module, given, output):
        return output * 0.5 if isinstance(module, torch.nn.Linear) else None

    handle = torch.nn.modules.module.register_module_forward_hook(halve)
    yield
    handle.remove()


@contextmanager
def another_forward_on_the_object(model):
    module = projection(model)
    module.forward = lambda given: -torch.nn.functional.linear(given, module.weight, module.bias)
    yield
    del module.forward


@contextmanager
def another_class(model):
    class Turned(torch.nn.Linear):
        def forward(self, given):
            return -super().forward(given)

    module = projection(model)
    before, module.__class__ = module.__class__, Turned
    yield
    module.__class__ = before


@contextmanager
def another_method_of_the_class(model):
    kind = type(model.model.layers[0].mlp)
    before = kind.forward
    kind.forward = lambda self, given: -before(self, given)
    yield
    kind.forward = before


@contextmanager
def another_module(model):
    mlp, before = model.model.layers[0].mlp, projection(model)
    mlp.down_proj = torch.nn.Linear(before.in_features, before.out_features, bias=False)
    torch.nn.init.constant_(mlp.down_proj.weight, 0.3)
    yield
    mlp.down_proj = before


@contextmanager
def another_number_beside_the_weights(model):
    attention = model.model.layers[1].self_attn
    before = attention.scaling
    attention.scaling = before * 4
    yield
    attention.scaling = before


@contextmanager
def another_vector_for_one_token(model):
    weight = model.get_input_embeddings().weight
    before = weight[IDS[3]].detach().clone()
    weight.data[IDS[3]].neg_()
    yield
    weight.data[IDS[3]].copy_(before)


@contextmanager
def an_adapter(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["down_proj"], inference_mode=True)
    peft.inject_adapter_in_model(config, model)
    yield
    for layer in model.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.enable_adapters(False)


CHANGES = [
    weights_written_in_place,
    weights_written_past_the_count,
    weights_loaded,
    an_optimizer_has_stepped,
    a_hook,
    a_hook_before,
    a_hook_of_all_modules,
    another_forward_on_the_object,
    another_class,
    another_method_of_the_class,
    another_module,
    another_number_beside_the_weights,
    another_vector_for_one_token,
    an_adapter,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_answers_are_those_of_the_model_as_it_is(make_engine, model, own_words, change, balanced):
    before = own_words(model, IDS, 6)
    async with make_engine(model) as engine:
        for _ in range(2):
            answer = await engine.process_request(REQUEST)
            assert answer["token_ids"] == before
        assert answer["cached_tokens"] > 64
        with change(model):
            answer = await engine.process_request(REQUEST)
            assert answer["cached_tokens"] == 0
            assert answer["token_ids"] == own_words(model, IDS, 6) != before
            again = await engine.process_request(REQUEST)
            assert again["token_ids"] == answer["token_ids"]
            assert again["cached_tokens"] > 64
        answer = await engine.process_request(REQUEST)
        assert answer["token_ids"] == before
        balanced(engine)


@pytest.mark.parametrize("change", [a_hook, another_class, another_number_beside_the_weights])
async def test_what_comes_back_finds_its_pages(make_engine, model, change):
    async with make_engine(model) as engine:
        await engine.process_request(REQUEST)
        with change(model):
            assert (await engine.process_request(REQUEST))["cached_tokens"] == 0
        assert (await engine.process_request(REQUEST))["cached_tokens"] > 64


async def test_dropout_shares_nothing_while_it_trains(make_engine, balanced):
    model = make_model("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    async with make_engine(model) as engine:
        expected = (await engine.process_request(REQUEST))["token_ids"]
        model.train()
        for _ in range(2):
            assert (await engine.process_request(REQUEST))["cached_tokens"] == 0
        model.eval()
        answer = await engine.process_request(REQUEST)
        assert answer["token_ids"] == expected
        assert answer["cached_tokens"] > 64
        balanced(engine)


async def test_what_no_look_can_see_is_told(make_engine, model, own_words, monkeypatch):
    monkeypatch.setattr(weight_watch.WeightWatch, "is_same", lambda _: True)
    async with make_engine(model) as engine:
        await engine.process_request(REQUEST)
        projection(model).weight.data.mul_(-1)
        engine.weights_changed()
        answer = await engine.process_request(REQUEST)
        assert answer["token_ids"] == own_words(model, IDS, 6)
        assert answer["cached_tokens"] == 0


async def test_a_conversation_goes_on_with_the_model_as_it_is(make_engine, model, own_words):
    async with make_engine(model) as engine:
        session = engine.session("talk")
        await session.send("good morrow, masters. what news?", max_length=5)
        with a_hook(model):
            answer = await session.send("and the fleet?", max_length=5)
            tokens = torch.frombuffer(bytearray(session.tokens()), dtype=torch.int32).tolist()
            expected = own_words(model, tokens[: answer["prompt_tokens"]], 5)
            assert answer["token_ids"] == expected
            assert answer["cached_tokens"] == 0


async def test_a_text_whose_model_changed_on_the_way_is_found_by_no_one(
    make_engine, model, own_words, gate, balanced
):
    async with make_engine(model, prefill_tokens=16) as engine:
        held = gate(model)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.process_request, REQUEST)
            await held.reached()
            projection(model).weight.data.mul_(-1)
            held.open()
        answer = await engine.process_request(REQUEST)
        assert answer["token_ids"] == own_words(model, IDS, 6)
        assert answer["cached_tokens"] == 0
        balanced(engine)


async def test_answers_between_swaps_of_weights_are_right_whatever_else_runs(
    make_engine, model, own_words, balanced
):
    weights = [{name: tensor.clone() for name, tensor in model.state_dict().items()}]
    weights.append({name: tensor * 1.5 for name, tensor in weights[0].items()})
    truth = []
    for each in weights:
        model.load_state_dict(each)
        truth.append(own_words(model, IDS, 6))
    async with make_engine(model, num_workers=3) as engine, anyio.create_task_group() as tasks:

        async def run_beside():
            for turn in range(10_000):
                with anyio.move_on_after(0.01 if turn % 3 == 0 else 30):
                    await engine.process_request({"token_ids": IDS[: 20 + turn % 50], "max_length": 3})

        tasks.start_soon(run_beside)
        for turn in range(12):
            which = turn % 2
            changed = {name: tensor.clone() for name, tensor in weights[which].items()}
            await anyio.to_thread.run_sync(
                lambda changed=changed, turn=turn: model.load_state_dict(changed, assign=turn % 3 > 0)
            )
            answers = []

            async def ask(answers=answers):
                answers.append((await engine.process_request(REQUEST))["token_ids"])

            async with anyio.create_task_group() as asking:
                for _ in range(3):
                    asking.start_soon(ask)
            assert answers == [truth[which]] * 3
        tasks.cancel_scope.cancel()
    balanced(engine)


async def test_two_engines_of_one_model_see_its_changes(make_engine, model, own_words):
    async with make_engine(model) as one, make_engine(model) as other:
        for engine in (one, other):
            await engine.process_request(REQUEST)
        with a_hook(model):
            expected = own_words(model, IDS, 6)
            for engine in (one, other):
                answer = await engine.process_request(REQUEST)
                assert (answer["token_ids"], answer["cached_tokens"]) == (expected, 0)


async def serve_with_hooks(engine, model, numbers):
    """One request after the other, each under a hook of its own; every fifth hook raises."""

    def hook(number):
        def change(module, given, output):
            if number % 5 == 4:
                raise RuntimeError("not today")
            return output * (1 + number % 3)

        return change

    for number in numbers:
        handle = projection(model).register_forward_hook(hook(number))
        try:
            request = {"token_ids": IDS[: 20 + number % 50], "max_length": 1, "tenant": f"t{number % 17}"}
            await engine.process_request(request)
        except RuntimeError:
            assert number % 5 == 4
        finally:
            handle.remove()


async def test_hooks_and_failures_without_end_take_no_memory(make_engine, model, balanced):
    async with make_engine(model) as engine:
        await serve_with_hooks(engine, model, range(100))
        tracemalloc.start()
        try:
            await serve_with_hooks(engine, model, range(20))
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            names = len(engine.cache._namespaces)
            await serve_with_hooks(engine, model, range(200))
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        # Names without pages are forgotten once there are thousands; each takes under a kilobyte until then.
        assert grown - (len(engine.cache._namespaces) - names) * 1024 < 64 * 1024
        balanced(engine)
