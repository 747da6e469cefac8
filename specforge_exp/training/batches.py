"""The order of training, and how a window's conversations are laid on processes and forwards.

The order is a pure function of seed and epoch, so any step can be found again. A window, the
conversations of one optimiser step, does not depend on the number of processes nor on packing:
both only lay it out.

Shape suffixes: T packed tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.config import TrainerConfig
from specforge_exp.data.tokens import TokenSet


@dataclass(frozen=True)
class Batch:
    """Conversations one after the other; nothing is padded."""

    ids_T: Tensor
    turns_T: Tensor
    """The number of the assistant turn a token belongs to, from 1; 0 elsewhere."""
    numbers: list[int]
    """Which conversations these are, over both splits: held-out ones count down from -1."""
    lengths: list[int]
    """Tokens of each."""
    draw: int
    """Seeds what the objective samples in these conversations: another number in every epoch."""


def draw_of(seed: int, epoch: int) -> int:
    """One number for a seed and an epoch."""
    return seed * 1_000_003 + epoch


def epoch_windows(conversations: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """Windows of `size` conversations for one epoch, the last maybe smaller; every one once."""
    generator = torch.Generator().manual_seed(draw_of(seed, epoch))
    order = torch.randperm(conversations, generator=generator).tolist()
    return [order[i : i + size] for i in range(0, conversations, size)]


def share(numbers: Sequence[int], lengths: Sequence[int], rank: int, world: int) -> list[int]:
    """This process's part of some conversations, as even in tokens as longest-first gets it."""
    load = [0] * world
    mine = []
    for number in sorted(numbers, key=lambda n: (-lengths[n], n)):
        lightest = min(range(world), key=lambda r: (load[r], r))
        load[lightest] += lengths[number]
        if lightest == rank:
            mine.append(number)
    return mine


def lay_out(numbers: list[int], lengths: Sequence[int], cfg: TrainerConfig) -> list[list[int]]:
    """Cut one process's part of a window into forwards.

    With `pack_tokens` longest-first into the first forward with room, else into `accumulate`
    parts. A conversation longer than `pack_tokens` is a forward of its own.
    """
    longest_first = sorted(numbers, key=lambda n: (-lengths[n], n))
    if cfg.pack_tokens is None:
        parts = [longest_first[i :: cfg.accumulate] for i in range(cfg.accumulate)]
        return [part for part in parts if part]
    forwards: list[list[int]] = []
    room: list[int] = []
    for number in longest_first:
        fits = next((i for i, left in enumerate(room) if left >= lengths[number]), None)
        if fits is None:
            forwards.append([])
            room.append(cfg.pack_tokens)
            fits = len(room) - 1
        forwards[fits].append(number)
        room[fits] -= lengths[number]
    return forwards


def make_batch(
    tokens: TokenSet, numbers: list[int], device: torch.device, draw: int | None = None
) -> Batch:
    """Put the numbered conversations one after the other; held-out ones are not drawn anew."""
    ids_T = torch.cat([tokens.ids[n] for n in numbers])
    turns_T = torch.cat([tokens.turns[n] for n in numbers])
    names = [-1 - n for n in numbers] if draw is None else numbers
    lengths = [len(tokens.ids[n]) for n in numbers]
    return Batch(ids_T.to(device), turns_T.to(device), names, lengths, draw or 0)
