"""What every engine of bench is told: how prompts are rendered, and how answers end."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from specforge_exp.bench.acceptance import PairedAnswer
from specforge_exp.bench.speculative import Decoding
from specforge_exp.config import Config
from specforge_exp.data.chat import (
    Message,
    Unrenderable,
    dated,
    eos_token_ids,
    prompt_ids,
    warn_of_thinking,
)
from specforge_exp.data.messages import MARKS
from specforge_exp.data.turns import header_of

log = logging.getLogger(__name__)


class Talk(NamedTuple):
    """What is asked."""

    asks: list[list[Message]]
    """Turn by turn."""
    tools: list[Any] | None = None
    """That its prompts describe."""


@dataclass(frozen=True)
class Heading:
    """What a model writes besides what it says, where the text would keep words of it, as the
    tokens around them are left out."""

    header: tuple[int, ...] = ()
    """Between the prompt and an answer, or its thoughts and the answer: a channel's name."""
    thoughts: tuple[int, int] | None = None
    """The first token of the marks that thoughts begin with, the last of those at their end."""


@dataclass(frozen=True)
class Asking:
    """How to ask."""

    tokenizer: Any
    decoding: Decoding
    template_kwargs: dict[str, Any]
    """Passed to the chat template."""
    training_keys: torch.Tensor | None
    """Keys of the training answers' 8-grams; None: not known."""
    room: int
    """Tokens of a prompt, at most."""
    seed: int
    """Of the samples."""
    heading: Heading = Heading()

    def encode(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """The prompt of a conversation so far; [] where the template refuses it."""
        try:
            return prompt_ids(self.tokenizer, messages, self.template_kwargs, tools)
        except Unrenderable as error:
            log.warning("bench: a prompt is left out: %s", error)
            return []

    def sampled(self, place: str) -> Decoding:
        """`decoding` with the seed of one answer, whatever is asked beside it.

        Args:
            place: names it: data set, conversation, turn, whether with the draft.
        """
        digest = hashlib.blake2b(f"{self.seed}/{place}".encode(), digest_size=4).digest()
        return replace(self.decoding, seed=int.from_bytes(digest) >> 1)

    def decode(self, tokens: list[int]) -> str:
        """The text of an answer, as a later prompt has it; "" where it ended before it began."""
        said = tokens[begin_of(tokens, self.heading, self.tokenizer) :]
        text: str = self.tokenizer.decode(said, skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class SetAnswers:
    """The answers to one data set."""

    requests: list[PairedAnswer]
    seconds: float
    """That all answers with the draft took, as many at a time as bench.concurrency."""
    seconds_alone: float | None
    """Likewise without it; None: not measured."""


BenchEngine = Callable[[Config, Asking, dict[str, list[Talk]]], dict[str, SetAnswers]]
"""What an engine of bench is: the answers to all data sets.

Raises:
    InputError: it cannot answer, or never speculated.
"""


def heading_of(tokenizer: Any, kwargs: dict[str, Any]) -> Heading:
    """What stands before what an answer says, by the tokenizer and its chat template."""
    pairs = [[tokenizer(mark.strip(), add_special_tokens=False) for mark in pair] for pair in MARKS]
    ends = [(opening["input_ids"][0], closing["input_ids"][-1]) for opening, closing in pairs]
    left_out = [pair for pair in ends if len({*pair} & {*tokenizer.all_special_ids}) == 2]
    header = header_of(tokenizer, kwargs)
    ids = tokenizer(header, add_special_tokens=False)["input_ids"]
    hidden = tokenizer.decode(ids, skip_special_tokens=True) != header
    return Heading(tuple(ids) if hidden else (), left_out[0] if left_out else None)


def begin_of(tokens: list[int], heading: Heading, tokenizer: Any) -> int:
    """Where in an answer's tokens stands what it says: behind the last header or the end of its
    thoughts, and nowhere where they have a part of either alone."""
    header, begin = heading.header, 0
    if heading.thoughts:
        opening, closing = heading.thoughts
        ends = [at for at, token in enumerate(tokens) if token == closing]
        begin = ends[-1] + 1 if ends else len(tokens) * (opening in tokens)
    if not header:
        return begin
    size = len(header)
    begins = [at for at in range(len(tokens)) if (*tokens[at : at + size],) == header]
    if begins:
        return begins[-1] + size
    return len(tokens) if set(header) & set(tokenizer.all_special_ids) & set(tokens) else begin


def asking_of(cfg: Config, tokenizer: Any, training_keys: torch.Tensor | None) -> Asking:
    """By the configuration's options of bench."""
    kwargs = dated(cfg.model.chat_template_kwargs)
    if cfg.bench.thinking != "model":
        kwargs["enable_thinking"] = cfg.bench.thinking == "on"
        warn_of_thinking(f"bench.thinking={cfg.bench.thinking}", tokenizer, kwargs)
    decoding = Decoding(
        max_tokens=cfg.bench.max_tokens,
        chain_length=cfg.chain_length,
        temperature=cfg.bench.temperature,
        verify_cost=cfg.bench.verify_cost if cfg.bench.verify == "confidence" else None,
        eos=frozenset(eos_token_ids(cfg.model.path, tokenizer)),
    )
    room = (cfg.bench.max_length or cfg.max_length) - cfg.bench.max_tokens
    heading = heading_of(tokenizer, kwargs)
    return Asking(tokenizer, decoding, kwargs, training_keys, room, cfg.seed, heading)
