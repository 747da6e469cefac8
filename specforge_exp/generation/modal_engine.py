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
from dataclasses import asdict, dataclass, replace
from typing import Any

try:
    import modal
except ImportError:
    from specforge_exp.errors import InputError

    needed = "engine=modal needs Modal's client: pip install 'specforge-exp[modal]'"
    raise InputError(needed) from None

from modal_sweep.client.failures import refusal
from modal_sweep.client.volumes import volume
from modal_sweep.errors import Cancelled, Died, Raised, ResultGone
from specforge_exp.config import Config
from specforge_exp.config.rehearsal import offers
from specforge_exp.data.conversations import BadRecord
from specforge_exp.errors import InputError
from specforge_exp.generation.modal_app import deployed, pools
from specforge_exp.generation.modal_calls import Journal, new_outage, patiently, result_of
from specforge_exp.generation.modal_worker import pack, read, unpack
from specforge_exp.generation.progress import EVERY, Progress
from specforge_exp.generation.rules import revision, rules_of
from specforge_exp.generation.run import RateLimit
from specforge_exp.generation.store import Chunk, Store
from specforge_exp.interrupt import Interrupt
from specforge_exp.serving.gpus import tp_size_of

log = logging.getLogger(__name__)

JOURNAL = "calls.jsonl"
POLL = 1.0
"""Seconds between two looks at a call."""
TOGETHER = 8
"""Calls that are looked at together."""
ATTEMPTS = 5
"""Calls for one part: results are lost only with the call and the Volume."""


def unknown_machine() -> str | None:
    """What to do where Modal's client has no token; None where it has one, and in a container."""
    if modal.config.config.get("token_id") or modal.config.config.get("task_id"):
        return None
    return f"engine=modal: {refused(modal.exception.AuthError('Token missing'))}"


def refused(error: Exception) -> str:
    """What an exception of Modal's client means to the user."""
    lines = offers("regen", "regen.dry_run=true", "the work, the servers, the price")
    return refusal(error, f"{lines}\n  engine=sglang, openai or transformers: other servers")


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
        raise InputError(f"engine=modal: {refused(error)}; what is done is kept") from None


async def fan_out(client: "Client", chunks: list[Chunk], interrupt: Interrupt) -> None:
    """Answer these chunks; what the run has on the Volume is deleted when they are complete."""
    progress = client.progress = Progress(client.store, interrupt, count=client.count)
    await patiently(client.volume.hydrate.aio, client.outage)
    tasks = [asyncio.create_task(client.complete(chunk)) for chunk in chunks]
    work: asyncio.Future[Any] = asyncio.gather(*tasks)
    reported = 0.0
    try:
        while not work.done() and not interrupt.number:
            await asyncio.wait({work}, timeout=0.1)
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
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, work, return_exceptions=True)
        client.report()


@dataclass(frozen=True)
class Part:
    """The work of one call."""

    chunk: Chunk
    places: list[int]
    """Which of the chunk's."""
    alone: bool
    """Nothing else runs in the container: its server may die of them."""

    @property
    def name(self) -> str:
        """Says the chunk, which of its places, and how."""
        digest = hashlib.blake2b(json.dumps([self.places, self.alone]).encode(), digest_size=4)
        return f"{self.chunk.name}-{digest.hexdigest()}"

    def left(self) -> list[int]:
        """Places without a result."""
        return [place for place in self.places if place not in self.chunk.results]


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
        rules = rules_of(cfg)
        self.count = rules.count if revision(cfg.model.path) else None
        self.rules = asdict(rules)
        for own in ("count", "marks"):  # which the containers have too
            del self.rules[own]
        decides = {**self.rules, "made_by": cfg.model.path, "samples": store.samples}
        decides["sources"] = [plan.digest for plan in store.plans]  # the folder is deleted as one
        self.journal = Journal(store.folder / JOURNAL)
        decides["run"] = self.journal.run  # with regen.force=true nothing of before is taken
        text = json.dumps(decides, sort_keys=True)
        self.folder = f"regen/{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.volume_name = cfg.resources["volumes"][cfg.resources["env"]["SPECFORGE_DATASETS"]]
        self.volume = volume(self.volume_name)
        self.pools = pools(app, cfg.engine.num_servers)
        self.pace = RateLimit(cfg.engine.rate_limit)
        self.spawning, self.looking = asyncio.Lock(), asyncio.Semaphore(TOGETHER)
        self.outage = new_outage()
        self.pending: dict[str, int] = {}
        """Calls that are waited for, with their number of conversations."""

    async def complete(self, chunk: Chunk) -> None:
        """Bring results for everything that a chunk lacks."""
        places = self.journal.first.get(chunk.name) or chunk.missing()
        while places:
            await self.bring(Part(chunk, places, alone=False))
            places = chunk.missing()

    async def bring(self, part: Part) -> None:
        """Bring results for a part; where a server dies of it, for each half by itself."""
        if not part.left():
            return
        if part.name not in self.journal.left:
            why = await self.call_until_answered(part)
            if left := part.left():
                self.journal.write({"part": part.name, "left": left, "why": why})
        if (entry := self.journal.left.get(part.name)) is None:
            return
        left, why = entry["left"], entry["why"]
        if part.alone and len(part.places) == 1:
            record = self.store.read(part.chunk, left[0])
            self.keep(part.chunk, left[0], {"error": f"{why}, with nothing else", **record})
            return
        if not part.alone:
            log.info("regen: %s: %d conversations are tried apart", why, len(left))
        middle = (len(left) + 1) // 2
        halves = [Part(part.chunk, half, True) for half in (left[:middle], left[middle:]) if half]
        await asyncio.gather(*map(self.bring, halves))

    async def call_until_answered(self, part: Part) -> str:
        """Keep the results of a part; what died of those places that have none."""
        for _ in range(ATTEMPTS):
            earlier = self.journal.calls.get(part.name)
            try:
                call = earlier or await self.spawn(part)
                packed: bytes | None = await self.wait(call, len(part.places))
            except (ResultGone, Cancelled):
                packed = await patiently(lambda: read(self.volume, self.file(part)), self.outage)
            except Died as error:
                return f"the container dies ({error})"
            except Raised as failure:
                if earlier is None:
                    cause = failure.error
                    reason = str(cause) if isinstance(cause, InputError) else repr(cause)
                    raise InputError(
                        f"the containers of {self.app} fail: {reason}; their log: modal app logs "
                        f"{self.app}"
                    ) from None
                packed = None
            if packed is not None:
                answered = unpack(packed)
                self.journal.write({"part": part.name, "seconds": answered["seconds"]})
                for place, result in answered["results"].items():
                    self.keep(part.chunk, int(place), result)
                return "the server dies"
            self.journal.calls.pop(part.name, None)
        raise InputError(
            f"the results of {ATTEMPTS} calls for {part.name} are gone; the log: modal app logs "
            f"{self.app}"
        )

    async def spawn(self, part: Part) -> str:
        """Spawn a call and write its id down, one after the other; the id."""
        async with self.spawning:
            await self.pace.wait()
            payload = pack({
                "rules": self.rules, "items": self.items(part), "file": self.file(part),
                "volume": self.volume_name,
            })  # fmt: skip
            pool = self.pools[part.alone]
            spawned = await patiently(lambda: pool.answer.spawn.aio(payload), self.outage)
            call = str(spawned.object_id)
            entry = {"chunk": part.chunk.name, "part": part.name, "places": part.places}
            self.journal.write({**entry, "call": call})
            return call

    def items(self, part: Part) -> list[tuple[int, int, dict[str, Any]]]:
        """Place, number of the sample and conversation; what is no conversation fails here."""
        items = []
        for place in part.places:
            try:
                record = self.store.read(part.chunk, place)
                items.append((place, place % self.store.samples, record))
            except BadRecord as error:
                self.keep(part.chunk, place, {"error": str(error), "id": ""})
        return items

    def file(self, part: Part) -> str:
        """Where the results of a part lie on the Volume."""
        return f"{self.folder}/{part.name}.json.z"

    async def wait(self, call: str, conversations: int) -> bytes:
        """What a call returns; raises what `result_of` raises for its end."""
        self.pending[call] = conversations
        try:
            while True:
                async with self.looking:
                    packed = await patiently(lambda: result_of(call), self.outage)
                if packed is not None:
                    return packed
                await asyncio.sleep(POLL)
        finally:
            del self.pending[call]

    def keep(self, chunk: Chunk, place: int, result: dict[str, Any]) -> None:
        """Store a result, unless there is one."""
        if place not in chunk.results:
            self.store.add(chunk, place, result)
            self.progress.kept(result)

    def report(self) -> None:
        """Write progress.json. The cost is what containers have reported, over all starts."""
        progress, engine = self.progress, self.cfg.engine
        progress.in_flight = sum(self.pending.values())
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
