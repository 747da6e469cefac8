"""A container of engine=modal: one server, and chunks of conversations that it answers.

A part is a chunk, or those of its conversations that are tried again. What its call returns also
goes to a Volume, so that a lost handle costs nothing and a part that is asked for twice is answered
once.
"""

import asyncio
import io
import json
import os
import socket
import time
import zlib
from typing import Any

import modal
import modal.experimental
import orjson

from specforge_exp.config import Config, EngineConfig, LossConfig, ModelConfig
from specforge_exp.generation.engine import Sampling, ServerDied
from specforge_exp.generation.regenerate import Item, Record, Rules, regenerate
from specforge_exp.generation.server_engine import ServerEngine
from specforge_exp.serving.gpus import marks_of

SERVER = "SPECFORGE_REGEN"
"""The environment variable that says which model is served how."""


class Worker:
    """One server for as long as the container lives."""

    @modal.enter()
    async def start(self) -> None:
        """Start the server; raises InputError when it does not become healthy."""
        settings = json.loads(os.environ[SERVER])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            engine = EngineConfig(**settings["engine"], port=free.getsockname()[1])
        loss = LossConfig(lambda_ce=1.0)  # there is no Config without one
        self.cfg = Config(model=ModelConfig(**settings["model"]), engine=engine, loss=loss)
        self.engine = ServerEngine(self.cfg)
        self.room = asyncio.Semaphore(engine.concurrency)
        self.accounted = time.monotonic()
        await self.engine.start(0)
        self.marks = tuple(marks_of(self.cfg.model))  # whose files the server has fetched

    @modal.exit()
    async def stop(self) -> None:
        """End the server."""
        await self.engine.close()

    @modal.method()
    async def answer(self, packed: bytes) -> bytes:
        """The results of a part, packed: `results` by place, and `seconds` of the container.

        A place that is missing was under way when the server died.
        """
        part = unpack(packed)
        volume = modal.Volume.from_name(part["volume"])
        if (earlier := await read(volume, part["file"])) is not None:
            return earlier
        try:
            results = await self.results(part)
        except Exception:
            await modal.experimental.stop_fetching_inputs.aio()  # others get another container
            raise
        before, self.accounted = self.accounted, time.monotonic()
        answered = pack({"results": results, "seconds": round(self.accounted - before, 2)})
        await write(volume, part["file"], answered)
        return answered

    async def results(self, part: dict[str, Any]) -> dict[str, Record]:
        """Regenerate, `engine.concurrency` conversations of this container at a time."""
        from specforge_exp.generation.rules import counter  # loads torch, after the server began

        fields = part["rules"]
        sampling = Sampling(**fields.pop("sampling"))
        count = counter(self.cfg.model, fields["template_kwargs"])
        rules = Rules(sampling=sampling, count=count, marks=self.marks, **fields)
        results: dict[str, Record] = {}

        async def answer(place: int, sample: int, record: Record) -> None:
            async with self.room:
                try:
                    results[str(place)] = await regenerate(
                        Item(record, sample), rules, self.engine.answer
                    )
                except ServerDied:
                    return

        tasks = [asyncio.create_task(answer(*item)) for item in part["items"]]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return results


def pack(content: dict[str, Any]) -> bytes:
    """JSON, compressed."""
    return zlib.compress(orjson.dumps(content), 6)


def unpack(packed: bytes) -> dict[str, Any]:
    """What `pack` was given."""
    content: dict[str, Any] = orjson.loads(zlib.decompress(packed))
    return content


async def read(volume: modal.Volume, path: str) -> bytes | None:
    """A file of a Volume as it is now, mounted or not; None when it is not there."""
    try:
        return b"".join([block async for block in volume.read_file.aio(path)])
    except (FileNotFoundError, modal.exception.NotFoundError):
        return None


async def write(volume: modal.Volume, path: str, content: bytes) -> None:
    """Write a file of a Volume; when Modal refuses, the call's own result still counts."""
    try:
        async with volume.batch_upload(force=True) as batch:
            batch.put_file(io.BytesIO(content), path)
    except (modal.exception.Error, OSError) as error:
        print(f"regen: {path} is not on the Volume: {error}")
