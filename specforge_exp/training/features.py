"""The target's hidden states of a batch, computed once per conversation when memory allows.

Shape suffixes: B batch, T tokens, H hidden, A = 3 H.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specforge_exp.training.batches import Batch

Features = Callable[[Tensor], tuple[Tensor, Tensor]]
"""tokens [B, T] -> auxiliary states [B, T, A] and post-norm last states [B, T, H]."""


def cached(features: Features) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """`features` with a memory: a conversation's states are computed the first time it is seen.

    Causal attention makes a conversation's states independent of what it is batched with, so
    they are kept without padding. A hidden size of H costs 4 H numbers per token.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def lookup(batch: Batch) -> tuple[Tensor, Tensor]:
        if not all(number in kept for number in batch.numbers):
            aux_BTA, last_BTH = features(batch.ids_BT)
            for row, (number, length) in enumerate(zip(batch.numbers, batch.lengths, strict=True)):
                kept[number] = (aux_BTA[row, :length].clone(), last_BTH[row, :length].clone())
            return aux_BTA, last_BTH
        columns = zip(*(kept[number] for number in batch.numbers), strict=True)
        aux_BTA, last_BTH = (pad_sequence(list(column), batch_first=True) for column in columns)
        return aux_BTA, last_BTH

    return lookup


def uncached(features: Features) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """`features` of every batch anew."""

    def compute(batch: Batch) -> tuple[Tensor, Tensor]:
        return features(batch.ids_BT)

    return compute
