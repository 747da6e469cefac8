"""A conversation is rendered and tokenised as if each of its texts were the only one."""

from typing import Any

import pytest
from chat_oracle import Oracle
from chat_shapes import SHAPES, Shape
from chat_templates import CALL, chat_of, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_templates import THOUGHT, assistant, conversations, user

from specforge_exp.data import templates
from specforge_exp.data.chat import Encoded, Message, Unrenderable, dated, encode_many, render
from specforge_exp.data.rendering import NOTHING, Chat
from specforge_exp.data.templates import SAFE, Renderings, compiled

QWEN3 = next(shape for shape in SHAPES if shape.name == "Qwen3, thinking")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def shown(text: Any, *arguments: Any, **more: Any) -> str:
    """A rendering, or why there is none."""
    try:
        return str(text(*arguments, **more))
    except Unrenderable as error:
        return f"refused: {error}"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_each_rendering_is_that_of_transformers(shape: Shape, data: st.DataObject) -> None:
    messages = data.draw(conversations(shape.tools))
    kwargs = shape.kwargs | data.draw(st.sampled_from([{}, {"tools": TOOLS}, dated({})]))
    tokenizer, many = tokenizer_of(shape), Renderings(tokenizer_of(shape), messages, kwargs)
    for count in range(len(messages) + 1):
        *before, last = messages[:count] or [user("alone")]
        for talk in (messages[:count], [*before, {**last, "content": "x", "name": None}]):
            for prompt in (False, True):
                whole = kwargs | {"add_generation_prompt": prompt}
                assert shown(many.text, talk, prompt) == shown(render, tokenizer, talk, whole)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}", "{{ messages[0].pop('role') }}", "{{ messages[0].update() }}",
        "{{ ''.__class__ }}", "{{ '{0.__class__}'.format(messages) }}", "{{ messages.__len__() }}",
        "{{ (messages[0].content.format)(1) }}{{ messages[0].keys() | list }}",
        "{{ messages[0].nothing.more }}", "{{ messages[0].nothing }}{{ messages[0].role.upper() }}",
        "{% for m in messages %}{{ loop.__init__ }}{{ loop.last }}{{ loop.length }}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ bos_token }}{{ tools }}{{ documents }}{{ switch }}{{ none }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ raise_exception('no') }}",
        "{{ namespace(x=1).x }}{{ namespace.__init__ }}{{ dict(a=1) | tojson }}", "{{ broken",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "kwargs", [{}, {"switch": True}, {"switch": [1]}, {"sanitize_control_tokens": True}]
)
def test_the_sandbox_is_that_of_transformers(
    template: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, messages = tokenizer_of(QWEN3), [user("{0}"), assistant("b", reasoning="c")]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    many = Renderings(tokenizer, messages, kwargs)
    for _ in range(2):  # the second time verdicts are remembered
        assert shown(many.text, messages) == shown(render, tokenizer, messages, kwargs)
    assert messages == [user("{0}"), assistant("b", reasoning="c")]


def test_another_transformers_renders_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may name its compiling of a template otherwise."""
    tokenizer, messages = tokenizer_of(QWEN3), [user("a"), assistant("b", reasoning="c")]
    compiled.cache_clear()
    monkeypatch.setattr(templates, "COMPILE", None)
    many = Renderings(tokenizer, messages, QWEN3.kwargs)
    assert many.text(messages) == render(tokenizer, messages, QWEN3.kwargs)
    assert compiled.cache_info().misses == 0


def test_what_is_handed_out_unasked_is_safe() -> None:
    sandbox = compiled("x").environment
    for kind, name in SAFE:
        assert super(type(sandbox), sandbox).is_safe_attribute(  # type: ignore[misc]
            kind() if kind is str else kind([], None), name, None
        )


@pytest.mark.parametrize("tools", [{"name": "x"}, ["x"], 1])
def test_tools_that_are_none(tools: Any) -> None:
    (result,) = encode_many(chat_of(QWEN3), [{"conversations": THOUGHT, "tools": tools}])
    whole = shown(render, tokenizer_of(QWEN3), THOUGHT, {"tools": tools})
    assert isinstance(result, Unrenderable) and f"refused: {result}" == whole


PIECES = st.sampled_from(
    ["Hello", " ", "\n", "\n\n", "<", "<|", "|>", "é", "😀", "1234", "▁", "a b", "x" * 40, "\u0301"]
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_behind_a_common_beginning(shape: Shape, data: st.DataObject) -> None:
    """They are those of the whole text, whatever it begins with and goes on with."""
    chat = chat_of(shape)
    texts = st.lists(PIECES | st.sampled_from(shape.special or ("x",)), max_size=14).map("".join)
    common = data.draw(texts)
    ends = data.draw(st.lists(texts, min_size=1, max_size=3))
    row = NOTHING
    for end in ends:
        (whole,) = chat.rows_of([common + end])
        (row,) = chat.rows_after([row], [common + end])
        assert row == whole


def test_added_tokens_that_begin_alike() -> None:
    """Where a longer one begins with a shorter, what follows decides which of them it is."""
    tokenizer = tokenizer_of(QWEN3).__class__.from_pretrained(tokenizer_of(QWEN3).name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<a>bcd", "z<a>b"]})
    chat = Chat(tokenizer, {}, set())
    texts = ["x <a> y <a>bc", "x <a> y <a>bcd", "x <a> yz<a>", "x <a> yz<a>b", "x <a>bcd y <a>"]
    row = NOTHING
    for text in texts * 2:
        (row,) = chat.rows_after([row], [text])
        assert [row] == chat.rows_of([text])


def agent(calls: int) -> list[Message]:
    """A conversation of one question and many calls."""
    messages = [user("Go " * 50)]
    for number in range(calls):
        messages += [assistant(f"Step {number}.", tool_calls=[CALL])]
        messages += [{"role": "tool", "content": "sunny " * 20}]
    return [*messages, assistant("Done.")]


def test_long_conversations_cost_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is asked as often as for a short one; the tokenizer reads little of it twice."""
    tokenizer = tokenizer_of(QWEN3)
    asked, read = [0], [0]
    apply, rows_of = type(tokenizer).apply_chat_template, Chat.rows_of

    def counting(*arguments: Any, **more: Any) -> Any:
        asked[0] += 1
        return apply(*arguments, **more)

    def reading(chat: Chat, texts: list[str]) -> Any:
        read[0] += sum(map(len, texts))
        return rows_of(chat, texts)

    monkeypatch.setattr("specforge_exp.data.templates.RENDER", counting)
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counting)
    monkeypatch.setattr(Chat, "rows_of", reading)
    (result,) = encode_many(chat_of(QWEN3), [{"conversations": agent(40)}])
    assert isinstance(result, Encoded) and len(result.apart) == 40
    length = len(tokenizer.decode(result.ids))
    assert asked[0] == 1 and read[0] < 4 * length
    for number, sequence in enumerate(reversed(result.apart), 1):
        oracle = Oracle(QWEN3, agent(40))
        ((first, _),) = sequence.spans
        assert sequence.ids[:first] == oracle.prompt(number)


def test_a_template_that_refuses_the_beginning_of_a_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of calls without results, as an example: the other answers are taught."""
    refuses = (
        "{% if messages[-1].tool_calls %}{{ raise_exception('results must follow') }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer_of(QWEN3), "chat_template", refuses + QWEN3.template)
    (result,) = encode_many(chat_of(QWEN3), [{"conversations": agent(1)}])
    assert isinstance(result, Encoded) and result.numbers == (2,)
    assert result.left_out == ("the chat template refuses it: results must follow",)
