"""Regeneration on Modal: chunks go to containers with a server each, results come as they are done.

All chunks are spawned at once and written down in calls.jsonl, so this process may end at any
moment: the calls go on, and the next start asks for them by their ids. A part whose container or
server died is split in halves, each run with nothing beside it, until the conversation that does it
is alone.
"""

import asyncio
import hashlib
import json
import logging
import time
from dataclasses import asdict, replace
from typing import Any

try:
    import modal
except ImportError:
    from specforge_exp.errors import InputError

    needed = "engine=modal needs Modal's client: pip install 'specforge-exp[modal]'"
    raise InputError(needed) from None

from modal_sweep.client.volumes import volume
from modal_sweep.errors import CallError, Cancelled, Died, Raised, ResultGone, Unreachable
from specforge_exp.config import Config
from specforge_exp.data.conversations import BadRecord
from specforge_exp.errors import InputError
from specforge_exp.generation.modal_app import deployed, pools
from specforge_exp.generation.modal_calls import Journal, new_outage, patiently, result_of
from specforge_exp.generation.modal_worker import pack, read, unpack
from specforge_exp.generation.progress import EVERY, Progress
from specforge_exp.generation.regenerate import Rules
from specforge_exp.generation.rules import rules_of
from specforge_exp.generation.run import RateLimit
from specforge_exp.generation.store import Chunk, Store
from specforge_exp.interrupt import Interrupt
from specforge_exp.serving.sglang import tp_size_of

log = logging.getLogger(__name__)

JOURNAL = "calls.jsonl"
POLL = 1.0
"""Seconds between two looks at a call."""
TOGETHER = 8
"""Calls that are looked at together."""
ATTEMPTS = 5
"""Calls for one part: results are lost only with the call and the Volume."""


async def answer_on_modal(cfg: Config, store: Store, interrupt: Interrupt) -> None:
    """Answer everything that the store lacks, or until the process is asked to end.

    Raises:
        InputError: the containers' own code fails, or Modal refuses or has not answered for long.
    """
    chunks = list(store.chunks())
    if not chunks and not (store.folder / JOURNAL).exists():
        return
    cfg = replace(cfg, engine=replace(cfg.engine, tp_size=tp_size_of(cfg)))
    try:
        await fan_out(Client(cfg, store, await deployed(cfg)), chunks, interrupt)
    except modal.exception.Error as error:
        raise InputError(f"engine=modal: {error}; what is done is kept") from None


async def fan_out(client: "Client", chunks: list[Chunk], interrupt: Interrupt) -> None:
    """Answer these chunks; what the run has on the Volume is deleted when they are complete."""
    progress = client.progress = Progress(client.store, interrupt)
    await client.begin()
    tasks = [asyncio.create_task(client.complete(chunk)) for chunk in chunks]
    work: asyncio.Future[Any] = asyncio.gather(*tasks)
    look: asyncio.Future[Any] = asyncio.create_task(client.look_at_all())
    reported = 0.0
    try:
        while not work.done() and not interrupt.number:
            await asyncio.wait({work, look}, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            if look.done():
                look.result()
            if (now := time.monotonic()) - reported > EVERY:
                reported = now
                client.report()
        if work.done():
            work.result()
            await client.clear()
        else:
            progress.bar.write(
                f"regen: stopped; {len(client.pending)} calls go on at Modal, and the same command "
                "brings their results"
            )
    finally:
        async with client.spawning:  # a call that is being spawned gets its line
            for task in [*tasks, look]:
                task.cancel()
        await asyncio.gather(*tasks, look, work, return_exceptions=True)
        client.report()


class Client:
    """One process's view of a run: what is spawned, what is waited for.

    Args:
        cfg: engine, resources and model count.
        store: what is answered already.
        app: the deployed app.
    """

    progress: Progress

    def __init__(self, cfg: Config, store: Store, app: str) -> None:
        self.cfg, self.store, self.app = cfg, store, app
        self.rules = plain(rules_of(cfg))
        decides = {**self.rules, "made_by": cfg.model.path, "samples": store.samples}
        decides["sources"] = [plan.digest for plan in store.plans]  # the folder is deleted as one
        text = json.dumps(decides, sort_keys=True)
        self.folder = f"regen/{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.volume_name = cfg.resources["volumes"][cfg.resources["env"]["SPECFORGE_DATASETS"]]
        self.journal = Journal(store.folder / JOURNAL)
        self.pace = RateLimit(cfg.engine.rate_limit)
        self.spawning = asyncio.Lock()
        self.outage = new_outage()
        self.pending: dict[str, tuple[asyncio.Future[bytes], int]] = {}
        """Calls that are waited for, with their number of conversations."""

    async def begin(self) -> None:
        """Look up what calls need."""
        self.volume = volume(self.volume_name)
        await patiently(self.volume.hydrate.aio, self.outage)
        self.pools = pools(self.app, self.cfg.engine.num_servers)

    async def complete(self, chunk: Chunk) -> None:
        """Bring results for everything that a chunk lacks."""
        places = self.journal.first.get(chunk.name) or chunk.missing()
        while places:
            await self.bring(chunk, places, alone=False)
            places = chunk.missing()

    async def bring(self, chunk: Chunk, places: list[int], alone: bool) -> None:
        """Bring results for these places; where a server dies of them, for each half by itself."""
        if all(place in chunk.results for place in places):
            return
        part = part_name(chunk, places, alone)
        if part not in self.journal.left:
            why = await self.call_until_answered(part, chunk, places, alone)
            left = [place for place in places if place not in chunk.results]
            if left:
                self.journal.write({"part": part, "left": left, "why": why})
        entry = self.journal.left.get(part, {"left": []})
        left = entry["left"]
        if alone and len(places) == 1 and left:
            record = self.store.read(chunk, left[0])
            self.keep(chunk, left[0], {"error": f"{entry['why']}, with nothing else", **record})
        elif left:
            if not alone:
                log.info("regen: %s: %d conversations are tried apart", entry["why"], len(left))
            middle = (len(left) + 1) // 2
            halves = [half for half in (left[:middle], left[middle:]) if half]
            await asyncio.gather(*(self.bring(chunk, half, alone=True) for half in halves))

    async def call_until_answered(
        self, part: str, chunk: Chunk, places: list[int], alone: bool
    ) -> str:
        """Keep the results of a part; what died of those places that have none."""
        for _ in range(ATTEMPTS):
            call = self.journal.calls.get(part)
            own = call is None
            try:
                if call is None:
                    call = await self.spawn(part, chunk, places, alone)
                packed: bytes | None = await self.wait(call, len(places))
            except (ResultGone, Cancelled):
                packed = await patiently(lambda: read(self.volume, self.file(part)), self.outage)
            except Died as error:
                return f"the container dies ({error})"
            except Raised as failure:
                if own:
                    cause = failure.error
                    reason = str(cause) if isinstance(cause, InputError) else repr(cause)
                    raise InputError(
                        f"the containers of {self.app} fail: {reason}; their log: modal app logs "
                        f"{self.app}"
                    ) from None
                packed = None
            if packed is not None:
                answered = unpack(packed)
                self.journal.write({"part": part, "seconds": answered["seconds"]})
                for place, result in answered["results"].items():
                    self.keep(chunk, int(place), result)
                return "the server dies"
            self.journal.calls.pop(part, None)
        raise InputError(
            f"the results of {ATTEMPTS} calls for {part} are gone; the log: modal app logs "
            f"{self.app}"
        )

    async def spawn(self, part: str, chunk: Chunk, places: list[int], alone: bool) -> str:
        """Spawn a call and write its id down, one after the other; the id."""
        async with self.spawning:
            await self.pace.wait()
            payload = pack({
                "rules": self.rules, "items": self.items(chunk, places), "file": self.file(part),
                "volume": self.volume_name,
            })  # fmt: skip
            pool = self.pools[alone]
            spawned = await patiently(lambda: pool.answer.spawn.aio(payload), self.outage)
            call = str(spawned.object_id)
            self.journal.write({"chunk": chunk.name, "part": part, "places": places, "call": call})
            return call

    def items(self, chunk: Chunk, places: list[int]) -> list[tuple[int, int, dict[str, Any]]]:
        """Place, number of the sample and conversation; what is no conversation fails here."""
        items = []
        for place in places:
            try:
                items.append((place, place % self.store.samples, self.store.read(chunk, place)))
            except BadRecord as error:
                self.keep(chunk, place, {"error": str(error), "id": ""})
        return items

    def file(self, part: str) -> str:
        """Where the results of a part lie on the Volume."""
        return f"{self.folder}/{part}.json.z"

    async def wait(self, call: str, conversations: int) -> bytes:
        """What a call returns; raises what `result_of` raises for its end."""
        future: asyncio.Future[bytes] = asyncio.Future()
        self.pending[call] = (future, conversations)
        try:
            return await future
        finally:
            del self.pending[call]

    async def look_at_all(self) -> None:
        """Look at the pending calls again and again, a few at a time."""
        while True:
            calls = list(self.pending)
            for start in range(0, len(calls), TOGETHER):
                await asyncio.gather(*map(self.look, calls[start : start + TOGETHER]))
            await asyncio.sleep(POLL if self.outage.since is None else 2 * POLL)

    async def look(self, call: str) -> None:
        """Look at one call; its end wakes whoever waits for it."""
        if call not in self.pending:
            return
        future, _ = self.pending[call]
        try:
            packed = await result_of(call)
        except Unreachable as error:
            self.outage.lasts(error)
            return
        except CallError as error:
            if not future.done():
                future.set_exception(error)
            return
        self.outage.over()
        if packed is not None and not future.done():
            future.set_result(packed)

    def keep(self, chunk: Chunk, place: int, result: dict[str, Any]) -> None:
        """Store a result, unless there is one."""
        if place not in chunk.results:
            self.store.add(chunk, place, result)
            self.progress.bar.update()

    def report(self) -> None:
        """Write progress.json. The cost is what containers have reported, over all starts."""
        progress, engine = self.progress, self.cfg.engine
        progress.in_flight = sum(count for _, count in self.pending.values())
        gpu_seconds = sum(self.journal.seconds.values()) * (engine.tp_size or 1)
        progress.usd = engine.usd_per_gpu_hour * gpu_seconds / 3600
        progress.write()

    async def clear(self) -> None:
        """Everything is stored here: delete the run's files on the Volume."""
        try:
            await self.volume.remove_file.aio(self.folder, recursive=True)
        except (FileNotFoundError, modal.exception.Error):
            log.info("regen: the folder %s of Volume %s stays", self.folder, self.volume_name)
        self.journal.path.unlink(missing_ok=True)


def plain(rules: Rules) -> dict[str, Any]:
    """The fields of the rules that go into a call."""
    fields = asdict(replace(rules, count=None))
    del fields["count"]
    return fields


def part_name(chunk: Chunk, places: list[int], alone: bool) -> str:
    """The name of a call's work: the chunk, which of its places, and how."""
    digest = hashlib.blake2b(json.dumps([places, alone]).encode(), digest_size=4)
    return f"{chunk.name}-{digest.hexdigest()}"
