"""The target's hidden states of a batch: computed, kept in memory, read from disk, or sent for.

They are had in two steps: `ask` sends for those of some batches, what it returns takes them. So
they may be on their way while others are trained on, always in the order they were asked for.

The target sees one conversation at a time, whatever the batch: so its states do not depend on
what a conversation is trained with, and what was kept is to the bit what would be computed. With
target.pack_tokens it sees several, apart from each other, and they do in their last digits.

Shape suffixes: T packed tokens, H hidden, A auxiliary states.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from specforge_exp.training.batches import Batch, parts_of
from specforge_exp.training.ranks import Ranks

States = list[tuple[Tensor, Tensor]]
"""For each batch auxiliary states [T, A] and post-norm last states [T, H]."""
Take = Callable[[], States]
"""Waits for what was asked for, and gives it; once."""
HiddenStates = Callable[[list[Tensor]], States]
"""tokens [T] of conversations -> auxiliary states [T, A] and post-norm last states [T, H] of
each."""
Thing = TypeVar("Thing")


@dataclass
class Features:
    """Where states come from, and the account of what was asked for and is not used yet."""

    ask: Callable[[list[Batch]], Take]
    """Send for the states of some batches. Every process asks once per window or round of an
    evaluation, in order."""
    ahead: int | None = None
    """Bytes that may be asked for and not used yet, besides what is waited for; null: nothing is
    asked ahead, and `ask` and what it returns run where the draft is trained."""
    token_bytes: int = 1
    """Of one token's states; where nothing holds them any number does."""
    measured: Callable[[float, Ranks], dict[str, float]] = lambda seconds, ranks: {}
    """Metrics of so many seconds, the same in all processes; every one of them asks."""
    summary: Callable[[Ranks], str] = lambda ranks: ""
    """What is to be said at the end of a training; every process asks."""
    held: int = 0
    """Bytes asked for and not used yet, by all that ask here."""
    most: int = 0
    """The largest that `held` has been."""

    def hold(self, size: int) -> None:
        """Enter bytes in the account, or take them out of it."""
        self.held += size
        self.most = max(self.most, self.held)


def in_order(
    features: Features, things: Iterable[tuple[Thing, list[Batch]]]
) -> Iterator[tuple[Thing, States]]:
    """Things with the states of their batches.

    Those of the next ones are asked for while `features.ahead` has room, at least for one: it is
    taken in another thread while the one before is trained on.
    """
    ahead = features.ahead
    if ahead is None:
        for thing, batches in things:
            yield thing, features.ask(batches)()
        return
    following = iter(things)
    upcoming = next(following, None)
    asked: deque[tuple[Thing, int, Take]] = deque()

    def fill(busy: bool) -> None:
        nonlocal upcoming
        while upcoming is not None:
            thing, batches = upcoming
            size = features.token_bytes * sum(sum(batch.lengths) for batch in batches)
            if (busy or asked) and features.held + size > ahead:
                return
            features.hold(size)
            asked.append((thing, size, features.ask(batches)))
            upcoming = next(following, None)

    with ThreadPoolExecutor(1) as reader:
        reading: tuple[Thing, int, Future[States]] | None = None
        while True:
            fill(reading is not None)
            ready = reading and (*reading[:2], reading[2].result())
            if ready:
                features.hold(-ready[1])
                fill(False)
            reading = None
            if asked:
                thing, size, take = asked.popleft()
                reading = thing, size, reader.submit(take)
                fill(True)
            if ready:
                yield ready[0], ready[2]
            elif reading is None:
                return


def joined(parts: States) -> tuple[Tensor, Tensor]:
    """States of conversations, one after the other."""
    aux_TA, last_TH = (torch.cat(column) for column in zip(*parts, strict=True))
    return aux_TA, last_TH


def conversations(batch: Batch) -> tuple[Tensor, ...]:
    """The tokens of each conversation."""
    parts: tuple[Tensor, ...] = batch.ids_T.split(batch.lengths)
    return parts


def computed(target: HiddenStates) -> Features:
    """Run the target every time."""

    def compute(batches: list[Batch]) -> States:
        return rejoined(batches, target([ids_T for b in batches for ids_T in conversations(b)]))

    return Features(lambda batches: lambda: compute(batches))


def rejoined(batches: list[Batch], states: States) -> States:
    """Of batches, from those of all their conversations."""
    following = iter(states)
    return [joined([next(following) for _ in batch.lengths]) for batch in batches]


def computed_together(target: HiddenStates, ranks: Ranks) -> Features:
    """Run a target that all processes share: each of them runs the conversations of all."""

    def compute(batches: list[Batch]) -> States:
        mine = [ids_T.tolist() for batch in batches for ids_T in conversations(batch)]
        states: States = []
        for rank, theirs in enumerate(ranks.gather(mine)):
            for ids in theirs:
                one = target([torch.tensor(ids)])
                states += one if rank == ranks.rank else []
        return rejoined(batches, states)

    return Features(lambda batches: lambda: compute(batches))


def remembered(source: Features) -> Features:
    """Ask for the states of a conversation the first time that it is seen.

    A hidden size of H costs 4 H numbers per token.
    """
    states: dict[int, tuple[Tensor, Tensor]] = {}
    on_the_way: set[int] = set()
    ask_source = source.ask

    def ask(batches: list[Batch]) -> Take:
        new = [
            part
            for batch in batches
            for part in parts_of(batch)
            if part.numbers[0] not in states and part.numbers[0] not in on_the_way
        ]
        on_the_way.update(part.numbers[0] for part in new)
        take_new = ask_source(new)

        def take() -> States:
            for part, pair in zip(new, take_new(), strict=True):
                states[part.numbers[0]] = pair
                on_the_way.discard(part.numbers[0])
            return [joined([states[number] for number in batch.numbers]) for batch in batches]

        return take

    source.ask = ask  # its account stays the one of both
    return source
