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
    MARKER,
    PROBE,
    Message,
    Unrenderable,
    eos_token_ids,
    prompt_ids,
    prompt_text,
    render,
    warn_of_thinking,
)

log = logging.getLogger(__name__)


class Talk(NamedTuple):
    """What is asked."""

    asks: list[list[Message]]
    """Turn by turn."""
    tools: list[Any] | None = None
    """That its prompts describe."""


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
    header: tuple[int, ...] = ()
    """See `header_of`."""

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
        said = tokens[begin_of(tokens, self.header, self.tokenizer) :]
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


def header_of(tokenizer: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that the model writes between the prompt and an answer, or between its thoughts
    and the answer, as far as `decode` would leave words of them: a channel's name (gpt-oss)."""
    try:
        prompt = prompt_text(tokenizer, [PROBE], kwargs)
        shown = render(tokenizer, [PROBE, {"role": "assistant", "content": MARKER}], kwargs)
    except Unrenderable:
        return ()
    before, _, _ = shown.partition(MARKER)
    header = before.removeprefix(prompt) if before.startswith(prompt) else ""
    ids = tokenizer(header, add_special_tokens=False)["input_ids"]
    return tuple(ids) if tokenizer.decode(ids, skip_special_tokens=True) != header else ()


def begin_of(tokens: list[int], header: tuple[int, ...], tokenizer: Any) -> int:
    """Where in an answer's tokens stands what it says: behind the last header, and nowhere where
    they have some of a header's marks alone."""
    if not header:
        return 0
    size = len(header)
    begins = [at for at in range(len(tokens)) if (*tokens[at : at + size],) == header]
    if begins:
        return begins[-1] + size
    return len(tokens) if set(header) & set(tokenizer.all_special_ids) & set(tokens) else 0


def asking_of(cfg: Config, tokenizer: Any, training_keys: torch.Tensor | None) -> Asking:
    """By the configuration's options of bench."""
    kwargs = dict(cfg.model.chat_template_kwargs)
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
    header = header_of(tokenizer, kwargs)
    return Asking(tokenizer, decoding, kwargs, training_keys, room, cfg.seed, header)
