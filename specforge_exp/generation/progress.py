"""How far a regeneration is: the bar, progress.json for `regen.py status`, and signals."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from tqdm import tqdm

from specforge_exp.data.messages import Message, Unrenderable, is_given
from specforge_exp.errors import InputError
from specforge_exp.generation.regenerate import Record
from specforge_exp.generation.store import Store
from specforge_exp.interrupt import Interrupt
from specforge_exp.records import write_json

log = logging.getLogger(__name__)

EVERY = 2.0
"""Seconds between two versions of progress.json."""
SAY_EVERY = 60.0
"""Seconds between two lines where there is no terminal for a bar."""


FIRST = 16
"""Prompts that are compared."""
HOPELESS = 100
"""So many failures and not one answer end a run: who pays for the rest should know."""


@dataclass
class Progress:
    """Counts of one process over the store's."""

    store: Store
    interrupt: Interrupt
    usd: float = 0.0
    """What was spent so far, where it is known."""
    in_flight: int = 0
    stopping: bool = False
    count: Callable[[Record, list[Message]], int] | None = None
    """`Rules.count`, to compare the first prompts' lengths with the server's; None: not to."""
    compared: int = 0
    unlike: int = 0

    def __post_init__(self) -> None:
        self.started = self.said = time.monotonic()
        self.before = replace(self.store.counts)
        self.bar = tqdm(
            total=self.store.total, initial=self.before.done + self.before.failed,
            desc="regen", unit="conv", disable=None,
        )  # fmt: skip

    def kept(self, result: Record) -> None:
        """One more result; raises InputError when nothing else than failures has come so far."""
        self.bar.update()
        now = self.store.counts
        if not now.done and now.failed - self.before.failed >= HOPELESS:
            raise InputError(
                f"the first {now.failed} conversations have all failed, the last one for this: "
                f"{result['error']}; what is done is kept, and the same command tries "
                f"{HOPELESS} more"
            )

        if self.count and self.compared < FIRST:
            self.compare(self.count, result)

    def compare(self, count: Callable[[Record, list[Message]], int], result: Record) -> None:
        """Warn once where most of the first prompts have other lengths in the server: preprocess
        would find it, when all answers are paid for."""
        told, messages = (result.get("prompt_tokens") or [0])[0], result.get("conversations", [])
        own = (at for at, m in enumerate(messages) if m["role"] == "assistant" and not is_given(m))
        first = next(own, None)
        if not told or first is None:
            return
        try:
            length = count(result, messages[:first])
        except (InputError, Unrenderable):
            self.count = None
            return
        self.compared += 1
        self.unlike += length != told
        if self.compared == FIRST and 2 * self.unlike > FIRST:
            log.warning(
                "regen: warning: %d of the first %d prompts have another number of tokens in the "
                "server than model.path's chat template makes here (the last one %d, here %d): "
                "it has another template, tokenizer or model",
                self.unlike, FIRST, told, length,
            )  # fmt: skip

    def write(self) -> None:
        """Say how far it is, for a `status` in another process."""
        seconds = time.monotonic() - self.started
        now, before = self.store.counts, self.before
        here = now.done + now.failed - before.done - before.failed
        left = self.store.total - now.done - now.failed
        tokens_per_second = (now.tokens - before.tokens) / seconds
        if self.bar.disable and time.monotonic() - self.said > SAY_EVERY:
            self.said = time.monotonic()
            log.info(
                "regen: %d of %d done, %d failed, %d in flight, %.0f tokens/s",
                now.done, self.store.total, now.failed, self.in_flight, tokens_per_second,
            )  # fmt: skip
        write_json(self.store.folder / "progress.json", {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "total": self.store.total,
            **vars(now),
            "in_flight": self.in_flight,
            "conversations_per_second": round(here / seconds, 3),
            "tokens_per_second": round(tokens_per_second, 1),
            "seconds_left": round(left * seconds / here) if here else None,
            "usd": round(self.usd, 2),
        })  # fmt: skip

    async def watch(self, workers: list[asyncio.Task[None]], drain: float) -> None:
        """Write progress.json now and then; after a signal give workers `drain` seconds to end."""
        written = 0.0
        signalled: float | None = None
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            if now - written > EVERY:
                with suppress(OSError):  # the next answer meets a full disk; signals must go on
                    self.write()
                written = now
            if self.interrupt.number and signalled is None:
                signalled, self.stopping = now, True
                self.bar.write(f"regen: stopping; answers under way get {drain:g} s to end")
            if signalled is not None and now - signalled > drain:
                for worker in workers:
                    worker.cancel()
                return
