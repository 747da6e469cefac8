"""Conversations as token ids, with the supervised tokens found through the model's own template.

The template is rendered twice: once as it is and once with a marker in place of what the model
said. The text between the markers is the template's own, so walking along it in the real
rendering finds where each answer stands, for any template, without knowing its header strings.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import GenerationConfig

MARKER = "⟦{}-{}⟧"
MARKERS = re.compile("⟦(?:answer|thoughts)-[0-9]+⟧")
THOUGHTS = re.compile(r"(\s*(?:<think>)?)((?:(?!<think>).)*?)(</think>\s*)", re.DOTALL)
"""Thoughts in front of an answer; a template that opens them leaves only their end to the model."""

Message = dict[str, Any]


class Unrenderable(ValueError):
    """The conversation does not fit the model's chat template; the message says why."""


@dataclass(frozen=True)
class Encoded:
    """Token ids, and the supervised tokens [first, last) of each turn."""

    ids: list[int]
    spans: list[tuple[int, int]]

    @property
    def turns(self) -> list[int]:
        """Per token the number of its turn from 1, or 0."""
        turns = [0] * len(self.ids)
        for number, (first, last) in enumerate(self.spans, 1):
            turns[first:last] = [number] * (last - first)
        return turns


@dataclass(frozen=True)
class Chat:
    """How conversations become tokens."""

    tokenizer: Any
    kwargs: dict[str, Any]
    """For the template."""
    eos: set[int]
    """Tokens that end an answer."""
    thinking: str = "in"
    """See preprocess.thinking."""
    last_turn_only: bool = False

    @cached_property
    def headers(self) -> list[str]:
        """What stands before an answer when serving, then its beginnings, line by line."""
        probe = [{"role": "user", "content": "x"}]
        before = render(self.tokenizer, probe, self.kwargs)
        header = prompt_text(self.tokenizer, probe, self.kwargs).removeprefix(before)
        lines = header.splitlines(keepends=True)
        return ["".join(lines[:count]) for count in range(len(lines), 0, -1)]

    def turn_start(self, text: str, low: int, high: int) -> int:
        """Where the model began to speak, between two positions; `high` when nothing tells."""
        for header in self.headers:
            start = text.rfind(header, low, high)
            if start >= 0:
                return start + len(header)
        return high


@dataclass(frozen=True)
class Span:
    """Characters [start, end) that the model wrote."""

    start: int
    end: int
    calls: bool = False
    """Tool calls follow, up to the token that ends the turn."""


def eos_token_ids(path: str, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    try:
        listed = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without generation_config.json: the tokenizer's token stands alone
        return ids
    if listed is None:
        return ids
    return ids | ({listed} if isinstance(listed, int) else set(listed))


def render(tokenizer: Any, messages: list[Message], kwargs: dict[str, Any]) -> str:
    """The conversation as text; raises Unrenderable with the template's own complaint."""
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:  # templates raise whatever their author chose
        raise Unrenderable(f"the chat template refuses it: {error}") from None
    return text


def prompt_text(tokenizer: Any, messages: list[Message], kwargs: dict[str, Any]) -> str:
    """The conversation so far and the header after which the model answers."""
    return render(tokenizer, messages, {**kwargs, "add_generation_prompt": True})


def prompt_ids(tokenizer: Any, messages: list[Message], kwargs: dict[str, Any]) -> list[int]:
    """`prompt_text` as token ids."""
    text = prompt_text(tokenizer, messages, kwargs)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def parsed(value: Any, what: str) -> Any:
    """The value, read from JSON when it is text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise Unrenderable(f"its {what} are no JSON") from None


def split_thoughts(content: str) -> tuple[str, str, str, str]:
    """Opening, thoughts, closing and answer, which make up the content; without thoughts ""."""
    match = THOUGHTS.match(content) if "</think>" in content else None
    if not match:
        return "", "", "", content
    return match[1], match[2], match[3], content[match.end() :]


def readable(message: Message, thinking: str) -> Message:
    """The message as servers hand it to the template: tool calls parsed, thoughts in or out."""
    if message["role"] != "assistant":
        return message
    calls = parsed(message.get("tool_calls"), "tool calls")
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise Unrenderable("its tool calls are no list of objects")
        message = {**message, "tool_calls": [readable_call(call) for call in calls]}
    if thinking == "out":
        message = {k: v for k, v in message.items() if k != "reasoning_content"}
        answer = split_thoughts(message["content"])[3]
        if answer.lstrip().startswith("<think>"):
            raise Unrenderable("an answer is nothing but thoughts")
        message["content"] = answer
    return message


def readable_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, as servers give it to templates."""
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise Unrenderable("a tool call has no name")
    inner = {**inner, "arguments": parsed(inner.get("arguments") or {}, "tool call's arguments")}
    return {**call, "function": inner} if "function" in call else inner


@dataclass(frozen=True)
class Marked:
    """An assistant's message with markers, and what they stand for."""

    message: Message
    thoughts: str
    """Empty: it has none."""
    anchor: str
    """Its answer, or the name of its first tool call when it says nothing else."""
    calls: bool


def with_markers(message: Message, number: int) -> Marked:
    """Put the markers of turn `number` into an assistant's message."""
    marker, thoughts_marker = MARKER.format("answer", number), MARKER.format("thoughts", number)
    opening, thoughts, closing, answer = split_thoughts(message["content"])
    marked, said = dict(message), thoughts if thoughts.strip() else ""
    if str(message.get("reasoning_content") or "").strip():
        marked["reasoning_content"], said = thoughts_marker, message["reasoning_content"]
    elif said:
        thoughts = thoughts_marker
    calls = message.get("tool_calls")
    if not calls or answer.strip():
        marked["content"] = opening + thoughts + closing + marker
        return Marked(marked, said, answer, bool(calls))
    inner = calls[0].get("function", calls[0])
    named = {**inner, "name": marker}
    first = {**calls[0], "function": named} if "function" in calls[0] else named
    marked |= {"content": opening + thoughts + closing + answer, "tool_calls": [first, *calls[1:]]}
    return Marked(marked, said, inner["name"], True)


def trimmed(said: str) -> Iterator[str]:
    """A text as it is, then as templates trim it."""
    for blank in (None, "\n"):
        yield from (said, said.rstrip(blank), said.lstrip(blank), said.strip(blank))


def answer_spans(
    chat: Chat, messages: list[Message], kwargs: dict[str, Any]
) -> tuple[str, list[Span]]:
    """The rendered conversation and what the model wrote in it, turn by turn.

    Raises:
        Unrenderable: the template changes an answer beyond trimming white space, so that its
            place cannot be told.
    """
    text = render(chat.tokenizer, messages, kwargs)
    shown: list[Message] = []
    turns: list[Marked] = []
    for message in messages:
        if message["role"] == "assistant":
            turns.append(with_markers(message, len(turns)))
        shown.append(turns[-1].message if message["role"] == "assistant" else message)
    rest = render(chat.tokenizer, shown, kwargs)
    spans: list[Span] = []
    at = 0

    def step(marker: str, said: str) -> int:
        """Walk over one marker; where the text that stands for it begins."""
        nonlocal at, rest
        before, found, rest = rest.partition(marker)
        if not found or not text.startswith(before, at):
            place = f"what stands before answer {len(spans) + 1}"
            raise Unrenderable(f"the chat template rewrites {place}")
        start = at + len(before)
        following = MARKERS.split(rest, maxsplit=1)[0]
        shape = next((s for s in trimmed(said) if text.startswith(s + following, start)), None)
        if shape is None:
            raise Unrenderable(f"the chat template rewrites answer {len(spans) + 1}")
        at = start + len(shape)
        return start

    for number, turn in enumerate(turns):
        low, thoughts_marker = at, MARKER.format("thoughts", number)
        thoughtful = bool(turn.thoughts) and thoughts_marker in rest
        first = step(thoughts_marker, turn.thoughts) if thoughtful else None
        start = step(MARKER.format("answer", number), turn.anchor)
        if first is not None:
            start = chat.turn_start(text, low, first)
        elif turn.calls:
            start = chat.turn_start(text, low, start)
        spans.append(Span(start, at, turn.calls))
    return text, spans


def encode_many(chat: Chat, records: Iterable[Message]) -> list[Encoded | Unrenderable]:
    """Token ids of whole conversations; every answer and its end-of-turn token is a turn.

    A token that begins before an answer and reaches into it was never the model's to choose, so
    it stays unsupervised. Thoughts and tool calls that the template shows belong to their turn.

    Args:
        chat: the tokenizer and what to supervise.
        records: conversations, with `tools` (a list, or one as JSON) where there are any.

    Returns:
        One result per record, in order; Unrenderable says why there are no tokens.
    """
    results: list[Encoded | Unrenderable] = []
    texts: list[str] = []
    spans: list[list[Span]] = []
    for record in records:
        try:
            messages = [readable(message, chat.thinking) for message in record["conversations"]]
            tools = parsed(record.get("tools"), "tools")
            kwargs = {**chat.kwargs, "tools": tools} if tools else chat.kwargs
            text, spoken = answer_spans(chat, messages, kwargs)
            text.encode()
        except Unrenderable as error:
            results.append(error)
            continue
        except UnicodeEncodeError:
            results.append(Unrenderable("it holds half a character (a lone surrogate)"))
            continue
        results.append(Encoded([], []))
        texts.append(text)
        spans.append(spoken[-1:] if chat.last_turn_only else spoken)
    if not texts:
        return results
    rows = chat.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    encoded = zip(rows["input_ids"], rows["offset_mapping"], spans, strict=True)
    done = (Encoded(ids, token_spans(ids, at, spoken, chat.eos)) for ids, at, spoken in encoded)
    return [result if isinstance(result, Unrenderable) else next(done) for result in results]


def token_spans(
    ids: list[int], offsets: list[tuple[int, int]], spoken: list[Span], eos: set[int]
) -> list[tuple[int, int]]:
    """Characters to tokens, each turn with the token that ends it."""
    starts = [bisect_left(offsets, (span.start,)) for span in spoken] + [len(ids)]
    spans = []
    token = 0
    for span, start, limit in zip(spoken, starts, starts[1:], strict=False):
        first = max(start, token)
        token = bisect_left(offsets, (span.end,), lo=first)
        end = next((t for t in range(token, limit) if ids[t] in eos), None) if span.calls else token
        if end is not None and end < len(ids) and ids[end] in eos:
            token = end + 1
        spans.append((first, token))
    return spans


def encode(
    tokenizer: Any, messages: list[Message], kwargs: dict[str, Any], eos: set[int]
) -> Encoded:
    """One conversation, see `encode_many`; raises Unrenderable."""
    result = encode_many(Chat(tokenizer, kwargs, eos), [{"conversations": messages}])[0]
    if isinstance(result, Unrenderable):
        raise result
    return result
