"""Lossless speculative decoding of one request with a chain of drafted tokens.

Greedy: a drafted token stands when it is the target's own choice. Sampled: it stands with
probability min(1, p / q); the first rejected one is replaced by a sample of (p - q)+, so that the
output follows the target's distribution (Leviathan et al., arXiv 2211.17192).

Shape suffixes: V target vocabulary, D draft vocabulary, T tokens.
"""

import time
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from specforge_exp.target import Target


class Drafter(Protocol):
    """What a draft's decoder does for one request."""

    def commit(self, aux_1SA: Tensor, next_tokens: list[int]) -> None:
        """Take verified positions and the tokens that follow them."""

    def propose(self, length: int, choose: "Choice") -> tuple[list[int], list[Tensor]]:
        """Draft a chain: target ids and the draft logits each was chosen from."""


@runtime_checkable
class ReadsText(Protocol):
    """A drafter that reads the text by itself, and so needs the token that no commit has."""

    def begin(self, first: int) -> None:
        """Take the prompt's first token, before the first commit."""


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


@dataclass
class Generation:
    """One answer and what it took."""

    tokens: list[int]
    seconds: float = 0.0
    forwards: int = 1
    """Forwards of the target, the prompt's included."""
    gained: list[int] = field(default_factory=list)
    """Tokens that each verification added to the answer."""
    drafted: list[int] = field(default_factory=list)
    """Tokens that each verification was given."""
    accepted: list[int] = field(default_factory=list)
    """Drafted tokens that each verification kept."""
    first_seconds: float = 0.0
    """Of `seconds`, until the first token was there: the prompt's share."""


@dataclass
class Choice:
    """Picks a token from logits: the best one, or a sample."""

    temperature: float
    generator: torch.Generator | None = None

    def probabilities(self, logits: Tensor) -> Tensor:
        """softmax(logits / temperature) in float64, so that p - q keeps its sign."""
        return torch.softmax(logits.double() / self.temperature, -1)

    def pick(self, probabilities: Tensor) -> int:
        """Sample an index."""
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

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
def speculate(
    target: Target,
    drafter: Drafter,
    draft_ids_D: Tensor,
    prompt: list[int],
    decoding: Decoding,
    generator: torch.Generator | None = None,
) -> Generation:
    """Answer a prompt with the target and a draft; the draft cannot change what is said."""
    started = time.perf_counter()
    choice = Choice(decoding.temperature, generator)
    cache = target.new_cache()
    aux_1TA, last_1TH = target.features(torch.tensor([prompt], device=target.device), cache)
    first = choice(target.head(last_1TH[0, -1:])[0])
    if isinstance(drafter, ReadsText):
        drafter.begin(prompt[0])
    drafter.commit(aux_1TA, [*prompt[1:], first])
    answer = Generation([first], first_seconds=time.perf_counter() - started)
    over = first in decoding.eos or decoding.max_tokens == 1
    while not over:
        drafted, draft_logits = drafter.propose(decoding.chain_length, choice)
        ids_1T = torch.tensor([[answer.tokens[-1], *drafted]], device=target.device)
        aux_1TA, last_1TH = target.features(ids_1T, cache)
        yielded = verify(drafted, draft_logits, target.head(last_1TH[0]), draft_ids_D, choice)
        rejected = len(drafted) + 1 - len(yielded)
        if rejected:
            cache.crop(-rejected)
        drafter.commit(aux_1TA[:, : len(yielded)], yielded)
        tokens, over = until_end(yielded, decoding.max_tokens - len(answer.tokens), decoding.eos)
        answer.tokens += tokens
        answer.forwards += 1
        answer.gained.append(len(tokens))
        answer.drafted.append(len(drafted))
        answer.accepted.append(len(yielded) - 1)
    answer.seconds = time.perf_counter() - started
    return answer


@torch.no_grad()
def generate(
    target: Target, prompt: list[int], decoding: Decoding, generator: torch.Generator | None = None
) -> Generation:
    """Answer a prompt with the target alone, one token per forward."""
    started = time.perf_counter()
    choice = Choice(decoding.temperature, generator)
    cache = target.new_cache()
    answer = Generation([], forwards=0)
    ids, over = prompt, False
    while not over:
        _, last_1TH = target.features(torch.tensor([ids], device=target.device), cache)
        ids = [choice(target.head(last_1TH[0, -1:])[0])]
        tokens, over = until_end(ids, decoding.max_tokens - len(answer.tokens), decoding.eos)
        answer.tokens += tokens
        answer.forwards += 1
        answer.first_seconds = answer.first_seconds or time.perf_counter() - started
    answer.seconds = time.perf_counter() - started
    return answer
