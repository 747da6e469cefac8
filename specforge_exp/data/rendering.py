"""Conversations as text and tokens, by the model's own chat template."""

import json
import logging
import re
from bisect import bisect_left
from dataclasses import dataclass
from datetime import date
from functools import cache, cached_property
from typing import Any

from specforge_exp.data.messages import MARKS, Message, Unrenderable, joined
from specforge_exp.target.files import generation_config

log = logging.getLogger(__name__)

DAY = "2025-01-01"
"""What a chat template is told as today where the day of an answer is not known, and by bench."""
TODAY = "the day that is today"
"""Among the arguments of a template, where it is not the real one."""
ASKS_TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
REMEMBERED = 256
"""Characters of a text whose tokens are remembered: headers, not conversations."""


def eos_token_ids(path: str, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    listed = generation_config(path).eos_token_id
    ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return {number for number in ids if number is not None}


def dated(kwargs: dict[str, Any], day: str = DAY) -> dict[str, Any]:
    """Arguments of a chat template that is told this day, YYYY-MM-DD, as today, where it asks for
    it (Llama 3.2 and later, Mistral Small, gpt-oss, ...): tomorrow the same makes the same."""
    return {**kwargs, TODAY: day}


@cache
def on_day(template: str, day: str) -> str:
    """A template whose questions for today's date are answered. They cannot be given as a function:
    transformers makes text of whatever is no plain data."""
    told = date.fromisoformat(day)
    return ASKS_TODAY.sub(lambda asks: json.dumps(told.strftime(asks[2])), template)


def render(tokenizer: Any, messages: list[Message], kwargs: dict[str, Any]) -> str:
    """The conversation as text; raises Unrenderable with the template's own complaint."""
    options = {key: value for key, value in kwargs.items() if key != TODAY}
    try:
        if TODAY in kwargs and "strftime_now" in str(tokenizer.chat_template):
            template = tokenizer.get_chat_template(tools=kwargs.get("tools"))
            options["chat_template"] = on_day(template, kwargs[TODAY])
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates raise whatever their author chose
        raise refused(error) from None
    return text


def refused(error: Exception) -> Unrenderable:
    """What a template's complaint is to us."""
    return Unrenderable(f"the chat template refuses it: {error}")


def prompt_text(tokenizer: Any, messages: list[Message], kwargs: dict[str, Any]) -> str:
    """The conversation so far and the header after which the model answers."""
    return render(tokenizer, messages, {**kwargs, "add_generation_prompt": True})


def prompt_ids(
    tokenizer: Any, messages: list[Message], kwargs: dict[str, Any], tools: Any = None
) -> list[int]:
    """`prompt_text` as token ids; `tools` are described in it."""
    text = prompt_text(tokenizer, messages, {**kwargs, "tools": tools} if tools else kwargs)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def warn_of_thinking(option: str, tokenizer: Any, kwargs: dict[str, Any]) -> None:
    """Say so where thinking is asked for, or not to be, and the template's prompts do not change.

    Args:
        option: what asks, e.g. bench.thinking=off.
        tokenizer: with the template.
        kwargs: for it.
    """
    probe = [{"role": "user", "content": "x"}]
    switched = ({**kwargs, "enable_thinking": on} for on in (True, False))
    try:
        prompts = {prompt_text(tokenizer, probe, each) for each in switched}
    except Unrenderable:
        return
    if len(prompts) == 1:
        log.warning(
            "%s changes no prompt: the chat template knows no enable_thinking; a switch of another "
            "name is given with model.chat_template_kwargs",
            option,
        )  # fmt: skip


class Spelling:
    """The text of tokens as they come: what each adds, once its characters are whole."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = self.told = 0
        """Where the last tokens that were told begin and end: a tokenizer may spell the first token
        of a text otherwise, so they are spelt again before the new ones."""

    def add(self, token: int) -> str:
        """What a token adds; "" within a character."""
        self.tokens.append(token)
        text = self.rest()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.start, self.told = self.told, len(self.tokens)
        return text

    def rest(self) -> str:
        """What was not told yet."""
        before, both = (
            self.tokenizer.decode(
                self.tokens[self.start : end],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            for end in (self.told, None)
        )
        return str(both[len(before) :])


def refusal(chat: "Chat", messages: list[Message], kwargs: dict[str, Any], complaint: str) -> str:
    """The template's complaint, with the way out where a system message is what it refuses."""
    together = joined(messages)
    if together is messages:
        return complaint
    try:
        render(chat.tokenizer, together, kwargs)
    except Unrenderable:
        return complaint
    return (
        f"{complaint.rstrip('. ')}; prep with data.system=join puts the system message in front of "
        "the first user turn"
    )


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
    changed_turns: str = "apart"
    """See preprocess.changed_turns."""

    @cached_property
    def added(self) -> dict[int, str]:
        """Tokens that cut a text where they are written out: what stands on either side is
        tokenised for itself."""
        tokens = self.tokenizer.added_tokens_decoder
        return {number: token.content.strip() for number, token in tokens.items()}

    @cached_property
    def dividers(self) -> set[int]:
        """Of these tokens those that are looked for in a text as it stands, before all else."""
        tokens = self.tokenizer.added_tokens_decoder.items()
        return {number for number, t in tokens if not (t.normalized or t.single_word)}

    @cached_property
    def reach(self) -> int:
        """Characters that tell which of these tokens begins at a place."""
        return max((len(token) for token in self.tokenizer.added_tokens_encoder), default=0)

    @cached_property
    def stops(self) -> list[str]:
        """The text of `eos`."""
        names = self.tokenizer.convert_ids_to_tokens(sorted(self.eos))
        return [name for name in names if name]

    @cached_property
    def marks(self) -> tuple[str, str] | None:
        """What opens and closes thoughts, where the template mentions one of both."""
        template = str(self.tokenizer.chat_template)
        marks = (pair for pair in MARKS if any(mark.strip() in template for mark in pair))
        return next(marks, None)

    @cached_property
    def headers(self) -> dict[str, list[int]]:
        """Tokens of short texts that come again and again."""
        return {}

    def ids_of(self, text: str) -> list[int]:
        """Tokens of a text as it stands."""
        if text in self.headers:
            return self.headers[text]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(text) <= REMEMBERED:
            self.headers[text] = ids
        return ids

    def rows_of(self, texts: list[str]) -> "list[TokenRow]":
        """Tokens and where they stand."""
        if not texts:
            return []
        rows = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        both = zip(texts, rows["input_ids"], rows["offset_mapping"], strict=True)
        return [TokenRow(text, ids, offsets) for text, ids, offsets in both]

    def rows_after(self, before: "list[TokenRow]", texts: list[str]) -> "list[TokenRow]":
        """The same; what a text begins with like the row given for it is not tokenised again."""
        heads = [head_of(self, row, text) for row, text in zip(before, texts, strict=True)]
        both = list(zip(heads, texts, strict=True))
        tails = self.rows_of([text[len(head.text) :] for head, text in both])
        return [tail.behind(head) for head, tail in zip(heads, tails, strict=True)]


@dataclass(frozen=True)
class TokenRow:
    """A text and its tokens."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    """Characters [start, end) of each token."""

    def token_at(self, character: int) -> int:
        """The first token that begins there or later."""
        return bisect_left(self.offsets, (character,))

    def behind(self, head: "TokenRow") -> "TokenRow":
        """Both, one after the other."""
        start = len(head.text)
        offsets = [(start + first, start + end) for first, end in self.offsets]
        return TokenRow(head.text + self.text, head.ids + self.ids, head.offsets + offsets)


NOTHING = TokenRow("", [], [])


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


def tokens_of_prefix(chat: Chat, row: TokenRow, prefix: str) -> int | None:
    """How many of a row's tokens are those of `prefix`, with which its text begins.

    Tokens that cut the text make this cheap: behind the last of them before the end of `prefix`
    stands a header, whose tokens are remembered, and what stands before it is the same in both.

    Returns:
        None when the tokens of the prefix are others: its end and what follows merge.
    """
    end = row.token_at(len(prefix))
    cut = next((at for at in range(end - 1, -1, -1) if cuts(chat, row, at)), 0)
    tail = chat.ids_of(prefix[row.offsets[cut][0] if cut else 0 :])
    first = cut + len(tail)
    return first if row.ids[cut:first] == tail else None


def head_of(chat: Chat, row: TokenRow, text: str) -> TokenRow:
    """Tokens that a row and a text begin with, up to the last one before which the tokenizer cuts
    both: those of what follows are the same whatever stands before it."""
    low, alike = 0, min(len(row.text), len(text))
    while low < alike:
        middle = (low + alike + 1) // 2
        if row.text[low:middle] == text[low:middle]:
            low = middle
        else:
            alike = middle - 1
    for at in range(row.token_at(alike - chat.reach) - 1, 0, -1):
        start, end = row.offsets[at]
        if row.ids[at] in chat.dividers and end + chat.reach <= alike and cuts(chat, row, at):
            return TokenRow(text[:start], row.ids[:at], row.offsets[:at])
    return NOTHING


def cuts(chat: Chat, row: TokenRow, at: int) -> bool:
    """Whether a token stands for a text that cuts, not for a byte or a word nobody knows."""
    content = chat.added.get(row.ids[at])
    return content is not None and row.text[slice(*row.offsets[at])].strip() == content


def glued(chat: Chat, prompt: str, rest: str) -> tuple[TokenRow, int] | None:
    """A row of the prompt's own tokens and those of what follows, where both together are others.

    Returns:
        The row and how many tokens the prompt has; None when the tokenizer cannot say the rest by
        itself (it puts a space before every text).
    """
    whole, before = chat.rows_of([prompt + rest, prompt])
    spelt = chat.tokenizer.decode(whole.ids)
    for lead in ("", "\n"):
        ids, start = chat.ids_of(lead) if lead else [], len(prompt) - len(lead)
        (after,) = chat.rows_of([lead + rest])
        following = after.ids[len(ids) :]
        both = before.ids + following
        if after.ids[: len(ids)] == ids and chat.tokenizer.decode(both) == spelt:
            places = [(start + a, start + b) for a, b in after.offsets[len(ids) :]]
            return TokenRow(whole.text, both, before.offsets + places), len(before.ids)
    return None
