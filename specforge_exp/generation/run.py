"""Answer what a store lacks: many conversations at a time, none of the servers ever idle.

Every server has `concurrency` workers. They take the conversations of the server's own chunk one
after the other, so a long answer holds up nobody, and what shares a beginning stays where that
is cached. A server without a chunk takes the next one, at the end half of what another has left.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from specforge_exp.data.conversations import BadRecord
from specforge_exp.generation.engine import Engine, ServerDied, Unreachable
from specforge_exp.generation.progress import Progress
from specforge_exp.generation.regenerate import Item, Record, Rules, regenerate
from specforge_exp.generation.store import Chunk, Store

log = logging.getLogger(__name__)

Place = tuple[Chunk, int]


@dataclass
class Assignment:
    """Which server answers what."""

    chunks: Iterator[Chunk]
    waiting: list[deque[Place]]
    """By server."""

    def next(self, server: int) -> Place | None:
        """The next place for this server; None when nothing is left for anyone."""
        own = self.waiting[server]
        if not own and (chunk := next(self.chunks, None)):
            own.extend((chunk, place) for place in chunk.missing())
        if not own:
            other = max(self.waiting, key=len)
            for _ in range((len(other) + 1) // 2):
                own.appendleft(other.pop())
        return own.popleft() if own else None


@dataclass
class RateLimit:
    """At most `rate` requests per second, evenly spaced; None: no limit."""

    rate: float | None
    slot: float = 0.0

    async def wait(self) -> None:
        """Return when the next request may start."""
        if self.rate is None:
            return
        now = time.monotonic()
        self.slot = max(self.slot, now) + 1 / self.rate
        await asyncio.sleep(self.slot - 1 / self.rate - now)


@dataclass
class Regeneration:
    """What the workers of one run share."""

    store: Store
    engine: Engine
    rules: Rules
    pace: RateLimit
    progress: Progress
    suspects: list[Place] = field(default_factory=list)
    """Under way when a server died."""
    lost: dict[int, Unreachable] = field(default_factory=dict)
    """Servers that are given up."""

    async def work(self, deal: Assignment, server: int) -> None:
        """Answer places of one server until there are none, or the run is to end.

        What a server that cannot be reached leaves is there for the others.
        """
        while not self.progress.stopping and (place := deal.next(server)):
            try:
                await self.answer(place, server)
            except Unreachable as error:
                deal.waiting[server].appendleft(place)
                if server not in self.lost and self.engine.servers > 1:
                    log.warning("regen: the other servers do the work of %s", error)
                self.lost[server] = error
                return

    async def answer(self, place: Place, server: int) -> None:
        """Answer one place and keep the result."""
        chunk, number = place
        try:
            record = self.store.read(chunk, number)
        except BadRecord as error:
            self.keep(place, {"error": str(error), "id": ""})
            return
        await self.pace.wait()
        item = Item(record, number % self.store.samples, server)
        self.progress.in_flight += 1
        try:
            self.keep(place, await regenerate(item, self.rules, self.engine.answer))
        except ServerDied:
            self.suspects.append(place)
        finally:
            self.progress.in_flight -= 1

    def keep(self, place: Place, result: Record) -> None:
        """Store a result."""
        self.store.add(*place, result)
        self.progress.kept(result)

    async def try_suspects(self) -> None:
        """Find those that kill servers: nothing else runs, half of them at a time.

        Whoever dies alone with its server has failed; all others get their answers.
        """
        groups = [self.suspects]
        while groups and not self.progress.stopping:
            group, self.suspects = groups.pop(), []
            log.info("regen: a server died; %d conversations that it had are tried", len(group))
            server = next(n for n in range(self.engine.servers) if n not in self.lost)
            await asyncio.gather(*(self.answer(place, server) for place in group))
            died = self.suspects
            if len(group) == 1 and died:
                chunk, number = died[0]
                record = self.store.read(chunk, number)
                self.keep(died[0], {"error": "the server dies of it", **record})
            elif died:
                middle = (len(died) + 1) // 2
                groups += [part for part in (died[middle:], died[:middle]) if part]
        self.suspects = []


async def answer_missing(run: Regeneration, concurrency: int, drain: float) -> None:
    """Answer everything that the store lacks, or stop when the process is asked to end.

    Args:
        run: what to answer, with what.
        concurrency: conversations at a time, per server.
        drain: seconds that those under way get after a signal.

    Raises:
        Unreachable: no server answers; what is done is kept.
    """
    deal = Assignment(run.store.chunks(), [deque() for _ in range(run.engine.servers)])
    workers: list[asyncio.Task[None]] = []
    watch = asyncio.create_task(run.progress.watch(workers, drain))
    try:
        while not run.progress.stopping:
            alive = [n for n in range(run.engine.servers) if n not in run.lost]
            if not alive:
                raise next(iter(run.lost.values()))
            servers = [n for n in alive for _ in range(concurrency)]
            workers[:] = [asyncio.create_task(run.work(deal, n)) for n in servers]
            await asyncio.gather(*workers)
            if not any(deal.waiting):
                break
        if run.suspects:
            workers.append(asyncio.create_task(run.try_suspects()))
            await workers[-1]
    except asyncio.CancelledError:
        if not run.progress.stopping:
            raise
    except Unreachable:
        run.progress.stopping = True
        raise
    finally:
        for task in [*workers, watch]:
            task.cancel()
        await asyncio.gather(*workers, watch, return_exceptions=True)
        await run.engine.close()
