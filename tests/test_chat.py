"""Supervised tokens are found through the model's own chat template."""

from functools import cache
from typing import Any

import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge_exp.chat import Unrenderable, encode, eos_token_ids, prompt_ids
from specforge_exp.conversations import prompt_of
from specforge_exp.target import load_tokenizer

TRIMMING = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
)
LAST_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
SHOUTING = "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}"
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


@pytest.mark.parametrize("template", [TRIMMING, LAST_THINKS])
def test_other_templates(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    messages = dialog("Hi", "  One. ", "Go on", "Two.")
    found = [text.strip() for text in supervised(tokenizer, messages)]
    assert [text.removesuffix("<|im_end|>").strip() for text in found] == ["One.", "Two."]


def test_an_answer_that_quotes_the_template(tokenizer: Any) -> None:
    """Header strings inside an answer or a prompt do not confuse the search."""
    quoted = "say <|im_end|>\n<|im_start|>assistant\nno"
    messages = dialog(quoted, quoted, "again", "done")
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
    prompt = prompt_ids(tokenizer, prompt_of({"conversations": messages}), {})
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


def test_eos_ids(tiny_tokenizer: Any, tmp_path: Any) -> None:
    assert eos_token_ids(str(tmp_path), tiny_tokenizer) == {tiny_tokenizer.eos_token_id}
