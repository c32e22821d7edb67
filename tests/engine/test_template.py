"""Chat templates that cannot be appended to are refused when a session is made, and the error says where."""

import datetime as dt

import pytest

from kvhybrid import InvalidRequestError, UnsupportedError
from kvhybrid.engine.template import ANSWER, added_behind

EACH = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
WRAPPED = (
    "{% for m in messages %}{% if loop.last and m.role == 'user' %}[Q]{{ m.content }}[/Q]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% for m in messages %}<|{{ m.role }}|>{% if '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
FIRST_SYSTEM = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}You help.{% endif %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
LAST_SYSTEM = (
    "{% for m in messages if m.role == 'system' %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
)
# The system's message goes with whatever message is the last.
CARRIED_SYSTEM = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{% if loop.last %}{{ system }}{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}"
)
# Appended to they cannot be: what they do, and what the error says.
REWRITING = {
    "numbers turns": (
        "{% for m in messages %}{{ loop.index }}/{{ messages | length }}{{ m.content }}{% endfor %}",
        r"renders turn 1 differently once turn 2 follows \(at character 2 '1/1What is .*' becomes '1/3What",
    ),
    "wraps the last message": (
        WRAPPED,
        r"renders turn 1 differently once turn 2 follows \(at character 0",
    ),
    "shows the last message only": ("{{ messages[-1].content }}", r"at character 0 '.*' becomes 'And the"),
    "shows three messages": (
        "{% for m in messages[-3:] %}{{ m.content }}{% endfor %}",
        r"renders turn 2 differently once turn 3 follows",
    ),
    "leaves answers out": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        r"renders turn 1 differently",
    ),
    "quotes answers": ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", r"at character \d+"),
    "opens the answer with more than it keeps": (
        EACH + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        r"'.*<think>.*' becomes",
    ),
    "shows a counter": (
        EACH.replace("{{ m.content }}", "{{ m.content }}{{ messages | length - loop.index }}") + ASK,
        r"renders turn 1 differently",
    ),
    "shows another moment": ("{{ strftime_now('%f') }}" + EACH + ASK, r"renders turn 1 differently"),
    "refuses a second turn": (
        "{% if messages | length > 1 %}{{ raise_exception('one message, please') }}{% endif %}" + EACH + ASK,
        r"refuses a conversation of a user and an assistant in turn 2 \(.*one message, please",
    ),
    "refuses everything": (
        "{{ raise_exception('no') }}",
        r"refuses a conversation of a user and an assistant in turn 1 \(.*no",
    ),
    "is no template": ("{% for %}", r"refuses a conversation of a user and an assistant in turn 1"),
    "drops reasoning": (
        EACH.replace("m.content", "m.content.split('</think>')[-1]") + ASK,
        r"leaves out the reasoning of an answer once another turn follows; pass keep_reasoning=True",
    ),
    "drops reasoning as Qwen's": (
        QWEN + ASK,
        r"leaves out the reasoning",
    ),
}
# These can: turns that follow begin where the last answer ended.
APPENDING = {
    "plain": EACH + ASK,
    "strips": EACH.replace("m.content", "m.content | trim") + ASK,
    "refuses systems": NO_SYSTEM + EACH + ASK,
    "wants alternation": ALTERNATING + EACH + ASK,
    "shows the first system message": FIRST_SYSTEM + EACH + ASK,
    "shows the date": "Today is {{ strftime_now('%d %b %Y') }}." + EACH + ASK,
}


@pytest.mark.parametrize("what", REWRITING)
async def test_it_is_said_when_the_session_is_made(make_engine, tokenizer, monkeypatch, what, balanced):
    template, problem = REWRITING[what]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    async with make_engine() as engine:
        for _ in range(2):
            with pytest.raises(
                UnsupportedError, match=f"(?s){problem}.*pass the whole chat to process_request"
            ):
                engine.session()
        assert engine.get_stats()["sessions"] == 0
        assert await engine.process_request({"text": "still serving", "max_length": 1})
        balanced(engine)


@pytest.mark.parametrize("what", APPENDING)
async def test_a_template_that_can_be_appended_to_is(make_engine, tokenizer, monkeypatch, what):
    monkeypatch.setattr(tokenizer, "chat_template", APPENDING[what])
    async with make_engine() as engine:
        session = engine.session()
        first = await session.send("  hello there ", max_length=3)
        second = await session.send("and then?\n", max_length=3)
        assert second["cached_tokens"] == first["prompt_tokens"] + 2


async def test_reasoning_stays_where_that_was_asked_for(make_engine, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", REWRITING["drops reasoning"][0])
    async with make_engine() as engine:
        session = engine.session("a", keep_reasoning=True)
        first = await session.send("hello", max_length=3)
        assert (await session.send("and?", max_length=3))["cached_tokens"] == first["prompt_tokens"] + 2
        assert engine.session("a") is session
        with pytest.raises(UnsupportedError, match="keep_reasoning"):
            engine.session("b")
    monkeypatch.setattr(tokenizer, "chat_template", REWRITING["numbers turns"][0])
    async with make_engine() as engine:
        with pytest.raises(UnsupportedError, match="renders turn 1"):
            engine.session("a", keep_reasoning=True)


async def test_messages_that_nothing_can_follow_are_refused_before_they_are_answered(
    make_engine, tokenizer, monkeypatch, balanced
):
    monkeypatch.setattr(tokenizer, "chat_template", CARRIED_SYSTEM + ASK)
    system, user = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}
    async with make_engine() as engine:
        session = engine.session()
        with pytest.raises(
            UnsupportedError, match=r"session 'default': with the messages of turn 1 .*be kind"
        ):
            await session.send([system, user], max_length=2)
        assert (session.num_turns, engine.get_stats()["opens"]) == (0, 0)
        await session.send([user], max_length=2)
        assert await engine.process_request({"messages": [system, user], "max_length": 2})
        balanced(engine)


async def test_only_the_last_system_message_is_said_in_the_turn_that_brings_another(
    make_engine, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenizer, "chat_template", LAST_SYSTEM + ASK)
    system, user = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}
    async with make_engine() as engine:
        session = engine.session()
        await session.send([system, user], max_length=2)
        await session.send("and?", max_length=2)
        with pytest.raises(UnsupportedError, match="turn 3"):
            await session.send([{**system, "content": "be quick"}, user], max_length=2)
        assert session.num_turns == 2
        await session.send("and?", max_length=2)


async def test_a_date_is_that_of_the_first_turn(make_engine, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", APPENDING["shows the date"])
    from kvhybrid.engine.own_tokenizer import OwnTokenizer

    days, render = ["1"], OwnTokenizer.render
    monkeypatch.setattr(
        OwnTokenizer,
        "render",
        lambda self, messages: render(self, messages).replace("Today", f"Day {days[0]}"),
    )
    async with make_engine() as engine:
        session = engine.session()
        first = await session.send("hello", max_length=3)
        days[0] = "2"
        second = await session.send("and?", max_length=3)
        third = await session.send("and?", max_length=3)
        assert second["cached_tokens"] == first["prompt_tokens"] + 2
        assert third["cached_tokens"] == second["prompt_tokens"] + 2
        said = tokenizer.decode(list(memoryview(session.tokens()).cast("I")))
        assert "Day 1" in said
        assert "Day 2" not in said


def test_a_second_that_ends_between_two_renderings_is_no_difference():
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    seconds = iter([0, 1, 1, 1])

    def render(messages):
        now = start + dt.timedelta(seconds=next(seconds))
        return f"{now}" + "".join(f"[{m['content']}]" for m in messages) + "["

    user = {"role": "user", "content": "a"}
    assert ANSWER not in added_behind(render, [user], [user])


async def test_a_template_set_or_taken_away_later_is_a_typed_error(make_engine, tokenizer, monkeypatch):
    async with make_engine() as engine:
        session = engine.session()
        await session.send("hello", max_length=2)
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "chat_template", REWRITING["numbers turns"][0])
            with pytest.raises(UnsupportedError, match="turn 2"):
                await session.send("and?", max_length=2)
            with pytest.raises(UnsupportedError, match="renders turn 1"):
                engine.session("other")
            patch.setattr(tokenizer, "chat_template", None)
            with pytest.raises(InvalidRequestError, match="chat template: pass text"):
                await session.send("and?", max_length=2)
        await session.send("and?", max_length=2)
        assert session.num_turns == 2


async def test_an_engine_without_a_tokenizer_has_sessions_that_say_so(make_engine):
    async with make_engine(tokenizer=None) as engine:
        with pytest.raises(InvalidRequestError, match="tokenizer"):
            await engine.session().send("hello")
        with pytest.raises(InvalidRequestError, match="tokenizer with a chat template"):
            await engine.session().send([{"role": "user", "content": "hello"}])
