"""What speculative decoding earned: accepted length, its interval, and how new the answers were."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specforge_exp.bench.speculative import Generation

NGRAM = 8
NOVEL_BELOW = 0.2
"""An answer is novel when less than this share of its 8-grams stands in the training answers."""
TOGETHER = 64
"""Conversations whose 8-grams are made at a time."""


@dataclass(frozen=True)
class PairedAnswer:
    """One prompt, answered with the draft and by the target alone."""

    with_draft: Generation
    alone: Generation | None
    """None: not measured."""
    overlap: float
    """Share of the answer's 8-grams that stand in the training answers."""
    follows: bool = False
    """A later turn of the conversation of the request before."""
    verified: int | None = None
    """Verifications that a server counted; None: those of `with_draft`."""

    @property
    def verifications(self) -> int:
        """Forwards of the target after the prompt's."""
        return len(self.with_draft.gained) if self.verified is None else self.verified


def bootstrap_interval(values: list[float], resamples: int) -> tuple[float, float]:
    """95 % interval of the mean, by resampling requests."""
    generator = np.random.default_rng(0)
    sample = np.asarray(values)[generator.integers(0, len(values), (resamples, len(values)))]
    low, high = np.percentile(sample.mean(1), [2.5, 97.5])
    return float(low), float(high)


def grouped(requests: list[PairedAnswer], average: str) -> list[list[PairedAnswer]]:
    """What counts once in the mean: a conversation or a response; see bench.average."""
    groups: list[list[PairedAnswer]] = []
    for request in requests:
        if request.follows and average == "conversations":
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def accepted_length(requests: list[PairedAnswer], average: str) -> float | None:
    """Tokens per verification of requests together; None when they needed none."""
    verifications = sum(r.verifications for r in requests)
    if not verifications:
        return None
    if average == "responses":
        return 1 + sum(sum(r.with_draft.accepted) for r in requests) / verifications
    return sum(len(r.with_draft.tokens) - 1 for r in requests) / verifications


def acceptance_by_position(requests: list[PairedAnswer], chain_length: int) -> list[float]:
    """Share of verifications whose j-th drafted token stood, j = 1..chain_length.

    Not conditional on the tokens before it: 1 + their sum is the accepted length where nothing
    was cut off at the end of an answer. [] where a server did not say what stood.
    """
    accepted = of_each(requests, "accepted")
    if not accepted:
        return [] if accepted is None else [0.0] * chain_length
    return [sum(a >= j for a in accepted) / len(accepted) for j in range(1, chain_length + 1)]


def of_each(requests: list[PairedAnswer], what: str) -> list[int] | None:
    """What each verification `gained` or `accepted`; None where a server did not say it of all."""
    told = [getattr(r.with_draft, what) for r in requests if r.verifications]
    return [number for numbers in told for number in numbers] if all(told) else None


def verified_per_token(requests: list[PairedAnswer]) -> float | None:
    """Tokens that the target read in verifications, per token that they added to the answers: what
    a verification costs where reading a token costs the same at any number of them."""
    read = sum(sum(r.with_draft.read) for r in requests)
    gained = sum(sum(r.with_draft.gained) for r in requests)
    return read / gained if read and gained else None


def summarise(
    requests: list[PairedAnswer],
    chain_length: int,
    resamples: int,
    greedy: bool,
    average: str = "conversations",
    seconds: tuple[float, float | None] | None = None,
) -> dict[str, Any]:
    """The figures of one data set, as bench.json holds them.

    Args:
        requests: in the order of the conversations.
        chain_length: tokens drafted per verification.
        resamples: behind the 95 % interval.
        greedy: whether both ways of answering must say the same.
        average: bench.average.
        seconds: that all answers took with the draft, and alone; None: one after the other.
    """
    groups = grouped(requests, average)
    all_lengths = [accepted_length(group, average) for group in groups]
    lengths = [length for length in all_lengths if length is not None]
    new_groups = [[r for r in group if r.overlap < NOVEL_BELOW] for group in groups]
    novel = [r for group in new_groups for r in group]
    all_novel = [accepted_length(group, average) for group in new_groups]
    novel_lengths = [length for length in all_novel if length is not None]
    told = of_each(requests, "gained")
    gained = told or []
    tokens = sum(len(r.with_draft.tokens) for r in requests)
    saved = 1 - (len(requests) + sum(r.verifications for r in requests)) / tokens
    return {
        "prompts": sum(not r.follows for r in requests),
        "responses": len(requests),
        "accepted_length": mean(lengths),
        "accepted_length_pooled": accepted_length(requests, "conversations") or 0.0,
        "lengths": all_lengths,
        "accepted_length_ci95": list(bootstrap_interval(lengths, resamples)) if lengths else None,
        "gained": [gained.count(n + 1) for n in range(chain_length + 1) if told is not None],
        "gained_at_least": {
            least: sum(g >= int(least) for g in gained) / len(gained) if gained else None
            for least in "35"
        },
        "acceptance_by_position": acceptance_by_position(requests, chain_length),
        "verified_per_token": verified_per_token(requests),
        **speeds(requests, seconds),
        **compared(requests if greedy else []),
        "target_forwards_saved": saved,
        "tokens": tokens,
        "novel": {
            "prompts": len(novel_lengths),
            "accepted_length": mean(novel_lengths) if novel_lengths else None,
            "accepted_length_pooled": accepted_length(novel, "conversations"),
        },
    }


def compared(requests: list[PairedAnswer]) -> dict[str, Any]:
    """Whether all answers are the target's own, and the share of those that are; None: not
    measured."""
    same = [r.with_draft.tokens == r.alone.tokens for r in requests if r.alone is not None]
    if not same:
        return {"lossless": None, "identical": None}
    return {"lossless": all(same), "identical": sum(same) / len(same)}


def speeds(
    requests: list[PairedAnswer], seconds: tuple[float, float | None] | None
) -> dict[str, Any]:
    """Tokens per second and their ratios, with the prompts' share (`speedup`) and without."""
    drafted = [r.with_draft for r in requests]
    alone = [r.alone for r in requests if r.alone is not None]
    if seconds is None:
        seconds = sum(g.seconds for g in drafted), sum(g.seconds for g in alone)
    rate = rate_of(drafted, seconds[0])
    rate_alone = rate_of(alone, seconds[1])
    decode, decode_alone = decode_rate(drafted), decode_rate(alone)
    return {
        "speedup": rate / rate_alone if rate and rate_alone else None,
        "speedup_decode": decode / decode_alone if decode and decode_alone else None,
        "tokens_per_second": rate,
        "tokens_per_second_alone": rate_alone,
        "first_token_seconds": mean([g.first_seconds for g in drafted]),
    }


def rate_of(answers: list[Generation], seconds: float | None) -> float | None:
    """Tokens per second; None without answers."""
    return sum(len(g.tokens) for g in answers) / seconds if answers and seconds else None


def decode_rate(answers: list[Generation]) -> float | None:
    """Tokens after the first per second after the first, each answer's own; None without any."""
    seconds = sum(g.seconds - g.first_seconds for g in answers)
    return sum(len(g.tokens) - 1 for g in answers) / seconds if seconds else None


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 1 (no draft at all) when no request needed a verification."""
    return sum(values) / len(values) if values else 1.0


def ngram_keys(ids_T: Tensor) -> Tensor:
    """One int64 key per 8-gram of a token sequence (a polynomial that wraps around)."""
    starts = max(0, len(ids_T) - NGRAM + 1)
    keys = torch.zeros(starts, dtype=torch.int64)
    for place in range(NGRAM):
        keys += pow(1_000_003, place, 2**61) * ids_T[place : place + starts].long()
    return keys


def training_ngrams(conversations: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sorted keys of all 8-grams of supervised tokens, of ids and turns of conversations."""
    keys = [np.empty(0, np.int64)]
    following = iter(conversations)
    while some := list(islice(following, TOGETHER)):
        ids_T, turns_T = (np.concatenate(column) for column in zip(*some, strict=True))
        number_T = np.repeat(np.arange(len(some)), [len(turns) for _, turns in some])
        inside_T = turns_T > 0
        for label_T in (number_T, turns_T):  # a turn is in one piece: the ends of an 8-gram tell
            inside_T &= label_T == np.roll(label_T, 1 - NGRAM)
        own = ngram_keys(torch.from_numpy(ids_T)).numpy()
        keys.append(own[inside_T[: len(own)]])
    known = np.concatenate(keys)
    keys.clear()
    known.sort()  # in place: those of a million conversations are gigabytes
    first = np.ones(len(known), bool)
    first[1:] = known[1:] != known[:-1]
    return torch.from_numpy(known[first])


def overlap(answer: list[int], training_keys: Tensor | None) -> float:
    """Share of the answer's 8-grams among the sorted `training_keys`; 0 for an answer without any.

    Not a number where nothing is known of the training answers: then no answer counts as novel.
    """
    if training_keys is None:
        return float("nan")
    keys = ngram_keys(torch.tensor(answer))
    begin, end = (torch.searchsorted(training_keys, keys, right=r) for r in (False, True))
    return float((end > begin).float().mean()) if len(keys) else 0.0
