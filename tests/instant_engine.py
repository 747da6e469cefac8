"""An engine that answers at once, and what a run with it needs; tests and benchmarks share it."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specforge_exp.generation.engine import Answer, Engine, Request, Sampling, ServerDied
from specforge_exp.generation.progress import Progress
from specforge_exp.generation.regenerate import Rules
from specforge_exp.generation.run import RateLimit, Regeneration, answer_missing
from specforge_exp.generation.store import Store
from specforge_exp.interrupt import Interrupt


def rules(**changes: Any) -> Rules:
    """Rules of a run; greedy, no tokenizer."""
    given: dict[str, Any] = {
        "sampling": Sampling(), "max_length": 2048, "count": None, "template_kwargs": {},
        "thinking": "model", "truncated": "keep", "seed": 0, "attempts": 1,
        "made_by": {"model": "m", "engine": "instant"},
    }  # fmt: skip
    return Rules(**given | changes)


class Instant:
    """Answers with the number of messages it saw, and remembers who asked what of whom.

    Args:
        servers: how many it pretends to have.
        reply: makes another answer of a request.
        poison: a request with this text ends the server, for everyone it is talking to.
    """

    def __init__(
        self,
        servers: int = 1,
        reply: Callable[[Request], Answer] | None = None,
        poison: str | None = None,
    ) -> None:
        self.servers = servers
        self.reply = reply or plain
        self.poison = poison
        self.asked: list[Request] = []
        self.most = self.under_way = self.lives = 0
        self.closed = False

    async def answer(self, request: Request) -> Answer:
        """At the loop's next turn; raises ServerDied when the server ended before that."""
        self.asked.append(request)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        life = self.lives
        if self.poison and self.poison in request.messages[-1]["content"]:
            self.lives += 1
        await asyncio.sleep(0)
        self.under_way -= 1
        if life != self.lives:
            raise ServerDied
        return self.reply(request)

    async def close(self) -> None:
        """Remember it."""
        self.closed = True


def plain(request: Request) -> Answer:
    """An answer of four tokens."""
    return said(f"answer to {request.messages[-1]['content'][-20:]}")


def said(text: str, finish_reason: str = "stop", **message: Any) -> Answer:
    """An answer with this text."""
    return Answer({"role": "assistant", "content": text, **message}, finish_reason, 10, 4)


def answer_all(
    store: Store, engine: Engine, concurrency: int = 8, rate: float | None = None, **changes: Any
) -> None:
    """Regeneration until everything is answered."""
    with Interrupt() as interrupt:
        job = Regeneration(
            store, engine, rules(**changes), RateLimit(rate), Progress(store, interrupt)
        )
        asyncio.run(answer_missing(job, concurrency, drain=1.0))


def make_store(
    folder: Path, source: Path, chunk_size: int = 4, most: int | None = None, samples: int = 1
) -> Store:
    """The store of one file."""
    folder.mkdir(exist_ok=True)
    return Store(folder, {source: "digest"}, chunk_size, most, samples)


def merged(store: Store) -> tuple[list[bytes], list[bytes]]:
    """The lines of what is done and of what failed, in order."""
    done, failed = store.folder / "done.jsonl", store.folder / "failed.jsonl"
    with done.open("wb") as good, failed.open("wb") as bad:
        store.merge(store.plans[0], good, bad)
    return done.read_bytes().splitlines(), failed.read_bytes().splitlines()
