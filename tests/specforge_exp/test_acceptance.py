"""The figures of a bench, and which answers are new: their 8-grams beside those of the training
answers."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from specforge_exp.bench.acceptance import (
    PairedAnswer,
    bootstrap_interval,
    ngram_keys,
    overlap,
    summarise,
    training_ngrams,
)
from specforge_exp.bench.speculative import Generation


def test_overlap_with_the_training_answers() -> None:
    ids = [torch.arange(30)]
    turns = [torch.tensor([0] * 10 + [1] * 10 + [0] * 2 + [2] * 8)]
    known = training_ngrams(zip(ids, turns, strict=True))
    assert len(known) == 3 + 1
    assert overlap(list(range(10, 20)), known) == 1.0
    assert overlap(list(range(12, 28)), known) == pytest.approx(1 / 9)
    assert overlap([1, 2], known) == 0.0
    assert len(ngram_keys(torch.arange(7))) == 0
    assert overlap(list(range(10)), training_ngrams([])) == 0.0


def test_training_ngrams_are_those_of_each_turn() -> None:
    torch.manual_seed(0)
    talks = []
    for number in range(150):  # more than are made at a time; turns that touch, short ones, none
        turns = torch.arange(1 + number % 4).repeat_interleave(5 + number % 11)
        talks.append((torch.randint(0, 3, (len(turns),)), turns + number % 2))
    grams = {
        tuple(ids[at : at + 8].tolist())
        for ids, turns in talks
        for at in range(len(ids) - 7)
        if int(turns[at]) > 0 and bool((turns[at : at + 8] == turns[at]).all())
    }
    keys = torch.cat([ngram_keys(torch.tensor(gram)) for gram in grams])
    assert torch.equal(training_ngrams(talks), keys.sort()[0])


@pytest.mark.timing
def test_an_answer_among_many_training_answers_costs_nothing() -> None:
    known = torch.arange(4_000_000) * 3
    started = time.process_time()
    assert overlap(list(range(200)), known) == 0.0
    assert time.process_time() - started < 0.1  # 1 s, where all of them are looked at


def request(
    gained: list[int], accepted: list[int], ours: tuple[float, float], alone: tuple[float, float]
) -> PairedAnswer:
    """Seconds of an answer and of its first token, with the draft and without."""
    tokens, read = list(range(1 + sum(gained))), [4] * len(gained)
    with_draft = Generation(tokens, ours[0], gained, accepted, ours[1], read)
    return PairedAnswer(with_draft, Generation(list(tokens), alone[0], first_seconds=alone[1]), 0.0)


def test_figures_by_hand() -> None:
    requests = [
        request([4, 2], [3, 1], (1.0, 0.25), (3.0, 0.5)),
        request([1, 1, 1], [0, 0, 0], (1.5, 0.5), (2.0, 0.25)),
        request([], [], (0.25, 0.25), (0.25, 0.25)),
    ]
    found = summarise(requests, chain_length=3, resamples=100, greedy=True)
    low, high = found.pop("accepted_length_ci95")
    assert 1 <= low < 2 < high <= 3
    assert found == {
        "prompts": 3, "responses": 3, "tokens": 12, "lossless": True, "identical": 1.0,
        "accepted_length": (3 + 1) / 2, "accepted_length_pooled": 9 / 5, "lengths": [3, 1, None],
        "gained": [3, 1, 0, 1], "gained_at_least": {"3": 1 / 5, "5": 0.0},
        "acceptance_by_position": [2 / 5, 1 / 5, 1 / 5], "verified_per_token": 20 / 9,
        "target_forwards_saved": 1 - 8 / 12,
        "speedup": pytest.approx(5.25 / 2.75), "speedup_decode": pytest.approx(4.25 / 1.75),
        "tokens_per_second": 12 / 2.75, "tokens_per_second_alone": 12 / 5.25,
        "first_token_seconds": pytest.approx(1 / 3),
        "novel": {"prompts": 2, "accepted_length": 2.0, "accepted_length_pooled": 9 / 5},
    }  # fmt: skip
    assert requests[0].alone is not None
    requests[0].alone.tokens[3] = 99
    other = summarise(requests, 3, 10, True, seconds=(1.5, None))
    assert (other["lossless"], other["identical"]) == (False, 2 / 3)
    assert (other["tokens_per_second"], other["speedup"]) == (8.0, None)
    requests[0].alone.tokens.append(5)
    sampled = summarise(requests, 3, 10, False)
    assert (sampled["lossless"], sampled["identical"]) == (None, None)
    assert sampled["speedup_decode"] == pytest.approx((9 / 1.75) / (10 / 4.25))
    novelty = summarise([replace(requests[0], overlap=0.2), *requests[1:]], 3, 10, True)["novel"]
    assert novelty == {"prompts": 1, "accepted_length": 1.0, "accepted_length_pooled": 1.0}


def test_figures_without_a_verification() -> None:
    """Answers of one token say nothing of a draft, and one whose counts are not told hides all."""
    found = summarise([request([], [], (0.25, 0.25), (0.25, 0.25))], 2, 10, True)
    unknown = ("accepted_length_ci95", "verified_per_token", "speedup_decode")
    assert [found[name] for name in unknown] == [None] * 3
    assert (found["accepted_length"], found["accepted_length_pooled"]) == (1.0, 0.0)
    assert found["lengths"] == [None] and found["gained_at_least"] == {"3": None, "5": None}
    assert (found["gained"], found["acceptance_by_position"]) == ([0, 0, 0], [0.0, 0.0])
    told = request([4, 2], [3, 1], (1.0, 0.25), (3.0, 0.5))
    silent = PairedAnswer(Generation(list(range(7)), 1.0), None, 0.0, verified=3)
    found = summarise([told, silent], 3, 10, True)
    assert (found["gained"], found["acceptance_by_position"]) == ([], [])
    assert found["lengths"] == [3.0, 2.0] and found["target_forwards_saved"] == 1 - 7 / 14
    alone = summarise([silent], 3, 10, True)
    names = ("speedup", "tokens_per_second_alone", "lossless", "identical", "verified_per_token")
    assert [alone[name] for name in names] == [None] * 5
    unread = PairedAnswer(Generation([0, 1, 2], 1.0, [2], [1]), None, 0.0)
    assert summarise([unread], 3, 10, True)["verified_per_token"] is None


def test_what_is_new_counts_by_conversation() -> None:
    """An answer of which nobody knows is not new."""
    seconds = (1.0, 0.5), (1.0, 0.5)
    turns = [request(gained, [0] * len(gained), *seconds) for gained in ([3], [5, 1], [1])]
    turns[1] = replace(turns[1], follows=True)
    found = summarise(turns, 5, 10, True)
    assert found["gained_at_least"] == {"3": 2 / 4, "5": 1 / 4}
    assert found["novel"] == {"prompts": 2, "accepted_length": 2, "accepted_length_pooled": 10 / 4}
    turns = [replace(turn, overlap=overlap(turn.with_draft.tokens, None)) for turn in turns]
    assert [*summarise(turns, 5, 10, True)["novel"].values()] == [0, None, None]


def test_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 0.5, 200)
    low, high = bootstrap_interval(values.tolist(), 2000)
    error = 1.96 * values.std() / len(values) ** 0.5
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.01)
    assert bootstrap_interval([2.5] * 3, 10) == (2.5, 2.5)
