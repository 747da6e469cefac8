"""The target's hidden states of a batch: computed, kept in memory, or read from disk.

The target sees one conversation at a time, whatever the batch: so its states do not depend on
what a conversation is trained with, and what was kept is to the bit what would be computed.

Shape suffixes: T packed tokens, H hidden, A = 3 H.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from specforge_exp.training.batches import Batch

Features = Callable[[Batch], tuple[Tensor, Tensor]]
"""batch -> auxiliary states [T, A] and post-norm last states [T, H]."""
Target = Callable[[Tensor], tuple[Tensor, Tensor]]
"""tokens [1, T] -> auxiliary states [1, T, A] and post-norm last states [1, T, H]."""


def computed(target: Target) -> Features:
    """Run the target every time."""

    def compute(batch: Batch) -> tuple[Tensor, Tensor]:
        parts = [target(ids[None]) for ids in batch.ids_T.split(batch.lengths)]
        aux_1TA, last_1TH = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        return aux_1TA[0], last_1TH[0]

    return compute


def remembered(target: Target) -> Features:
    """Run the target the first time a conversation is seen.

    A hidden size of H costs 4 H numbers per token.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def lookup(batch: Batch) -> tuple[Tensor, Tensor]:
        for number, ids in zip(batch.numbers, batch.ids_T.split(batch.lengths), strict=True):
            if number not in kept:
                aux_1TA, last_1TH = target(ids[None])
                kept[number] = (aux_1TA[0], last_1TH[0])
        columns = zip(*(kept[number] for number in batch.numbers), strict=True)
        aux_TA, last_TH = (torch.cat(column) for column in columns)
        return aux_TA, last_TH

    return lookup
