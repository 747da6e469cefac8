"""Conversations as token ids, with the supervised tokens found through the model's own template.

The template is rendered twice: once as it is and once with a marker in place of every assistant
answer. The text between the markers is the template's own, so walking along it in the real
rendering finds where each answer stands, for any template, without knowing its header strings.
"""

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

MARKER = "⟦answer-{}⟧"


class Unrenderable(ValueError):
    """The conversation does not fit the model's chat template; the message says why."""


@dataclass(frozen=True)
class Encoded:
    """Token ids and, per token, the number of its assistant turn from 1, or 0."""

    ids: list[int]
    turns: list[int]


def eos_token_ids(path: str, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    found = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    try:
        listed = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without generation_config.json: the tokenizer's token stands alone
        return found
    if listed is None:
        return found
    return found | ({listed} if isinstance(listed, int) else set(listed))


def render(tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> str:
    """The conversation as text; raises Unrenderable with the template's own complaint."""
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:  # templates raise whatever their author chose
        raise Unrenderable(f"the chat template refuses it: {error}") from None
    return text


def prompt_text(tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> str:
    """The conversation so far and the header after which the model answers."""
    return render(tokenizer, messages, {**kwargs, "add_generation_prompt": True})


def prompt_ids(tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> list[int]:
    """`prompt_text` as token ids."""
    text = prompt_text(tokenizer, messages, kwargs)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def answer_spans(
    tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the characters [start, end) of every assistant answer.

    Raises:
        Unrenderable: the template changes an answer beyond trimming white space, so that its
            place cannot be told.
    """
    text = render(tokenizer, messages, kwargs)
    marked: list[dict[str, Any]] = []
    answers: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            marked.append({**message, "content": MARKER.format(len(answers))})
            answers.append(message["content"])
        else:
            marked.append(message)
    rest = render(tokenizer, marked, kwargs)
    spans = []
    at = 0
    for number, answer in enumerate(answers):
        before, found, rest = rest.partition(MARKER.format(number))
        if not found or not text.startswith(before, at):
            raise Unrenderable(f"the chat template rewrites what stands before answer {number + 1}")
        at += len(before)
        following = rest.partition(MARKER.format(number + 1))[0]
        shapes = (answer, answer.rstrip(), answer.lstrip(), answer.strip())
        fitting = (s for s in shapes if text.startswith(s + following, at))
        shape = next(fitting, None)
        if shape is None:
            raise Unrenderable(f"the chat template rewrites answer {number + 1}")
        spans.append((at, at + len(shape)))
        at += len(shape)
    return text, spans


def encode(
    tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any], eos: set[int]
) -> Encoded:
    """Token ids of the whole conversation; every answer and its end-of-turn token is a turn.

    A token that begins before an answer and reaches into it was never the model's to choose, so
    it stays unsupervised.

    Raises:
        Unrenderable: see `answer_spans`.
    """
    text, spans = answer_spans(tokenizer, messages, kwargs)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    turns = [0] * len(ids)
    token = 0
    for number, (start, end) in enumerate(spans, 1):
        while token < len(ids) and offsets[token][0] < start:
            token += 1
        while token < len(ids) and offsets[token][0] < end:
            turns[token] = number
            token += 1
        if token < len(ids) and ids[token] in eos:
            turns[token] = number
            token += 1
    return Encoded(ids, turns)
