"""Text that is no text is refused with its place, in any field; what callers change later is theirs."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid import InvalidRequestError
from kvhybrid.engine.messages import copied
from kvhybrid.engine.request import Request

HALF = json.loads('"hi \\ud83d there"')
SECOND_HALF = "\udc00"
PAIR = "\ud83d\ude00"  # a character in two halves, which Python keeps apart


def user(content, **more):
    return {"role": "user", "content": content, **more}


WRONG = [
    ({"text": HALF}, r"text: position 3: '\\ud83d' is half of a surrogate pair"),
    ({"text": PAIR}, r"text: position 0: .* is one character decoded in two halves: put it together"),
    ({"messages": [user("a"), user(HALF)]}, r"messages\[1\]\.content: position 3"),
    ({"messages": [user("a", name=SECOND_HALF)]}, r"messages\[0\]\.name: position 0"),
    ({"messages": [{"role": HALF, "content": "a"}]}, r"messages\[0\]\.role"),
    (
        {"messages": [user([{"type": "text", "text": HALF}])]},
        r"messages\[0\]\.content\[0\]\.text: position 3",
    ),
    ({"messages": [user(("a", HALF))]}, r"messages\[0\]\.content\[1\]: position 3"),
    (
        {"messages": [user(None, tool_calls=[{"function": {"name": "f", "arguments": {"city": HALF}}}])]},
        r"messages\[0\]\.tool_calls\[0\]\.function\.arguments\.city: position 3",
    ),
    (
        {"messages": [user("a", more={HALF: 1})]},
        r"messages\[0\]\.more, the key 'hi \\ud83d there': position 3",
    ),
    ({"text": "a", "stop": HALF}, r"stop: position 3"),
    ({"text": "a", "stop": ["a", HALF]}, r"stop\[1\]: position 3"),
    ({"text": "a", "session_id": HALF}, r"session_id: position 3"),
    ({"text": "a", "tenant": HALF}, r"tenant: position 3"),
    ({"text": "a", HALF: 1}, r"hi \\ud83d there: no such field"),
]


@pytest.mark.parametrize(("request_", "problem"), WRONG)
def test_half_a_character_is_refused_with_its_place(request_, problem):
    with pytest.raises(InvalidRequestError, match=problem) as refused:
        Request.parse(request_)
    str(refused.value).encode()  # whoever writes the message down can


async def test_an_engine_refuses_it_before_anything_is_done(make_engine, balanced):
    async with make_engine() as engine:
        session = engine.session("mine")
        for request, problem in WRONG:
            with pytest.raises(InvalidRequestError, match=problem):
                await engine.process_request(request)
        for prompt in (HALF, PAIR, [user(HALF)]):
            with pytest.raises(InvalidRequestError, match="position"):
                await session.send(prompt)
            with pytest.raises(InvalidRequestError, match="position"):
                session.stream(prompt)
        for names in ({"session_id": HALF}, {"session_id": "a", "tenant": PAIR}):
            with pytest.raises(InvalidRequestError, match="position"):
                engine.session(**names)
        assert engine.get_stats()["opens"] == 0
        assert (await session.send("still serving", max_length=1))["completion_tokens"] == 1
        balanced(engine)


@pytest.mark.parametrize(
    "prompt", [None, 5, {"role": "user", "content": "a"}, [None], [{"content": "a"}], b"a"]
)
async def test_what_is_no_prompt_is_refused_by_a_session(make_engine, prompt):
    async with make_engine() as engine:
        with pytest.raises(InvalidRequestError, match="messages"):
            await engine.session().send(prompt)


async def test_messages_of_every_shape_are_rendered_or_refused(make_engine, tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls %}{{ c.name }}"
        "{% endfor %}{% endfor %}",
    )
    async with make_engine() as engine:
        render = engine._door.render
        assert (
            render([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}])
            == "<|assistant|>f"
        )
        assert render([user(5)]) == "<|user|>5"
        assert render([user([{"type": "text", "text": "a"}, "b"])]) == "<|user|>a\nb"
        assert render([user("")]) == render([{"role": "user"}]) == "<|user|>"
        with pytest.raises(InvalidRequestError, match="the chat template refuses"):
            render([user("a", tool_calls=5)])


CONCATENATING = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
PRINTING = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
IN_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{% if c.type == 'image' %}[image]"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text }};{% endfor %}{% endif %}{% endfor %}"
)
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
IMAGE = [{"type": "text", "text": "a"}, {"type": "image", "url": "x"}]


@pytest.mark.parametrize(
    ("template", "parts", "image"),
    [
        (CONCATENATING, "<user>a\nb", None),
        (PRINTING, "<user>a\nb", None),
        (IN_PARTS, "<user>ab", "<user>a[image]"),
        (EITHER, "<user>a;b;", "<user>a;;"),
    ],
)
async def test_content_has_the_shape_that_the_template_takes(
    make_engine, tokenizer, monkeypatch, template, parts, image
):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    async with make_engine() as engine:
        render = engine._door.render
        assert render([user("a b")]) == "<user>a b"
        assert render([user(PARTS)]) == parts
        if image is not None:
            assert render([user(IMAGE)]) == image
            return
        with pytest.raises(
            InvalidRequestError, match=r"messages\[1\]\.content\[1\]: .* text alone, .*'image'"
        ):
            await engine.process_request({"messages": [user("a"), user(IMAGE)]})
        with pytest.raises(InvalidRequestError, match=r"content\[0\]: .* text alone, this is 'int'"):
            render([user([5])])


async def test_a_session_speaks_in_parts_to_a_template_that_takes_no_strings(
    make_engine, tokenizer, monkeypatch
):
    monkeypatch.setattr(
        tokenizer, "chat_template", IN_PARTS + "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    async with make_engine() as engine:
        session = engine.session()
        first = await session.send("hello", max_length=2)
        second = await session.send([user(PARTS)], max_length=2)
        assert second["cached_tokens"] == first["prompt_tokens"] + 1


def test_what_contains_itself_is_refused():
    endless = []
    endless.append(endless)
    with pytest.raises(InvalidRequestError, match="more than 64 levels"):
        Request.parse({"messages": [user(endless)]})


def test_messages_are_those_that_were_passed_whatever_becomes_of_them():
    messages = [user([{"type": "text", "text": "a"}], tool_calls=[{"arguments": {"b": [1, 2]}}])]
    before = copy.deepcopy(messages)
    request = Request.parse({"messages": messages})
    messages[0]["content"][0]["text"] = "other"
    messages[0]["tool_calls"][0]["arguments"]["b"].append(3)
    messages.append(user("more"))
    assert request.messages == before


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.tuples(inner, inner), st.dictionaries(st.text(), inner)),
    max_leaves=8,
)


@given(plain)
def test_a_copy_is_equal(value):
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        with pytest.raises(ValueError, match="position"):
            copied(value, "here")
    else:
        assert copied(value, "here") == value
