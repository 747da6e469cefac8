"""Which answers are new: their 8-grams beside those of the training answers."""

import time

import pytest
import torch

from specforge_exp.bench.acceptance import ngram_keys, overlap, training_ngrams


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
