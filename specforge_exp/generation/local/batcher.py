"""Continuous batching: sequences enter and leave a running batch one by one."""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from specforge_exp.generation.engine import Failed, Refused, Sampling
from specforge_exp.generation.local.prefixes import BLOCK, Prefixes
from specforge_exp.generation.local.sampling import choose, penalise
from specforge_exp.generation.local.slots import Slots

CHUNK = 512
"""Most new tokens of a sequence in one forward: masks are as wide as the sequence."""
FORWARD = 4096
"""Most new tokens of a forward over several sequences, padding included."""


@dataclass(frozen=True)
class Generated:
    """An answer as tokens."""

    ids: list[int]
    """The end token included, if there was one."""
    finish_reason: str
    """stop or length."""
    cached_tokens: int
    """Prompt tokens whose keys and values were there already."""


@dataclass(eq=False)
class Row:
    """A sequence that waits or is under way."""

    prompt: list[int]
    sampling: Sampling
    most: int
    """New tokens at which it ends."""
    random: Random
    future: asyncio.Future[Generated]
    new: list[int] = field(default_factory=list)
    cached: int = 0


class Batcher:
    """Generates for any number of sequences, `slots` of them at a time, in one thread of its own.

    Args:
        model: a causal model of transformers, on its device.
        eos: tokens that end an answer.
        slots: most sequences at a time; more wait.
        context: most tokens of a sequence, prompt included.
        cache_bytes: memory for the keys and values of what was computed before; 0: none.

    Raises:
        InputError: the model keeps more than keys and values of attention.
    """

    def __init__(
        self, model: Any, eos: Collection[int], slots: int, context: int, cache_bytes: int = 1 << 30
    ) -> None:
        with torch.inference_mode():
            self.slots = Slots(model, slots, context, aside=cache_bytes)
            self.prefixes = Prefixes(self.slots, cache_bytes)
        self.eos, self.context = set(eos), context
        self.counts: Counter[str] = Counter()
        """requests, prompt_tokens, cached_tokens, generated_tokens since the start."""
        self.waiting: deque[Row] = deque()
        self.rows: list[Row | None] = []
        self.closing = False
        self.wake = threading.Condition()
        self.finished: list[tuple[Row, Generated | Exception]] = []
        self.thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self.thread.start()

    @property
    def running(self) -> int:
        """Sequences under way."""
        return sum(row is not None for row in self.rows)

    async def generate(self, ids: list[int], sampling: Sampling, seed: int) -> Generated:
        """The continuation of ids; cancelling the caller frees the slot.

        Its samples depend on ids, sampling and seed alone, up to the rounding of a forward whose
        shape is that of the whole batch.

        Raises:
            Refused: it does not fit the context or the memory of a slot.
            Failed: the forward failed, or the batcher was closed.
        """
        if not ids or len(ids) >= self.context:
            raise Refused(
                f"the prompt has {len(ids)} tokens; the context of {self.context} tokens must hold "
                "it and an answer"
            )
        most = min(sampling.max_tokens, self.context - len(ids))
        if len(ids) + most > self.slots.room:
            raise Refused(
                f"prompt and answer may take {len(ids) + most} tokens and memory holds "
                f"{self.slots.room} for each of {self.slots.count} sequences at a time: "
                "lower the concurrency or max_tokens"
            )
        future: asyncio.Future[Generated] = asyncio.get_running_loop().create_future()
        row = Row(ids, sampling, most, Random(seed), future)
        with self.wake:
            if self.closing:
                raise Failed("the engine was closed")
            self.waiting.append(row)
            self.wake.notify()
        return await future

    def close(self) -> None:
        """Stop the thread; what is under way or waiting fails."""
        with self.wake:
            self.closing = True
            self.wake.notify()
        self.thread.join()

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.waiting or self.rows or self.closing)
                if self.closing:
                    break
            try:
                self._admit()
                self._step()
            except (
                Exception
            ) as error:  # out of memory, or a model's own: these rows, not the thread
                self._fail(Failed(f"{type(error).__name__}: {error}"))
                self.slots.clear()
                self.prefixes.places.clear()
            self._deliver()
        self._fail(Failed("the engine was closed"))
        self._deliver()

    def _admit(self) -> None:
        """Fill free slots from the queue, then close the gaps: active rows are the first slots."""
        self.rows = [None if row and row.future.cancelled() else row for row in self.rows]
        while taken := self._take():
            for slot, row in taken.items():
                places, _ = self.prefixes.match(row.prompt)
                if places:
                    self.prefixes.load(slot, places)
                row.cached = len(places) * BLOCK
            self._prefill(taken)
        while None in self.rows:
            if (last := self.rows.pop()) is not None:
                gap = self.rows.index(None)
                self.slots.move(len(self.rows), gap, len(last.prompt) + len(last.new) - 1)
                self.rows[gap] = last

    def _take(self) -> dict[int, Row]:
        """Put waiting sequences into free slots, in order.

        One that would compute the same block as another stays behind and finds it in the cache.
        """
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        free += range(len(self.rows), self.slots.count)
        taken: dict[int, Row] = {}
        behind: list[Row] = []
        claimed = set()
        while len(taken) < len(free) and self.waiting:
            row = self.waiting.popleft()
            if row.future.cancelled():
                continue
            _, missing = self.prefixes.match(row.prompt)
            if missing is not None and missing in claimed:
                behind.append(row)
                continue
            claimed.add(missing)
            slot = free[len(taken)]
            self.rows += [None] * (slot + 1 - len(self.rows))
            self.rows[slot] = taken[slot] = row
        self.waiting.extendleft(reversed(behind))
        return taken

    def _prefill(self, rows: dict[int, Row]) -> None:
        """Compute prompts and choose each one's first token; those of similar length together."""
        starts: dict[int, int] = {}
        for slot, row in rows.items():
            starts[slot] = row.cached
            while len(row.prompt) - starts[slot] > CHUNK:
                start = starts[slot]
                self.slots.run([slot], [row.prompt[start : start + CHUNK]], [start])
                starts[slot] += CHUNK
        rest = {slot: row.prompt[starts[slot] :] for slot, row in rows.items()}
        ordered = sorted(rows, key=lambda slot: -len(rest[slot]))
        while ordered:
            longest = len(rest[ordered[0]])
            group = [s for s in ordered if len(rest[s]) * 4 >= longest * 3]
            group = group[: max(1, FORWARD // longest)]
            ordered = ordered[len(group) :]
            logits_BV = self.slots.run(group, [rest[s] for s in group], [starts[s] for s in group])
            for slot in group:
                row = rows[slot]
                self.prefixes.keep(slot, row.prompt)
                self.counts.update(
                    requests=1, prompt_tokens=len(row.prompt), cached_tokens=row.cached
                )
            self._advance({slot: rows[slot] for slot in group}, logits_BV)

    def _step(self) -> None:
        """One token for everybody."""
        rows = [row for row in self.rows if row]
        if rows:
            last = [len(row.prompt) + len(row.new) - 1 for row in rows]
            logits_BV = self.slots.run(None, [row.new[-1:] for row in rows], last)
            self._advance(dict(enumerate(rows)), logits_BV)

    def _advance(self, rows: dict[int, Row], logits_BV: Tensor) -> None:
        """Choose the next token of the rows in these slots; the finished leave them."""
        samplings = [row.sampling for row in rows.values()]
        uniforms = [
            row.random.random() if row.sampling.temperature > 0 else 0.0 for row in rows.values()
        ]
        for place, row in enumerate(rows.values()):
            if (penalty := row.sampling.repetition_penalty) != 1:
                penalise(logits_BV[place], row.prompt + row.new, penalty)
        tokens = choose(logits_BV, samplings, uniforms)
        self.counts["generated_tokens"] += len(tokens)
        for (slot, row), token in zip(rows.items(), tokens, strict=True):
            row.new.append(token)
            ended = token in self.eos and not row.sampling.ignore_eos
            if ended or len(row.new) >= row.most:
                self.prefixes.keep(slot, row.prompt + row.new[:-1])
                self.rows[slot] = None
                reason = "stop" if ended else "length"
                self.finished.append((row, Generated(row.new, reason, row.cached)))

    def _fail(self, error: Exception) -> None:
        """Give up everything under way; when closing, what waits too."""
        rows = [row for row in self.rows if row is not None]
        if self.closing:
            rows += self.waiting
            self.waiting.clear()
        self.rows = []
        self.finished += [(row, error) for row in rows]

    def _deliver(self) -> None:
        """Hand results to the event loops that wait for them."""
        for row, result in self.finished:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                row.future.get_loop().call_soon_threadsafe(resolve, row.future, result)
        self.finished = []


def resolve(future: asyncio.Future[Generated], result: Generated | Exception) -> None:
    """Set the result of a future, unless it was cancelled."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
