"""Tokens from logits: the ends of each filter, and what a penalty does to a logit."""

import pytest
import torch

from specforge_exp.generation.engine import Sampling
from specforge_exp.generation.local.sampling import choose, penalise

GRID = [(step + 0.5) / 64 for step in range(64)]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, top_k=1), 1), (Sampling(1.0, top_k=2), 2), (Sampling(1.0, top_k=9), 4),
        (Sampling(1.0, 0.25), 1), (Sampling(1.0, 0.5), 2), (Sampling(1.0, 0.5, 3), 2),
        (Sampling(1.0, min_p=1.0), 4), (Sampling(1e-39), 4), (Sampling(1e-7), 4), (Sampling(), 1),
    ],
)  # fmt: skip
def test_as_few_are_left_as_reach_the_bound(sampling: Sampling, kept: int) -> None:
    """Of four that are alike: who is as likely as the best is as good, however cold it is."""
    four = torch.full((len(GRID), 4), 3.0)
    assert len({*choose(four, [sampling] * len(GRID), GRID)}) == kept


def test_a_row_has_its_own_settings() -> None:
    """Also among rows of its kind."""
    kinds = [Sampling(1.0, 0.5), Sampling(1.0, 1.0, min_p=0.9), Sampling(1.0, 0.25)]
    kinds += [Sampling(1.0, top_k=k) for k in (3, 1, 2)] + [Sampling(), Sampling(1.0)]
    logits = torch.tensor([[0.0, -0.01, -0.02, -0.03]]).expand(len(kinds), -1)
    numbers = [0.99, 0.99, 0.99, 0.99, 0.99, 0.25, 0.99, 0.0]
    assert choose(logits, kinds, numbers) == [1, 3, 0, 2, 0, 0, 0, 0]


def test_a_penalty_makes_what_was_said_less_likely() -> None:
    """Whatever its sign, and once however often it was said."""
    logits = torch.tensor([2.0, -2.0, 0.0, 3.0, -3.0])
    penalise(logits, [0, 1, 1, 2], 2.0)
    assert logits.tolist() == [1.0, -4.0, 0.0, 3.0, -3.0]
