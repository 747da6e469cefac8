"""The target's hidden states of a batch: computed, kept in memory, or read from disk.

The target sees one conversation at a time, whatever the batch: so its states do not depend on
what a conversation is trained with, and what was kept is to the bit what would be computed.

Shape suffixes: T packed tokens, H hidden, A auxiliary states.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from specforge_exp.training.batches import Batch
from specforge_exp.training.ranks import Ranks

Features = Callable[[list[Batch]], list[tuple[Tensor, Tensor]]]
"""Batches -> for each, auxiliary states [T, A] and post-norm last states [T, H]."""
HiddenStates = Callable[[Tensor], tuple[Tensor, Tensor]]
"""tokens [1, T] -> auxiliary states [1, T, A] and post-norm last states [1, T, H]."""


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """States of conversations, one after the other."""
    aux_TA, last_TH = (torch.cat(column) for column in zip(*parts, strict=True))
    return aux_TA, last_TH


def conversations(batch: Batch) -> tuple[Tensor, ...]:
    """The tokens of each conversation."""
    parts: tuple[Tensor, ...] = batch.ids_T.split(batch.lengths)
    return parts


def computed(target: HiddenStates) -> Features:
    """Run the target every time."""

    def run(ids_T: Tensor) -> tuple[Tensor, Tensor]:
        aux_1TA, last_1TH = target(ids_T[None])
        return aux_1TA[0], last_1TH[0]

    def compute(batches: list[Batch]) -> list[tuple[Tensor, Tensor]]:
        return [joined([run(ids_T) for ids_T in conversations(batch)]) for batch in batches]

    return compute


def computed_together(target: HiddenStates, ranks: Ranks) -> Features:
    """Run a target that all processes share: each of them runs the conversations of all."""

    def compute(batches: list[Batch]) -> list[tuple[Tensor, Tensor]]:
        mine = [ids_T.tolist() for batch in batches for ids_T in conversations(batch)]
        states: list[tuple[Tensor, Tensor]] = []
        for rank, theirs in enumerate(ranks.gather(mine)):
            for ids in theirs:
                aux_1TA, last_1TH = target(torch.tensor([ids]))
                if rank == ranks.rank:
                    states.append((aux_1TA[0], last_1TH[0]))
        following = iter(states)
        return [joined([next(following) for _ in batch.lengths]) for batch in batches]

    return compute


def remembered(target: HiddenStates) -> Features:
    """Run the target the first time a conversation is seen.

    A hidden size of H costs 4 H numbers per token.
    """
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def read(batch: Batch) -> tuple[Tensor, Tensor]:
        for number, ids_T in zip(batch.numbers, conversations(batch), strict=True):
            if number not in states:
                aux_1TA, last_1TH = target(ids_T[None])
                states[number] = (aux_1TA[0], last_1TH[0])
        return joined([states[number] for number in batch.numbers])

    return lambda batches: [read(batch) for batch in batches]
