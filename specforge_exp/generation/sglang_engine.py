"""SGLang on this machine: one server for every tp_size GPUs, started, watched and ended here."""

import asyncio
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from specforge_exp.config import Config, EngineConfig
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import Answer, Request, ServerDied
from specforge_exp.generation.openai_engine import OpenAIEngine
from specforge_exp.generation.servers import Server

log = logging.getLogger(__name__)

SIZES = ((9e9, 1), (35e9, 2), (80e9, 4))
"""Most parameters, GPUs: 80 GB hold so many in 16 bits and leave room for keys and values."""
LARGEST = 8


class SGLangEngine:
    """Asks servers that it starts when they are first needed, and again after they have died.

    Raises:
        InputError: the GPUs do not suffice, or SGLang is not installed.
    """

    def __init__(self, cfg: Config) -> None:
        self.options = cfg.engine
        tp_size = tp_size_of(cfg)
        gpus = visible_gpus()
        count = count_servers(cfg.engine, tp_size, len(gpus))
        if not cfg.engine.command and importlib.util.find_spec("sglang") is None:
            raise InputError(
                "engine=sglang needs SGLang in this environment: pip install sglang; or name "
                "another server with engine.command=[...]"
            )
        self.logs = Path(tempfile.mkdtemp(prefix="specforge-servers-"))
        self.processes: list[Server] = []
        for number in range(count):
            own = gpus[number * tp_size : (number + 1) * tp_size]
            port = cfg.engine.port + number
            command = server_command(cfg.engine, cfg.model.path, tp_size, port)
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}
            self.processes.append(
                Server(command, port, self.logs / f"server-{number}.log", environment)
            )
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
                said = server.tail()
                log.warning("regen: server %d has died and is started again; %s", number, said)
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


def server_command(options: EngineConfig, model: str, tp_size: int, port: int) -> list[str]:
    """The command line of one server."""
    if options.command:
        values = {"{model}": model, "{port}": str(port), "{tp_size}": str(tp_size)}
        command = list(options.command)
        for name, value in values.items():
            command = [word.replace(name, value) for word in command]
        # The Python that runs this, whether its folder is on the PATH or not.
        return [sys.executable, *command[1:]] if command[0] == "python" else command
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    command += ["--tp-size", str(tp_size), "--host", "127.0.0.1", "--port", str(port)]
    for key, value in options.args.items():
        command += flag(key, value)
    return command


def flag(key: str, value: Any) -> list[str]:
    """One option of SGLang: true is the bare flag, false and null leave it out."""
    if value is None or value is False:
        return []
    name = "--" + key.replace("_", "-")
    if value is True:
        return [name]
    if isinstance(value, dict):
        return [name, json.dumps(value)]
    return [name, *map(str, value if isinstance(value, list) else [value])]


def visible_gpus() -> list[str]:
    """This machine's GPUs, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def count_servers(options: EngineConfig, tp_size: int, gpus: int) -> int:
    """Number of servers on a machine; raises InputError when it has too few GPUs."""
    if not gpus and options.command:
        return options.num_servers or 1
    most = gpus // tp_size
    if not most:
        raise InputError(
            f"engine.tp_size={tp_size}, but this machine has {gpus} GPUs; engine=modal rents them, "
            "engine=transformers works without"
        )
    wanted = options.num_servers or most
    if wanted > most:
        raise InputError(
            f"engine.tp_size={tp_size} x engine.num_servers={wanted} are {tp_size * wanted} GPUs, "
            f"but this machine has {gpus}; with this tp_size at most engine.num_servers={most}"
        )
    return wanted


def tp_size_of(cfg: Config) -> int:
    """engine.tp_size, or what the target's size asks for."""
    if cfg.engine.tp_size:
        return cfg.engine.tp_size
    if cfg.engine.command:
        return 1
    return tp_size_for(parameters(cfg.model.path))


def tp_size_for(count: int) -> int:
    """GPUs for a model of so many parameters."""
    return next((gpus for most, gpus in SIZES if count <= most), LARGEST)


def parameters(path: str) -> int:
    """Parameters of a model, read off its configuration; raises InputError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model.path={path} does not say how large it is ({reason}); set engine.tp_size"
        ) from None
    return int(model.num_parameters())


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
        return f"engine modal: {most} containers of {options.gpu}:{tp_size}, {many} each{price}"
    gpus = visible_gpus()
    count = count_servers(options, tp_size, len(gpus))
    ports = f"{options.port}..{options.port + count - 1}"
    price = f", ${dollars * count:.2f} per hour" if dollars else ""
    return (
        f"engine sglang: {count} servers on ports {ports}, tp_size {tp_size}, "
        f"{count * tp_size if gpus else 0} of {len(gpus)} GPUs, {many} each{price}"
    )
