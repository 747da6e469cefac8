"""Conversations as token ids, in which what the model writes is supervised.

One law, without a word of any template: the tokens of the prompt that a server makes of the
messages before an answer are the first tokens of the sequence, and what follows them, up to the
token that the server stops at, is the turn. Templates show earlier turns otherwise than they were
written (without thoughts, without the empty ones that the prompt opened, ...): a turn that the
whole conversation does not show as serving does becomes a sequence of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from specforge_exp.data.messages import (
    REASONING,
    Message,
    Unrenderable,
    parsed,
    readable,
    reasoning_of,
    split_thoughts,
)
from specforge_exp.data.rendering import (
    Chat,
    TokenRow,
    cuts,
    eos_token_ids,
    glued,
    prompt_ids,
    prompt_text,
    refusal,
    render,
    tokens_of_prefix,
    warn_of_thinking,
)

__all__ = [
    "Chat",
    "Encoded",
    "Message",
    "Unrenderable",
    "encode_many",
    "eos_token_ids",
    "prompt_ids",
    "prompt_text",
    "readable",
    "render",
    "split_thoughts",
    "warn_of_thinking",
]

PROBE: Message = {"role": "user", "content": "x"}
"""What may follow an answer."""
MARKER = "⟦answer⟧"
OPENING, CLOSING = "<think>", "</think>"
CHANGED = "the chat template changes it later (preprocess.changed_turns=leave_out)"


class Unlike(Unrenderable):
    """One turn cannot be shown as serving shows it; the others may be."""


@dataclass(frozen=True)
class Encoded:
    """Token ids, and the supervised tokens [first, last) of each turn."""

    ids: list[int]
    spans: list[tuple[int, int]]
    numbers: tuple[int, ...] = ()
    """Which answers of the conversation the turns are, from 1."""
    apart: tuple["Encoded", ...] = ()
    """Sequences of other turns, which serving sees otherwise than this one shows them."""
    left_out: tuple[str, ...] = ()
    """Why further turns are supervised nowhere, one reason each."""

    @property
    def turns(self) -> list[int]:
        """Per token the number of its turn from 1, or 0."""
        turns = [0] * len(self.ids)
        for number, (first, last) in enumerate(self.spans, 1):
            turns[first:last] = [number] * (last - first)
        return turns


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
    waiting: list[Turn] = field(default_factory=list)
    """Turns that no sequence supervises yet."""
    left_out: list[str] = field(default_factory=list)
    sequences: list[Encoded] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    """The template's renderings, by how many messages they show."""

    def until(self, messages: int) -> str:
        """The first messages as text; raises Unrenderable."""
        if messages not in self.texts:
            self.texts[messages] = self.rendered(self.messages[:messages])
        return self.texts[messages]

    def rendered(self, messages: list[Message]) -> str:
        """As text; raises Unrenderable."""
        try:
            text = render(self.chat.tokenizer, messages, self.kwargs)
            text.encode()
        except Unrenderable as error:
            raise Unrenderable(refusal(self.chat, messages, self.kwargs, str(error))) from None
        except UnicodeEncodeError:
            raise Unrenderable("it holds half a character (a lone surrogate)") from None
        return text


def opened(chat: Chat, record: Message) -> Conversation:
    """A record, checked and with its turns; raises Unrenderable."""
    messages = [readable(message, chat.thinking) for message in record["conversations"]]
    tools = parsed(record.get("tools"), "tools")
    kwargs = {**chat.kwargs, "tools": tools} if tools else chat.kwargs
    talk = Conversation(chat, messages, kwargs)
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    talk.until(answers[-1] + 1 if answers else len(messages))  # it may be refused as a whole
    for number, at in enumerate(answers, 1):
        if chat.last_turn_only and number < len(answers):
            continue
        message = messages[at]
        if message.get("weight") == 0:
            talk.left_out.append("an answer has the weight 0")
            continue
        said = message["content"].strip(), *map(message.get, ("tool_calls", REASONING[0]))
        if not any(said):
            talk.left_out.append("an answer is empty")
            continue
        try:
            prompt = prompt_text(chat.tokenizer, messages[:at], kwargs)
        except Unrenderable:  # nobody asked, or not in a way that the template knows
            talk.left_out.append("no prompt can be made of what stands before an answer")
            continue
        talk.waiting.append(Turn(number, at + 1, message, prompt))
    return talk


def next_text(talk: Conversation) -> str | None:
    """What the last of the waiting turns and all before it look like in serving.

    Turns for which there is no such text are left out.

    Returns:
        None when no turn is left.
    """
    while talk.waiting:
        try:
            return text_until(talk, talk.waiting[-1])
        except Unlike as reason:
            talk.left_out.append(str(reason))
            talk.waiting.pop()
    return None


def text_until(talk: Conversation, turn: Turn) -> str:
    """The conversation up to a turn: its prompt and what the model writes, with its end.

    Raises:
        Unlike: the template changes the answer, or its prompt opens what the answer lacks.
    """
    shown = talk.until(turn.until)
    said = shown.removeprefix(turn.prompt) if shown.startswith(turn.prompt) else None
    if said is None or cut_thoughts(turn, said):
        said = written(talk, turn, shown)
    text = turn.prompt + said
    calls = turn.message.get("tool_calls") or []
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


def cut_thoughts(turn: Turn, said: str) -> bool:
    """Whether thoughts that the model has written are not among what the template shows.

    A template that knows no thoughts beside the content leaves them out for good: they are not its
    model's, unless its prompt opens them.
    """
    inline = bool(split_thoughts(turn.message["content"])[1].strip())
    return bool(turn.thoughts) and turn.thoughts not in said and (inline or opens(turn.prompt))


def opens(prompt: str) -> bool:
    """Whether a prompt ends within thoughts."""
    return prompt.rstrip().endswith(OPENING)


def written(talk: Conversation, turn: Turn, shown: str) -> str:
    """What the model writes after its prompt, where the template shows it otherwise.

    Raises:
        Unlike: that cannot be told.
    """
    opening = opens(turn.prompt)
    if turn.thoughts and turn.prompt.rstrip().endswith(CLOSING):
        raise Unlike(
            "its prompt closes the thoughts that an answer has (preprocess.thinking=out takes them "
            "out)"
        )
    if opening and not turn.thoughts:
        raise Unlike(
            "its prompt opens thoughts, and an answer has none (regen.thinking=kept records them, "
            "model.chat_template_kwargs may switch them off)"
        )
    if not turn.thoughts or not turn.answer or turn.message.get("tool_calls"):
        raise Unlike("the chat template shows an answer without the prompt that it follows")
    _, inline, _, answer = split_thoughts(turn.message["content"])
    raw = str(turn.message["content"])
    if not inline.strip():
        raw = f"{OPENING}\n{turn.thoughts}\n{CLOSING}\n\n{answer.lstrip()}"
    if opening:
        raw = raw.lstrip().removeprefix(OPENING)
        raw = raw.lstrip() if turn.prompt[-1].isspace() else raw
    bare = {"role": "assistant", "content": MARKER}
    tail = talk.rendered([*talk.messages[: turn.until - 1], bare]).rpartition(MARKER)[2]
    for ending in (answer.lstrip(), answer.strip()):  # as it is, or as templates trim it
        if shown.rstrip().endswith((ending + tail).rstrip()):
            return raw.rstrip() + ending[len(turn.answer) :] + tail
    raise Unlike("the chat template rewrites an answer")


def with_stop(talk: Conversation, turn: Turn, text: str) -> str:
    """The text up to a turn with the stop that the next message begins with, where a template has
    none before."""
    role = "tool" if turn.message.get("tool_calls") else "user"
    bare = {**turn.message, "content": turn.answer}
    bare.pop("reasoning_content", None)
    before = [*talk.messages[: turn.until - 1], bare]
    try:
        body = talk.rendered(before).rstrip()
        following = talk.rendered([*before, {**PROBE, "role": role}])
    except Unrenderable:
        return text
    if not following.startswith(body):
        return text
    rest = following[len(body) :]
    space = rest[: len(rest) - len(rest.lstrip())]
    stop = next((stop for stop in talk.chat.stops if rest.startswith(space + stop)), None)
    return text.rstrip() + space + stop if stop else text


def span_in(talk: Conversation, row: TokenRow, turn: Turn) -> tuple[int, int] | None:
    """The tokens of a turn in a row that ends with a later one; None where it is shown otherwise
    than in serving."""
    if not row.text.startswith(turn.prompt):
        return None
    first = tokens_of_prefix(talk.chat, row, turn.prompt)
    if first is None:
        return None
    stop = stop_of(talk.chat, row, first, len(row.ids))
    plain = not turn.thoughts and not turn.message.get("tool_calls")
    if plain and stop is not None:
        said = row.text[len(turn.prompt) : row.offsets[stop][0]]
        if said.strip() == turn.answer:
            return first, stop + 1
    try:
        own = text_until(talk, turn)
    except Unlike:
        return None
    body = own.rstrip()
    if row.text.startswith(body):
        limit = row.token_at(len(body))
        stop = stop_of(talk.chat, row, first, limit + 1)
        return first, limit if stop is None else stop + 1
    return replaced_stop(talk.chat, row, own, first)


def stop_of(chat: Chat, row: TokenRow, first: int, limit: int) -> int | None:
    """The first token between two that a server stops at."""
    tokens = enumerate(row.ids[first:limit], first)
    return next((at for at, token in tokens if token in chat.eos), None)


def replaced_stop(chat: Chat, row: TokenRow, own: str, first: int) -> tuple[int, int] | None:
    """The tokens of a turn whose stop a template replaces by another token in later prompts."""
    (alone,) = chat.rows_of([own])
    stop = stop_of(chat, alone, first, len(alone.ids))
    if stop is None or stop >= len(row.ids) or row.ids[:stop] != alone.ids[:stop]:
        return None
    return (first, stop + 1) if cuts(chat, row, stop) else None


def take(talk: Conversation, row: TokenRow) -> None:
    """Supervise in a row, which shows the last of the waiting turns, all turns that it can."""
    last = talk.waiting[-1]
    first = tokens_of_prefix(talk.chat, row, last.prompt)
    if first is None:
        again = glued(talk.chat, last.prompt, row.text[len(last.prompt) :])
        if again is None:
            talk.left_out.append("the tokenizer joins an answer to the prompt before it")
            talk.waiting.pop()
            return
        row, first = again
    stop = stop_of(talk.chat, row, first, len(row.ids))
    end = row.token_at(len(row.text.rstrip())) if stop is None else stop + 1
    spans = {turn.number: span_in(talk, row, turn) for turn in talk.waiting[:-1]}
    spans[last.number] = first, end
    shown = {number: span for number, span in sorted(spans.items()) if span}
    talk.sequences.append(Encoded(row.ids, list(shown.values()), tuple(shown)))
    talk.waiting = [turn for turn in talk.waiting if turn.number not in shown]
    if talk.waiting and talk.chat.changed_turns == "leave_out":
        talk.left_out += [CHANGED] * len(talk.waiting)
        talk.waiting = []


def encode_many(chat: Chat, records: Iterable[Message]) -> list[Encoded | Unrenderable]:
    """Token ids of whole conversations, in which every answer with its end is a turn.

    What follows the last answer is left away.

    Args:
        chat: the tokenizer and what to supervise.
        records: conversations, with `tools` (a list, or one as JSON) where there are any.

    Returns:
        One result per record, in order: the sequence that shows the last turn, with those of turns
        that it cannot show in `apart`. Unrenderable says why there are no tokens.
    """
    talks: list[Conversation | Unrenderable] = []
    for record in records:
        try:
            talks.append(opened(chat, record))
        except Unrenderable as error:
            talks.append(error)
    going = [talk for talk in talks if isinstance(talk, Conversation)]
    while going:
        texts = [next_text(talk) for talk in going]
        going = [talk for talk, text in zip(going, texts, strict=True) if text is not None]
        rows = chat.rows_of([text for text in texts if text is not None])
        for talk, row in zip(going, rows, strict=True):
            take(talk, row)
        going = [talk for talk in going if talk.waiting]
    return [talk if isinstance(talk, Unrenderable) else result_of(talk) for talk in talks]


def result_of(talk: Conversation) -> Encoded | Unrenderable:
    """What became of a conversation whose turns have all been dealt with."""
    left_out = tuple(talk.left_out)
    if talk.sequences:
        main, *others = talk.sequences
        return replace(main, apart=tuple(others), left_out=left_out)
    if left_out:
        return Unrenderable(left_out[0])
    return Encoded(talk.chat.ids_of(talk.rendered(talk.messages)), [])
