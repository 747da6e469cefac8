"""The order of training: a pure function of seed and epoch, so that any step can be found again.

Shape suffixes: B batch, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specforge_exp.tokens import TokenSet

BUCKET_BATCHES = 32
"""Batches whose conversations are sorted by length together: little padding, much randomness."""


@dataclass(frozen=True)
class Batch:
    """Conversations padded on the right with id 0 and turn 0."""

    ids_BT: Tensor
    turns_BT: Tensor
    numbers: list[int]
    """Which conversations these are, over both splits: held-out ones count down from -1."""
    lengths: list[int]
    """Tokens of each, without the padding."""


def epoch_order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of conversation numbers for one epoch; every conversation once."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if batch_size == 1:
        return [[number] for number in order]
    batches = []
    bucket = batch_size * BUCKET_BATCHES
    for start in range(0, len(order), bucket):
        group = sorted(order[start : start + bucket], key=lambda number: lengths[number])
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def make_batch(
    tokens: TokenSet, numbers: list[int], device: torch.device, held_out: bool = False
) -> Batch:
    """Pad the numbered conversations to the longest of them."""
    ids_BT = pad_sequence([tokens.ids[n] for n in numbers], batch_first=True)
    turns_BT = pad_sequence([tokens.turns[n] for n in numbers], batch_first=True)
    names = [-1 - n for n in numbers] if held_out else numbers
    lengths = [len(tokens.ids[n]) for n in numbers]
    return Batch(ids_BT.to(device), turns_BT.to(device), names, lengths)
