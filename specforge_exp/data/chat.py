"""Conversations as token ids, in which what the model writes is supervised.

One law, without a word of any template: the tokens of the prompt that a server makes of the
messages before an answer are the first tokens of the sequence, and what follows them, up to the
token that the server stops at, is the turn. Templates show earlier turns otherwise than they were
written (without thoughts, without the empty ones that the prompt opened, ...): a turn that the
whole conversation does not show as serving does becomes a sequence of its own.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import date

from specforge_exp.data.messages import (
    REASONING,
    Message,
    Unrenderable,
    parsed,
    readable,
    split_thoughts,
)
from specforge_exp.data.rendering import (
    DAY,
    Chat,
    Encoded,
    TokenRow,
    cuts,
    dated,
    eos_token_ids,
    glued,
    prompt_ids,
    prompt_text,
    render,
    tokens_of_prefix,
    warn_of_thinking,
)
from specforge_exp.data.turns import Conversation, Turn

__all__ = [
    "Chat",
    "Encoded",
    "Message",
    "Unrenderable",
    "dated",
    "encode_many",
    "eos_token_ids",
    "prompt_ids",
    "prompt_text",
    "readable",
    "render",
    "split_thoughts",
    "warn_of_thinking",
]

CHANGED = "the chat template changes it later (preprocess.changed_turns=leave_out)"


def opened(chat: Chat, record: Message) -> Conversation:
    """A record, checked and with its turns; raises Unrenderable."""
    messages = [readable(message, chat.thinking) for message in record["conversations"]]
    tools = parsed(record.get("tools"), "tools")
    kwargs = dated({**chat.kwargs, "tools": tools} if tools else chat.kwargs, day_of(record))
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    talk = Conversation(chat, messages, kwargs, answers[-1] + 1 if answers else len(messages))
    _ = talk.whole  # it may be refused
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
            prompt = talk.rendered(messages[:at], prompt=True)
        except Unrenderable:  # nobody asked, or not in a way that the template knows
            talk.left_out.append("no prompt can be made of what stands before an answer")
            continue
        talk.waiting.append(Turn(number, at + 1, message, prompt))
    return talk


def day_of(record: Message) -> str:
    """The day on which the target has answered it, which its server's chat template told it."""
    match record.get("regenerated"):
        case {"time": str(time)}:
            with suppress(ValueError):
                return date.fromisoformat(time[:10]).isoformat()
    return DAY


def next_text(talk: Conversation) -> str | None:
    """What the last of the waiting turns and all before it look like in serving.

    Turns for which there is no such text are left out.

    Returns:
        None when no turn is left.
    """
    while talk.waiting:
        text = talk.serving(talk.waiting[-1])
        if isinstance(text, str):
            return text
        talk.left_out.append(str(text))
        talk.waiting.pop()
    return None


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
    own = talk.serving(turn)
    if not isinstance(own, str):
        return None
    body = own.rstrip()
    if row.text.startswith(body):
        limit = row.token_at(len(body))
        stop = stop_of(talk.chat, row, first, limit + 1)
        return first, limit if stop is None else stop + 1
    return replaced_stop(talk.chat, row, own, first)


def stop_of(chat: Chat, row: TokenRow, first: int, limit: int) -> int | None:
    """The first token between two that a server stops at."""
    return next((at for at in range(first, limit) if row.ids[at] in chat.eos), None)


def replaced_stop(chat: Chat, row: TokenRow, own: str, first: int) -> tuple[int, int] | None:
    """The tokens of a turn whose stop a template replaces by another token in later prompts."""
    ends = (own.find(stop, row.offsets[first][0]) for stop in chat.stops)
    shown = own[: min((at for at in ends if at >= 0), default=0)].rstrip()
    if not row.text.startswith(shown):  # seen without tokenising a conversation for each turn
        return None
    (alone,) = chat.rows_after([row], [own])
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
    shown = {number: span for number, span in spans.items() if span}
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
        before, new = [talk.row for talk in going], [text for text in texts if text is not None]
        for talk, row in zip(going, chat.rows_after(before, new), strict=True):
            talk.row = row
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
