"""The turns of a conversation, and what the model writes in each: the text behind its prompt."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from specforge_exp.data.messages import (
    MARKS,
    REASONING,
    Message,
    Unrenderable,
    reasoning_of,
    split_thoughts,
)
from specforge_exp.data.rendering import (
    NOTHING,
    Chat,
    Encoded,
    TokenRow,
    prompt_text,
    refusal,
    render,
)
from specforge_exp.data.templates import Renderings

PROBE: Message = {"role": "user", "content": "x"}
"""What may follow an answer."""
MARKER = "⟦answer⟧"
ANSWER: Message = {"role": "assistant", "content": MARKER}


def end_of_answers(chat: Chat) -> str | None:
    """The token with which the chat template ends an answer: one at which a server stops, else the
    first behind it; None where it writes none."""
    try:
        shown = render(chat.tokenizer, [PROBE, ANSWER], chat.kwargs)
    except Unrenderable:
        return None
    ids = chat.ids_of(shown.rpartition(MARKER)[2].lstrip())
    ends = [*(token for token in ids if token in chat.eos), *ids[:1]]
    return chat.added.get(ends[0]) if ends else None


def header_of(tokenizer: Any, kwargs: dict[str, Any], thoughts: str = "") -> str:
    """What the chat template shows between the end of a prompt and an answer to it, thoughts among
    it: a channel's name; "" where it shows the prompt otherwise or refuses."""
    shown = ANSWER | (dict.fromkeys(REASONING[:2], thoughts) if thoughts else {})
    try:
        prompt = prompt_text(tokenizer, [PROBE], kwargs)
        before, found, _ = render(tokenizer, [PROBE, shown], kwargs).partition(MARKER)
    except Unrenderable:
        return ""
    return before.removeprefix(prompt) if found and before.startswith(prompt) else ""


def own_marks(tokenizer: Any, kwargs: dict[str, Any]) -> list[str]:
    """Special tokens that tell what a model thinks and says apart, by its chat template: names of
    channels, marks of thoughts. Without them a text has words in it that are no part of an answer;
    those that stand around an answer alone (Cohere's) do not count."""
    template = str(tokenizer.chat_template)
    texts = ["".join(pair) + "x" for pair in MARKS if pair[0].strip() in template]
    texts += [header_of(tokenizer, kwargs, thoughts) for thoughts in ("x", "")]
    marks: dict[int, None] = {}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids, skip_special_tokens=True).strip():
            marks |= dict.fromkeys(token for token in ids if token in tokenizer.all_special_ids)
    return list(tokenizer.convert_ids_to_tokens([*marks]))


class Unlike(Unrenderable):
    """One turn cannot be shown as serving shows it; the others may be."""


@dataclass(frozen=True)
class Turn:
    """An answer and what a server asks the model before it."""

    number: int
    """Of the answers, from 1."""
    until: int
    """Messages up to and with it."""
    message: Message
    prompt: str

    @property
    def answer(self) -> str:
        """What it says, without its thoughts, trimmed as templates may."""
        return split_thoughts(self.message["content"])[3].strip()

    @property
    def thoughts(self) -> str:
        """What it thinks, trimmed; "" without."""
        inline = split_thoughts(self.message["content"])[1]
        return (reasoning_of(self.message) or inline).strip()


@dataclass
class Conversation:
    """A conversation on its way to tokens."""

    chat: Chat
    messages: list[Message]
    kwargs: dict[str, Any]
    """For the template, tools with them."""
    end: int
    """Messages up to and with the last answer, or all."""
    waiting: list[Turn] = field(default_factory=list)
    """Turns that no sequence supervises yet."""
    left_out: list[str] = field(default_factory=list)
    sequences: list[Encoded] = field(default_factory=list)
    row: TokenRow = NOTHING
    """The text that was tokenised last."""
    texts: dict[int, str | Unrenderable] = field(default_factory=dict)
    """What `serving` has found, by the turn's number."""

    @cached_property
    def renderings(self) -> Renderings:
        """By the template."""
        return Renderings(self.chat.tokenizer, self.messages, self.kwargs)

    @cached_property
    def whole(self) -> str:
        """As text up to the end; raises Unrenderable."""
        return self.rendered(self.messages[: self.end])

    def serving(self, turn: Turn) -> str | Unrenderable:
        """The text up to a turn, or why there is none."""
        if turn.number not in self.texts:
            try:
                self.texts[turn.number] = text_until(self, turn)
            except Unrenderable as error:
                self.texts[turn.number] = Unrenderable(str(error))
        return self.texts[turn.number]

    def rendered(self, messages: list[Message], prompt: bool = False) -> str:
        """As text; raises Unrenderable."""
        try:
            text = self.renderings.text(messages, prompt)
            text.encode()
        except Unrenderable as error:
            raise Unrenderable(refusal(self.chat, messages, self.kwargs, str(error))) from None
        except UnicodeEncodeError:
            raise Unrenderable("it holds half a character (a lone surrogate)") from None
        return text


def text_until(talk: Conversation, turn: Turn) -> str:
    """The conversation up to a turn: its prompt and what the model writes, with its end.

    Raises:
        Unlike: the template changes the answer, or its prompt opens what the answer lacks; or the
            answer has a text within that becomes a token at which a server stops.
    """
    calls = turn.message.get("tool_calls") or []
    for part in (turn.answer, turn.thoughts, json.dumps(calls, ensure_ascii=False)):
        if any(stop in part.removesuffix(stop) for stop in talk.chat.stops):
            raise Unlike("an answer spells a token that ends answers before its end")
    shown = talk.whole if turn.until == talk.end else talk.rendered(talk.messages[: turn.until])
    said = shown.removeprefix(turn.prompt) if shown.startswith(turn.prompt) else behind(talk, turn)
    if said is None or cut_thoughts(talk, turn, said):
        said = written(talk, turn, shown)
    text = turn.prompt + said
    if not all(any(name in said for name in names_of(call)) for call in calls):
        raise Unlike("the chat template does not show a call of a tool")
    if turn.answer not in said and not calls:
        raise Unlike("the chat template rewrites an answer")
    if any(stop in said for stop in talk.chat.stops):
        return text
    return with_stop(talk, turn, text)


def names_of(call: dict[str, Any]) -> list[str]:
    """What a template may show of a call: the function, or an id that holds it (Kimi)."""
    return [call.get("function", call)["name"], *([str(call["id"])] if call.get("id") else [])]


def behind(talk: Conversation, turn: Turn) -> str | None:
    """What a template shows of an answer behind the end of its prompt, where what it shows before
    that differs: earlier thoughts, the system's words, thoughts that the prompt closes.

    The end is what stands behind the last question in both.

    Returns:
        None where the prompt ends otherwise.
    """
    *before, asked = talk.messages[: turn.until - 1]
    marked = {**asked, "content": MARKER}
    try:
        prompt = talk.rendered([*before, marked], prompt=True)
        shown = talk.rendered([*before, marked, turn.message])
    except Unrenderable:
        return None
    header, rest = (text.rpartition(MARKER)[2] for text in (prompt, shown))
    if not header or not turn.prompt.endswith(header):
        return None
    headers = (header, without_thoughts(header))
    return next((rest.removeprefix(head) for head in headers if rest.startswith(head)), None)


def without_thoughts(header: str) -> str:
    """The end of a prompt up to thoughts that it opens and closes itself."""
    for opening, closing in MARKS:
        before, _, inner = header.rpartition(opening.strip())
        if inner != header and inner.rstrip().endswith(closing.strip()):
            return before
    return header


def cut_thoughts(talk: Conversation, turn: Turn, said: str) -> bool:
    """Whether thoughts that the model has written are not among what the template shows, or its
    prompt closes them.

    A template that knows no thoughts leaves those beside the content out for good: they are not its
    model's.
    """
    if not turn.thoughts or closes(turn.prompt):
        return bool(turn.thoughts)
    marks = talk.chat.marks
    inline = bool(split_thoughts(turn.message["content"])[1].strip())
    if inline and marks not in (None, MARKS[0]):  # which a model with marks of its own never writes
        return True
    hidden = said.count(turn.thoughts) <= turn.answer.count(turn.thoughts)
    return hidden and (inline or marks is not None)


def opens(prompt: str) -> bool:
    """Whether a prompt ends within thoughts."""
    return prompt.rstrip().endswith(tuple(opening.strip() for opening, _ in MARKS))


def closes(prompt: str) -> bool:
    """Whether a prompt ends behind thoughts."""
    return prompt.rstrip().endswith(tuple(closing.strip() for _, closing in MARKS))


def written(talk: Conversation, turn: Turn, shown: str) -> str:
    """What the model writes after its prompt, where the template shows it otherwise.

    Raises:
        Unlike: that cannot be told.
    """
    if turn.thoughts and closes(turn.prompt):
        raise Unlike(
            "its prompt closes the thoughts that an answer has (preprocess.thinking=out takes them "
            "out)"
        )
    opened = opens(turn.prompt)
    if opened and not turn.thoughts:
        raise Unlike(
            "its prompt opens thoughts, and an answer has none (regen.thinking=kept records them, "
            "model.chat_template_kwargs may switch them off)"
        )
    if not turn.thoughts or not turn.answer or turn.message.get("tool_calls"):
        raise Unlike("the chat template shows an answer without the prompt that it follows")
    if talk.chat.marks is None:
        raise Unlike("how this model writes thoughts is not known, and an answer has some")
    opening, closing = marks = talk.chat.marks
    _, inline, _, answer = split_thoughts(turn.message["content"])
    raw = str(turn.message["content"])
    if not inline.strip() or marks != MARKS[0]:
        raw = f"{opening}{turn.thoughts}{closing}{answer.lstrip()}"
    if opened:
        raw = raw.lstrip().removeprefix(opening.strip())
        raw = raw.lstrip() if turn.prompt[-1].isspace() else raw
    tail = talk.rendered([*talk.messages[: turn.until - 1], ANSWER]).rpartition(MARKER)[2]
    for ending in (answer.lstrip(), answer.strip()):  # as it is, or as templates trim it
        if shown.rstrip().endswith((ending + tail).rstrip()):
            return raw.rstrip() + ending[len(turn.answer) :] + tail
    raise Unlike("the chat template rewrites an answer")


def with_stop(talk: Conversation, turn: Turn, text: str) -> str:
    """The text up to a turn with the stop that the next message begins with, where a template has
    none before."""
    calls = turn.message.get("tool_calls")
    role, answer = ("tool", turn.answer) if calls else ("user", MARKER)
    bare = {**turn.message, "content": answer}
    bare.pop("reasoning_content", None)
    before = [*talk.messages[: turn.until - 1], bare]
    try:
        texts = talk.rendered(before), talk.rendered([*before, {**PROBE, "role": role}])
    except Unrenderable:
        return text
    # What stands before an answer may change with a further question.
    body, following = texts if calls else (shown.rpartition(MARKER)[2] for shown in texts)
    body = body.rstrip()
    if not following.startswith(body):
        return text
    rest = following[len(body) :]
    space = rest[: len(rest) - len(rest.lstrip())]
    stop = next((stop for stop in talk.chat.stops if rest.startswith(space + stop)), None)
    return text.rstrip() + space + stop if stop else text
