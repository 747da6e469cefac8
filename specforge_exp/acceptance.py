"""What speculative decoding earned: accepted length, its interval, and how new the answers were."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specforge_exp.speculative import Generation

NGRAM = 8
NOVEL_BELOW = 0.2
"""An answer is novel when less than this share of its 8-grams stands in the training answers."""


@dataclass(frozen=True)
class Request:
    """One prompt, answered with the draft and by the target alone."""

    with_draft: Generation
    alone: Generation
    overlap: float
    """Share of the answer's 8-grams that stand in the training answers."""


def bootstrap_interval(values: list[float], resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, by resampling requests."""
    generator = np.random.default_rng(seed)
    sample = np.asarray(values)[generator.integers(0, len(values), (resamples, len(values)))]
    low, high = np.percentile(sample.mean(1), [2.5, 97.5])
    return float(low), float(high)


def accepted_lengths(requests: list[Request]) -> list[float]:
    """Tokens per verification of every request that needed one."""
    gained = [r.with_draft.gained for r in requests if r.with_draft.gained]
    return [sum(g) / len(g) for g in gained]


def pooled_length(requests: list[Request]) -> float:
    """Tokens per verification over all requests together."""
    gained = [g for r in requests for g in r.with_draft.gained]
    return sum(gained) / max(1, len(gained))


def acceptance_by_position(requests: list[Request], chain_length: int) -> list[float]:
    """Share of verifications whose j-th drafted token stood, j = 1..chain_length.

    Not conditional on the tokens before it: 1 + their sum is the accepted length where nothing
    was cut off at the end of an answer.
    """
    accepted = np.array([a for r in requests for a in r.with_draft.accepted])
    if not len(accepted):
        return [0.0] * chain_length
    return [float((accepted >= j).mean()) for j in range(1, chain_length + 1)]


def summarise(
    requests: list[Request], chain_length: int, resamples: int, greedy: bool
) -> dict[str, Any]:
    """The figures of one data set, as bench.json holds them."""
    lengths = accepted_lengths(requests)
    novel = [r for r in requests if r.overlap < NOVEL_BELOW]
    novel_lengths = accepted_lengths(novel)
    tokens = sum(len(r.with_draft.tokens) for r in requests)
    seconds = sum(r.with_draft.seconds for r in requests)
    alone_tokens = sum(len(r.alone.tokens) for r in requests)
    alone_seconds = sum(r.alone.seconds for r in requests)
    lossless = all(r.with_draft.tokens == r.alone.tokens for r in requests) if greedy else None
    return {
        "prompts": len(requests),
        "accepted_length": mean(lengths),
        "accepted_length_pooled": pooled_length(requests),
        "lengths": [mean(r.with_draft.gained) if r.with_draft.gained else None for r in requests],
        "accepted_length_ci95": list(bootstrap_interval(lengths, resamples)) if lengths else None,
        "acceptance_by_position": acceptance_by_position(requests, chain_length),
        "speedup": (tokens / seconds) / (alone_tokens / alone_seconds),
        "lossless": lossless,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_alone": alone_tokens / alone_seconds,
        "target_forwards_saved": 1 - sum(r.with_draft.forwards for r in requests) / tokens,
        "tokens": tokens,
        "novel": {
            "prompts": len(novel_lengths),
            "accepted_length": mean(novel_lengths) if novel_lengths else None,
            "accepted_length_pooled": pooled_length(novel) if novel_lengths else None,
        },
    }


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 1 (no draft at all) when no request needed a verification."""
    return sum(values) / len(values) if values else 1.0


def ngram_keys(ids_T: Tensor) -> Tensor:
    """One int64 key per 8-gram of a token sequence (a polynomial that wraps around)."""
    if len(ids_T) < NGRAM:
        return torch.empty(0, dtype=torch.int64)
    powers = torch.tensor([pow(1_000_003, i, 2**61) for i in range(NGRAM)])
    return (ids_T.long().unfold(0, NGRAM, 1) * powers).sum(-1)


def training_ngrams(ids: list[Tensor], turns: list[Tensor]) -> Tensor:
    """Sorted keys of all 8-grams of supervised tokens."""
    keys = [
        ngram_keys(conversation[turn == number])
        for conversation, turn in zip(ids, turns, strict=True)
        for number in range(1, int(turn.max()) + 1)
    ]
    return torch.cat(keys).unique() if keys else torch.empty(0, dtype=torch.int64)


def overlap(answer: list[int], known: Tensor | None) -> float:
    """Share of the answer's 8-grams among `known`; 0 for an answer that has none.

    Not a number where nothing is known of the training answers: then no answer counts as novel.
    """
    if known is None:
        return float("nan")
    keys = ngram_keys(torch.tensor(answer))
    return float(torch.isin(keys, known).float().mean()) if len(keys) else 0.0
