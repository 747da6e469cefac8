"""Lossless speculative decoding of one request with a chain of drafted tokens.

Greedy: a drafted token stands when it is the target's own choice. Sampled: it stands with
probability min(1, p / q); the first rejected one is replaced by a sample of (p - q)+, so that the
output follows the target's distribution (Leviathan et al., arXiv 2211.17192).

Shape suffixes: V target vocabulary, D draft vocabulary, T tokens.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from specforge_exp.target import Past, Target


class Drafter(Protocol):
    """What a draft's decoder does for one request."""

    def commit(self, aux_1SA: Tensor, next_tokens: list[int]) -> None:
        """Take verified positions and the tokens that follow them."""

    def propose(self, length: int, choose: "Choice") -> tuple[list[int], list[Tensor]]:
        """Draft a chain, at most so long: target ids, and the draft logits each was chosen from."""


@runtime_checkable
class ReadsText(Protocol):
    """A drafter that reads the text by itself, and so needs the token that no commit has."""

    def begin(self, first: int) -> None:
        """Take the prompt's first token, before the first commit."""


@runtime_checkable
class Confident(Protocol):
    """A drafter that can end a chain before its length.

    Whether a token is drafted may depend on those before it and on nothing that follows from
    itself: otherwise samples would not follow the target's distribution.
    """

    def economise(self, cost: float) -> None:
        """End chains from now on where one more token is expected to earn less than it costs.

        Args:
            cost: of one more token in a verification, in verifications of a single token.
        """


@dataclass(frozen=True)
class Decoding:
    """How to decode."""

    max_tokens: int
    """Most new tokens."""
    chain_length: int = 5
    """Tokens drafted per verification."""
    temperature: float = 0.0
    """0: greedy."""
    eos: frozenset[int] = frozenset()
    """Tokens that end the answer; they are part of it."""
    top_p: float = 1.0
    """Sample among the most likely tokens that reach this probability together; 1: off."""
    verify_cost: float | None = None
    """As `Confident.economise`; None: chains have their full length."""
    seed: int = 0
    """Of a server's samples; here a generator has it."""


@dataclass
class Generation:
    """One answer and what it took."""

    tokens: list[int]
    seconds: float = 0.0
    gained: list[int] = field(default_factory=list)
    """Tokens that each verification added to the answer."""
    accepted: list[int] = field(default_factory=list)
    """Drafted tokens that each verification kept."""
    first_seconds: float = 0.0
    """Of `seconds`, until the first token was there: the prompt's share."""
    read: list[int] = field(default_factory=list)
    """Tokens that the target read in each verification; empty: not known."""


@dataclass
class Choice:
    """Picks a token from logits: the best one, or a sample."""

    temperature: float
    generator: torch.Generator | None = None
    top_p: float = 1.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """softmax(logits / temperature) in float64, so that p - q keeps its sign; cut at top_p."""
        chances = torch.softmax(logits.double() / self.temperature, -1)
        if self.top_p == 1:
            return chances
        ordered, order = chances.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
        return torch.zeros_like(chances).scatter(-1, order, ordered / ordered.sum())

    def pick(self, probabilities: Tensor) -> int:
        """Sample an index, on the CPU, where the generator is."""
        return int(torch.multinomial(probabilities.cpu(), 1, generator=self.generator))

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def __call__(self, logits: Tensor) -> int:
        """The best token, or a sample."""
        if self.temperature == 0:
            return int(logits.argmax())
        return self.pick(self.probabilities(logits))


def verify(
    drafted: list[int],
    draft_logits: list[Tensor],
    logits_TV: Tensor,
    draft_ids_D: Tensor,
    choice: Choice,
) -> list[int]:
    """The tokens that a verification yields: the accepted prefix and one more from the target.

    Args:
        drafted: target ids.
        draft_logits: per drafted token the logits [D] it was chosen from.
        logits_TV: the target's logits, T = drafted + 1; row j judges drafted token j.
        draft_ids_D: target id of every draft id.
        choice: greedy or sampled.
    """
    if choice.temperature == 0:
        best = logits_TV.argmax(-1).tolist()
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == best[accepted]:
            accepted += 1
        return [*drafted[:accepted], best[accepted]]
    for index, token in enumerate(drafted):
        p_V = choice.probabilities(logits_TV[index])
        q_V = torch.zeros_like(p_V)
        q_V[draft_ids_D] = choice.probabilities(draft_logits[index])
        if choice.uniform() * float(q_V[token]) >= float(p_V[token]):
            return [*drafted[:index], choice.pick((p_V - q_V).clamp(min=0))]
    return [*drafted, choice(logits_TV[-1])]


def until_end(tokens: list[int], room: int, eos: frozenset[int]) -> tuple[list[int], bool]:
    """The tokens up to the first end token and the room left, and whether the answer is over."""
    tokens = tokens[:room]
    for index, token in enumerate(tokens):
        if token in eos:
            return tokens[: index + 1], True
    return tokens, len(tokens) == room


@torch.no_grad()
def speculating(
    past: Past,
    drafter: Drafter,
    draft_ids_D: Tensor,
    prompt: list[int],
    decoding: Decoding,
    generator: torch.Generator | None = None,
) -> Iterator[Generation]:
    """Answer a prompt with the target and a draft; the draft cannot change what is said.

    Yields:
        The answer, one object that grows: with its first token, then after each verification.
    """
    started = time.perf_counter()
    choice = Choice(decoding.temperature, generator, decoding.top_p)
    head = past.target.head
    first = choice(head(past.begin(prompt)[0, -1:])[0])
    if isinstance(drafter, ReadsText):
        drafter.begin(prompt[0])
    if decoding.verify_cost is not None:
        assert isinstance(drafter, Confident)
        drafter.economise(decoding.verify_cost)
    drafter.commit(torch.cat(past.aux, 1), [*prompt[1:], first])
    answer = Generation([first], first_seconds=time.perf_counter() - started)
    answer.seconds = answer.first_seconds
    yield answer
    over = first in decoding.eos or decoding.max_tokens == 1
    while not over:
        drafted, draft_logits = drafter.propose(decoding.chain_length, choice)
        last_1TH = past.read([answer.tokens[-1], *drafted])
        yielded = verify(drafted, draft_logits, head(last_1TH[0]), draft_ids_D, choice)
        past.forget(len(drafted) + 1 - len(yielded))
        drafter.commit(past.aux[-1], yielded)
        tokens, over = until_end(yielded, decoding.max_tokens - len(answer.tokens), decoding.eos)
        answer.tokens += tokens
        answer.gained.append(len(tokens))
        answer.accepted.append(len(yielded) - 1)
        answer.read.append(len(drafted) + 1)
        answer.seconds = time.perf_counter() - started
        yield answer


@torch.no_grad()
def generating(
    past: Past, prompt: list[int], decoding: Decoding, generator: torch.Generator | None = None
) -> Iterator[Generation]:
    """Answer a prompt with the target alone, one token per forward; yields as `speculating`."""
    started = time.perf_counter()
    choice = Choice(decoding.temperature, generator, decoding.top_p)
    answer = Generation([])
    last_1TH, over = past.begin(prompt), False
    while not over:
        if answer.tokens:
            last_1TH = past.read(answer.tokens[-1:])
        token = choice(past.target.head(last_1TH[0, -1:])[0])
        tokens, over = until_end([token], decoding.max_tokens - len(answer.tokens), decoding.eos)
        answer.tokens += tokens
        answer.seconds = time.perf_counter() - started
        answer.first_seconds = answer.first_seconds or answer.seconds
        yield answer


def speculate(
    target: Target,
    drafter: Drafter,
    draft_ids_D: Tensor,
    prompt: list[int],
    decoding: Decoding,
    generator: torch.Generator | None = None,
) -> Generation:
    """The whole answer of `speculating`."""
    answers = speculating(Past(target), drafter, draft_ids_D, prompt, decoding, generator)
    return deque(answers, maxlen=1)[0]


def generate(
    target: Target, prompt: list[int], decoding: Decoding, generator: torch.Generator | None = None
) -> Generation:
    """The whole answer of `generating`."""
    return deque(generating(Past(target), prompt, decoding, generator), maxlen=1)[0]
