"""Supervised tokens are found through the model's own chat template."""

from copy import copy
from functools import cache
from typing import Any

import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_exp.data.chat import (
    Chat,
    Encoded,
    Message,
    Unrenderable,
    encode_many,
    eos_token_ids,
    prompt_ids,
)
from specforge_exp.data.conversations import asks_of
from specforge_exp.target import load_tokenizer


def encode(
    tokenizer: Any, messages: list[Message], kwargs: dict[str, Any], eos: set[int]
) -> Encoded:
    """One conversation, see `encode_many`; raises Unrenderable."""
    result = encode_many(Chat(tokenizer, kwargs, eos), [{"conversations": messages}])[0]
    if isinstance(result, Unrenderable):
        raise result
    return result


def test_what_says_nothing_is_no_turn(tiny_tokenizer: Any) -> None:
    """An answer without a word, and a call that the template leaves out, would teach the draft (and
    sft the model) to end at once."""
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    ask, result = {"role": "user", "content": "?"}, {"role": "tool", "content": "42"}
    reply = {"role": "assistant", "content": "It is 42."}
    for empty, why in (
        ({"role": "assistant", "content": " \n"}, "an answer is empty"),
        ({"role": "assistant", "content": "", "tool_calls": [call]}, "does not show a call of a"),
    ):
        found = encode(tiny_tokenizer, [ask, empty, result, reply], {}, {2})
        [(first, last)] = found.spans
        assert tiny_tokenizer.decode(found.ids[first:last]) == "It is 42.<|im_end|>"
        assert found.numbers == (2,) and why in found.left_out[0]
        with pytest.raises(Unrenderable, match=why):
            encode(tiny_tokenizer, [ask, empty], {}, {2})


TRIMMING = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOUTING = "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}"
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set r = m.reasoning_content or '' %}{% set c = m.content %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1] %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ r.strip('\n') }}\n</think>\n\n{% endif %}{{ c }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' }}<tool_call>\n"
    "{{ call.function | tojson }}\n</tool_call>"
    "{% endfor %}{% else %}"
    "{% if loop.first and tools %}{{ tools | tojson }}\n{% endif %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: thoughts of the last answer only, in <think>, then tool calls."""
REFUSING = "{{ raise_exception('roles must alternate') }}"


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    """The tiny tokenizer, whose template a test may change."""
    before = tiny_tokenizer.chat_template
    yield tiny_tokenizer
    tiny_tokenizer.chat_template = before


def dialog(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def supervised(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    """The text of every supervised turn."""
    eos = {tokenizer.eos_token_id}
    found = encode(tokenizer, messages, {}, eos)
    turns = max(found.turns)
    return [
        tokenizer.decode([i for i, t in zip(found.ids, found.turns, strict=True) if t == turn])
        for turn in range(1, turns + 1)
    ]


def test_answers_and_their_end_are_supervised(tokenizer: Any) -> None:
    messages = dialog("Hi there", "Hello! How are you?", "Fine", "Good to hear.")
    assert supervised(tokenizer, messages) == [
        "Hello! How are you?<|im_end|>",
        "Good to hear.<|im_end|>",
    ]


def test_the_weight_0_is_context(tokenizer: Any) -> None:
    """OpenAI's word for an answer that is not trained on; what follows it sees it."""
    messages = dialog("2 + 2?", "5.", "No.", "Sorry: 4.", "Thanks", "Bye.")
    for left_out in (1, 5):
        weighed = [m | {"weight": 0} if n == left_out else m for n, m in enumerate(messages)]
        found = encode(tokenizer, weighed, {}, {tokenizer.eos_token_id})
        plain = encode(tokenizer, messages, {}, {tokenizer.eos_token_id})
        assert found.numbers == tuple(n for n in (1, 2, 3) if n != left_out // 2 + 1)
        assert found.ids == plain.ids[: len(found.ids)]
        assert found.spans == [plain.spans[n - 1] for n in found.numbers]
        assert found.left_out == ("an answer has the weight 0",)
    only = [{**message, "weight": 0} for message in messages]
    with pytest.raises(Unrenderable, match="an answer has the weight 0"):
        encode(tokenizer, only, {}, set())


@pytest.mark.parametrize("template", [TRIMMING, LAST_THINKS])
def test_other_templates(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    messages = dialog("Hi", "  One. ", "Go on", "Two.")
    thoughts = "<think>\n\n</think>\n\n" if template == LAST_THINKS else ""
    first = "  One. " if template == LAST_THINKS else "One."
    assert supervised(tokenizer, messages) == [f"{first}<|im_end|>", f"{thoughts}Two.<|im_end|>"]


def test_a_template_that_ends_no_answer(tokenizer: Any) -> None:
    """What is asked later holds the end that answers lack."""
    tokenizer.chat_template = TRIMMING.replace("<|im_end|>", "")
    messages = dialog("Hi", "One.", "What is <|im_end|>?", "Two.")
    assert supervised(tokenizer, messages) == ["One.", "Two."]


@pytest.mark.parametrize(
    ("own", "first"), [("<|im_end|>", "<|endoftext|>"), (" <|im_end|>", " <|im_end|>")]
)
def test_an_end_that_is_another_one_in_later_prompts(tokenizer: Any, own: str, first: str) -> None:
    """One token stands for another; where there are more, the answer is as its own server ends
    it."""
    tokenizer.chat_template = TRIMMING.replace(
        "<|im_end|>",
        "{% if m.role == 'user' %}<|im_end|>{% elif loop.last %}" + own + "{% else %}<|endoftext|>"
        "{% endif %}",
    )
    record = {"conversations": dialog("Hi", "One.", "Go on", "Two.")}
    assert spoken(tokenizer, record) == [f"One.{first}", f"Two.{own}"]


def test_an_answer_that_quotes_the_template(tokenizer: Any) -> None:
    """Header strings inside an answer or a prompt do not confuse the search."""
    header = "<|im_start|>assistant\nno"
    messages = dialog(f"say <|im_end|>\n{header}", f"say {header}", "again", "done")
    assert supervised(tokenizer, messages)[1] == "done<|im_end|>"


def test_a_template_that_rewrites_is_set_aside(tokenizer: Any) -> None:
    tokenizer.chat_template = SHOUTING
    with pytest.raises(Unrenderable, match="rewrites"):
        encode(tokenizer, dialog("hi", "low"), {}, set())
    tokenizer.chat_template = REFUSING
    with pytest.raises(Unrenderable, match="roles must alternate"):
        encode(tokenizer, dialog("hi", "low"), {}, set())


def test_no_answer_is_nothing_supervised(tokenizer: Any) -> None:
    assert not any(encode(tokenizer, dialog("only a question"), {}, set()).turns)


def test_prompt_is_what_precedes_the_first_answer(tokenizer: Any) -> None:
    """Training sees the ids that serving sees: the prompt's, then the answer's."""
    messages = dialog("Tell me about a lamp.", "A lamp shines.")
    prompt = prompt_ids(tokenizer, asks_of({"conversations": messages})[0], {})
    found = encode(tokenizer, messages, {}, {tokenizer.eos_token_id})
    assert found.ids[: len(prompt)] == prompt
    assert found.turns[: len(prompt)] == [0] * len(prompt)
    assert found.turns[len(prompt)] == 1


@cache
def shared_tokenizer() -> Any:
    return load_tokenizer(TINY)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=30)


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=6))
def test_any_text_is_found_or_set_aside(texts: list[str]) -> None:
    tokenizer = shared_tokenizer()
    try:
        found = encode(tokenizer, dialog(*texts), {}, {tokenizer.eos_token_id})
    except Unrenderable:
        return
    assert len(found.ids) == len(found.turns)
    assert max(found.turns) <= len(texts) // 2


@pytest.mark.parametrize(
    ("record", "day"),
    [
        ({"regenerated": {"time": "2026-02-28T23:59:59+00:00"}}, "28 Feb 2026"),
        ({"regenerated": {"time": "yesterday"}}, "01 Jan 2025"),
        ({}, "01 Jan 2025"),
    ],
)
def test_today_is_the_day_of_the_answer(
    tiny_tokenizer: Any, record: dict[str, Any], day: str
) -> None:
    """A server's template told the model a date; what is trained has that one, whenever made."""
    tokenizer = copy(tiny_tokenizer)
    today = "{{ '<|im_start|>system\nIt is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"
    tokenizer.chat_template = today + tiny_tokenizer.chat_template
    said = {
        "conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    }
    (found,) = encode_many(Chat(tokenizer, {}, {tokenizer.eos_token_id}), [said | record])
    assert isinstance(found, Encoded)
    assert f"It is {day}" in tokenizer.decode(found.ids)


def test_eos_ids(tiny_tokenizer: Any, tmp_path: Any) -> None:
    assert eos_token_ids(str(tmp_path), tiny_tokenizer) == {tiny_tokenizer.eos_token_id}


def spoken(tokenizer: Any, record: dict[str, Any], **options: Any) -> list[str]:
    """The text of every supervised turn of a record, in order."""
    (found,) = encode_many(Chat(tokenizer, {}, {tokenizer.eos_token_id}, **options), [record])
    if isinstance(found, Unrenderable):
        raise found
    texts = {
        number: tokenizer.decode(sequence.ids[first:last])
        for sequence in (found, *found.apart)
        for number, (first, last) in zip(sequence.numbers, sequence.spans, strict=True)
    }
    return [text for _, text in sorted(texts.items())]


@pytest.mark.parametrize("apart", [True, False], ids=["reasoning_content", "tags"])
def test_thoughts_are_supervised_where_they_are_shown(tokenizer: Any, apart: bool) -> None:
    """The template drops those of the first answer later, which is a sequence of its own."""
    tokenizer.chat_template = THINKING
    messages: list[dict[str, str]] = dialog("Hi", "One.", "Go on", "Two.")
    for message, thoughts in zip(messages[1::2], ("first", "second  \n"), strict=True):
        if apart:
            message["reasoning_content"] = thoughts
        else:
            message["content"] = f"<think>\n{thoughts}</think>\n\n{message['content']}"
    record = {"conversations": messages}
    first = "<think>\nfirst\n</think>\n\nOne.<|im_end|>"
    second = "<think>\nsecond  \n</think>\n\nTwo.<|im_end|>"
    assert spoken(tokenizer, record) == [first, second]
    assert spoken(tokenizer, record, last_turn_only=True) == [second]
    assert spoken(tokenizer, record, changed_turns="leave_out") == [second]
    out = ["One.<|im_end|>", "<think>\n\n</think>\n\nTwo.<|im_end|>"]
    assert spoken(tokenizer, record, thinking="out") == out


def test_thoughts_in_a_template_that_knows_none(tokenizer: Any) -> None:
    thinking = "<think>\nhm\n</think>\n\nYes."
    record = {"conversations": dialog("Hi", thinking)}
    assert spoken(tokenizer, record) == [thinking + "<|im_end|>"]
    assert spoken(tokenizer, record, thinking="out") == ["Yes.<|im_end|>"]
    unfinished = {"conversations": dialog("Hi", "<think>\nhm")}
    assert spoken(tokenizer, unfinished) == ["<think>\nhm<|im_end|>"]
    with pytest.raises(Unrenderable, match="nothing but thoughts"):
        spoken(tokenizer, unfinished, thinking="out")
    tokenizer.chat_template = TRIMMING.replace("m.content", "m.content.split('</think>')[-1]")
    for answer in ({"content": thinking}, {"content": "Yes.", "reasoning": "hm"}):
        cut = {"conversations": [*dialog("Hi"), {"role": "assistant", **answer}]}
        assert spoken(tokenizer, cut) == [thinking + "<|im_end|>"]


def test_marks_of_thoughts_that_are_words(tokenizer: Any) -> None:
    talk = "Write <think> and </think> around it."
    assert spoken(tokenizer, {"conversations": dialog("Hi", talk)}, thinking="out") == [
        talk + "<|im_end|>"
    ]


@pytest.mark.parametrize("content", ["", "Let me see."])
@pytest.mark.parametrize("as_text", [True, False])
def test_tool_calls_are_supervised(tokenizer: Any, content: str, as_text: bool) -> None:
    """From where the model began to the token that ends the turn; results are not.

    Of the last answer this template shows that nothing was thought, of earlier ones it does not.
    """
    tokenizer.chat_template = THINKING
    arguments = {"city": "Rome"}
    call = {
        "function": {"name": "weather", "arguments": '{"city": "Rome"}' if as_text else arguments}
    }
    tools = [{"name": "weather"}]
    record = {
        "tools": str(tools).replace("'", '"') if as_text else tools,
        "conversations": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "No."},
        ],
    }
    expected = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    empty = "<think>\n\n</think>\n\n"
    assert spoken(tokenizer, record) == [
        f"{empty}{content}{expected}<|im_end|>", f"{empty}No.<|im_end|>",
    ]  # fmt: skip
    (found,) = encode_many(Chat(tokenizer, {}, set()), [record])
    assert isinstance(found, Encoded)
    assert 'user\n[{"name": "weather"}]\nRain?' in tokenizer.decode(found.ids)


@pytest.mark.parametrize(
    ("shown", "thoughts", "supervised"),
    [
        ("m.tool_calls | map(attribute='id') | join", {}, "Wait.c1c2<|im_end|>"),
        ("m.tool_calls[0].function.name", {}, "does not show a call"),
        ("'</think>' | replace('</think>', '') + m.tool_calls | map(attribute='id') | join",
         {"reasoning": "hm"}, "shows an answer without the prompt"),
    ],
    ids=["by their ids", "the first alone", "without its thoughts"],
)  # fmt: skip
def test_all_calls_and_thoughts_are_shown_or_nothing_is(
    tokenizer: Any, shown: str, thoughts: dict[str, str], supervised: str
) -> None:
    calls = [{"id": f"c{n}", "function": {"name": f"look{n}", "arguments": {}}} for n in (1, 2)]
    answer = {"role": "assistant", "content": "Wait.", "tool_calls": calls, **thoughts}
    tokenizer.chat_template = TRIMMING.replace(
        "<|im_end|>", "{% if m.tool_calls %}{{ " + shown + " }}{% endif %}<|im_end|>"
    )
    try:
        assert spoken(tokenizer, {"conversations": [*dialog("?"), answer]}) == [supervised]
    except Unrenderable as reason:
        assert supervised in str(reason)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"tools": "[{"}, "its tools are no JSON"),
        ({"tool_calls": "no"}, "its tool calls are no JSON"),
        ({"tool_calls": [1]}, "no list of objects"),
        ({"tool_calls": [{"function": {}}]}, "a tool call has no name"),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments are no JSON"),
        ({"tool_calls": [{"name": "f", "arguments": '"ls"'}]}, "arguments are no JSON"),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "arguments are no object"),
        ({"tool_calls": [{"name": "f", "arguments": 1.5}]}, "arguments are no object"),
        ({"tool_calls": [{"name": "f", "parameters": {"a": 1}}]}, "has `parameters` for `argumen"),
        ({"content": "half \ud800"}, "lone surrogate"),
    ],
)
def test_what_cannot_be_rendered_says_why(
    tokenizer: Any, extra: dict[str, Any], reason: str
) -> None:
    """One such conversation does not disturb its neighbours."""
    tools = {"tools": extra.pop("tools")} if "tools" in extra else {}
    answer = {"role": "assistant", "content": "", **extra}
    bad = {"conversations": [{"role": "user", "content": "Hi"}, answer], **tools}
    good = {"conversations": dialog("Hi", "Yes.")}
    before, found, after = encode_many(Chat(tokenizer, {}, set()), [good, bad, good])
    assert isinstance(found, Unrenderable)
    assert reason in str(found)
    assert before == after == encode(tokenizer, good["conversations"], {}, set())
