"""SGLang or vLLM here: one server for every tp_size GPUs, started, watched and ended."""

import asyncio
import logging
import shutil
import tempfile
from pathlib import Path

from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import Answer, Request, ServerDied
from specforge_exp.generation.openai_engine import OpenAIEngine
from specforge_exp.serving.gpus import count_servers, make_servers, tp_size_of, visible_gpus

log = logging.getLogger(__name__)


class ServerEngine:
    """Asks servers that it starts when they are first needed, and again after they have died.

    Raises:
        InputError: the GPUs do not suffice, or the server is not installed.
    """

    def __init__(self, cfg: Config) -> None:
        self.options = cfg.engine
        self.logs = Path(tempfile.mkdtemp(prefix="specforge-servers-"))
        self.processes = make_servers(cfg, self.logs)
        self.asked = OpenAIEngine(
            cfg, [f"{server.url}/v1" for server in self.processes],
            gone=lambda number: not self.processes[number].running,
        )  # fmt: skip
        self.locks = [asyncio.Lock() for _ in self.processes]
        self.failure: InputError | None = None

    @property
    def servers(self) -> int:
        """As `Engine.servers`."""
        return len(self.processes)

    async def start(self, number: int) -> None:
        """Make sure that a server is healthy; raises InputError when it cannot be started."""
        server = self.processes[number]
        async with self.locks[number]:
            if self.failure:
                raise self.failure
            if server.running:
                return
            if server.process is not None:
                log_tail = server.tail()
                log.warning("regen: server %d has died and is started again; %s", number, log_tail)
            else:
                log.info("regen: server %d starts; its log: %s", number, server.log)
            try:
                await server.start(self.options.startup_timeout)
            except InputError as error:
                self.failure = error
                raise

    async def answer(self, request: Request) -> Answer:
        """As `Engine.answer`."""
        number = request.server % self.servers
        await self.start(number)
        ended = self.processes[number].ended
        assert ended is not None
        ask = asyncio.ensure_future(self.asked.answer(request))
        try:
            await asyncio.wait({ask, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and (not ask.done() or ask.exception()):
                raise ServerDied
            return ask.result()
        finally:
            ask.cancel()

    async def close(self) -> None:
        """As `Engine.close`."""
        await self.asked.close()
        await asyncio.gather(*(server.stop() for server in self.processes))
        if self.failure is None:
            shutil.rmtree(self.logs, ignore_errors=True)


def layout(cfg: Config) -> str:
    """Which servers a run would use, in one line."""
    options = cfg.engine
    many = f"{options.concurrency} conversations at a time"
    if options.name == "transformers":
        return f"engine transformers in this process, {many}"
    if options.name == "openai":
        return f"engine openai: {', '.join(options.urls)}, {many} each"
    tp_size = tp_size_of(cfg)
    dollars = options.usd_per_gpu_hour * tp_size
    if options.name == "modal":
        most = f"at most {options.num_servers}" if options.num_servers else "as many as Modal gives"
        price = f", ${dollars:.2f} per container and hour" if dollars else ""
        server = "" if options.server == "sglang" else f" {options.server} in"
        kind = f"containers of {options.gpu}:{tp_size}"
        return f"engine modal:{server} {most} {kind}, {many} each{price}"
    gpus = visible_gpus()
    count = count_servers(options, tp_size, len(gpus))
    ports = f"{options.port}..{options.port + count - 1}"
    price = f", ${dollars * count:.2f} per hour" if dollars else ""
    return (
        f"engine {options.name}: {count} servers on ports {ports}, tp_size {tp_size}, "
        f"{count * tp_size if gpus else 0} of {len(gpus)} GPUs, {many} each{price}"
    )
