"""The order of training, and how a window's conversations are laid on processes and forwards.

The order is a pure function of seed and epoch, so any step can be found again. A window, the
conversations of one optimiser step, does not depend on the number of processes nor on packing:
both only lay it out.

Shape suffixes: T packed tokens.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from specforge_exp.config import Config, TrainerConfig
from specforge_exp.data.stream import RowStream, TextRow
from specforge_exp.data.tokens import Ints, TokenSet
from specforge_exp.target.packing import together
from specforge_exp.training.ranks import Ranks


@dataclass(frozen=True)
class Batch:
    """Conversations one after the other; nothing is padded."""

    ids_T: Tensor
    turns_T: Tensor
    """The number of the assistant turn a token belongs to, from 1; 0 elsewhere. On the CPU, where
    all that follows from it is made: a GPU is never waited for to know which rows there are."""
    numbers: list[int]
    """Which conversations these are, over both splits: held-out ones count down from -1."""
    lengths: list[int]
    """Tokens of each."""
    draw: int
    """Seeds what the objective samples in these conversations: another number in every epoch."""
    step: int = field(default=-1, kw_only=True)
    """Optimiser steps before the one that it belongs to; -1: none."""


def draw_of(seed: int, epoch: int) -> int:
    """One number for a seed and an epoch."""
    return seed * 1_000_003 + epoch


def drawing(batch: Batch, number: int) -> torch.Generator:
    """What the objective samples in a conversation of a batch: the same wherever it is packed, and
    after an interruption."""
    return numbers_of(batch.draw, number)


def numbers_of(draw: int, number: int) -> torch.Generator:
    """Random numbers of one conversation."""
    seed = (draw * 2_654_435_761 + number) % 2**32  # a generator takes no more bits
    return torch.Generator().manual_seed(seed)


@lru_cache(maxsize=1)
def epoch_order(conversations: int, draw: int) -> Tensor:
    """The conversations in the order of an epoch; every one once."""
    return torch.randperm(conversations, generator=torch.Generator().manual_seed(draw))


def window_of(conversations: int, size: int, seed: int, epoch: int, index: int) -> list[int]:
    """The index-th `size` conversations of an epoch; its last window may be smaller."""
    order = epoch_order(conversations, draw_of(seed, epoch))
    numbers: list[int] = order[index * size : (index + 1) * size].tolist()
    return numbers


def share(
    numbers: Sequence[int], lengths: Sequence[int] | Ints, rank: int, world: int
) -> list[int]:
    """This process's part of some conversations, as even in tokens as longest-first gets it."""
    load = [0] * world
    mine = []
    for number in sorted(numbers, key=lambda n: (-lengths[n], n)):
        lightest = min(range(world), key=lambda r: (load[r], r))
        load[lightest] += lengths[number]
        if lightest == rank:
            mine.append(number)
    return mine


def largest_share(lengths: Sequence[int] | Ints, size: int, world: int) -> int:
    """Tokens that a window of `size` conversations gives one of `world` processes, at most."""
    longest = sorted((lengths[n] for n in range(len(lengths))), reverse=True)[:size]
    return int(max(longest[0], -(-sum(longest) // world) + longest[0] * (world > 1)))


def lay_out(
    numbers: list[int], lengths: Sequence[int] | Ints, cfg: TrainerConfig
) -> list[list[int]]:
    """Cut one process's part of a window into forwards.

    With `pack_tokens` longest-first into the first forward with room, else into `accumulate`
    parts. A conversation longer than `pack_tokens` is a forward of its own.
    """
    if cfg.pack_tokens is None:
        longest_first = sorted(numbers, key=lambda n: (-lengths[n], n))
        parts = [longest_first[i :: cfg.accumulate] for i in range(cfg.accumulate)]
        return [part for part in parts if part]
    return together({number: int(lengths[number]) for number in numbers}, cfg.pack_tokens)


def make_batch(
    tokens: TokenSet, numbers: list[int], device: torch.device, draw: int | None = None
) -> Batch:
    """Put the numbered conversations one after the other; held-out ones are not drawn anew."""
    ids, turns = zip(*(tokens[n] for n in numbers), strict=True)
    names = [-1 - n for n in numbers] if draw is None else numbers
    ids_T = moved(torch.cat(ids), device)
    return Batch(ids_T, torch.cat(turns), names, list(map(len, ids)), draw or 0)


def parts_of(batch: Batch) -> list[Batch]:
    """Each conversation of a batch as a batch of its own."""
    columns = (batch.ids_T.split(batch.lengths), batch.turns_T.split(batch.lengths))
    rows = zip(*columns, batch.numbers, batch.lengths, strict=True)
    return [Batch(ids_T, turns_T, [n], [size], batch.draw) for ids_T, turns_T, n, size in rows]


def dealt(
    cfg: Config, stream: RowStream, steps: range, ranks: Ranks, device: torch.device
) -> Iterator[tuple[int, list[int], list[Batch]]]:
    """Of every step its number, the rows of all processes, and this process's part of them.

    The first process reads the stream, one step ahead, and tells the others.
    """
    size = cfg.trainer.batch_size * cfg.trainer.accumulate
    with ThreadPoolExecutor(1) as reader:

        def read(step: int) -> Future[list[TextRow]] | None:
            return reader.submit(stream.take, step, size) if ranks.rank == 0 else None

        ahead = read(steps[0]) if steps else None
        for step in steps:
            rows: list[TextRow] = ranks.decided(lambda future=ahead: future.result())  # type: ignore[misc]
            ahead = read(step + 1) if step + 1 in steps else None
            numbers = [step * size + at for at in range(len(rows))]
            lengths = [len(row.ids) for row in rows]
            mine = share(range(len(rows)), lengths, ranks.rank, ranks.world)
            parts = lay_out(mine, lengths, cfg.trainer)
            yield step, numbers, [row_batch([rows[at] for at in part], device) for part in parts]


def row_batch(rows: list[TextRow], device: torch.device) -> Batch:
    """Rows one after the other; every piece of a document is a conversation by itself."""
    ids_T = torch.cat([torch.from_numpy(row.ids).long() for row in rows])
    lengths = [length for row in rows for length in row.lengths]
    numbers = list(range(len(lengths)))
    return Batch(moved(ids_T, device), torch.ones_like(ids_T), numbers, lengths, 0)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """On the device; to a GPU from pinned memory, so that neither waits for the other."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def moved_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Whole numbers on the device, of any shapes: to a GPU in one copy."""
    if device.type == "cpu":
        return list(tensors)
    flat = moved(torch.cat([x.flatten() for x in tensors]), device)
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
