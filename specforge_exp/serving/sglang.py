"""The command line of an SGLang server, and how many of them a machine's GPUs carry."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from specforge_exp.config import Config, EngineConfig
from specforge_exp.errors import InputError, first_line
from specforge_exp.serving.server import Server

SIZES = ((9e9, 1), (35e9, 2), (80e9, 4))
"""Most parameters, GPUs: 80 GB hold so many in 16 bits and leave room for keys and values."""
LARGEST = 8


def check_installed(options: EngineConfig) -> None:
    """Raise InputError when neither SGLang nor another server's command is at hand."""
    own = not options.command and options.python is None
    if own and importlib.util.find_spec("sglang") is None:
        raise InputError(
            "engine=sglang needs SGLang, whose versions are not ours: pip install sglang in an "
            "environment of its own and name its Python with engine.python=..., or another "
            "server with engine.command=[...]"
        )


def server_command(
    options: EngineConfig, model: str, tp_size: int, port: int, draft: dict[str, Any] | None = None
) -> list[str]:
    """The command line of one server, with SGLang's options for a draft if there is one."""
    draft = draft or {}
    python = options.python or sys.executable
    if options.command:
        values = {"{model}": model, "{port}": str(port), "{tp_size}": str(tp_size)}
        values["{draft}"] = draft.get("speculative_draft_model_path", "")
        command = list(options.command)
        for name, value in values.items():
            command = [word.replace(name, value) for word in command]
        # The Python that runs this, whether its folder is on the PATH or not.
        return [python, *command[1:]] if command[0] == "python" else command
    command = [python, "-m", "sglang.launch_server", "--model-path", model]
    command += ["--tp-size", str(tp_size), "--host", "127.0.0.1", "--port", str(port)]
    for key, value in {**draft, **options.args}.items():
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
    count = options.num_servers or most
    if count > most:
        raise InputError(
            f"engine.tp_size={tp_size} x engine.num_servers={count} are {tp_size * count} GPUs, "
            f"but this machine has {gpus}; with this tp_size at most engine.num_servers={most}"
        )
    return count


def make_servers(cfg: Config, folder: Path, draft: dict[str, Any] | None = None) -> list[Server]:
    """This machine's servers, not yet started, with their logs in `folder`.

    Args:
        draft: as `server_command`.

    Raises:
        InputError: the GPUs do not suffice, or SGLang is not installed.
    """
    check_installed(cfg.engine)
    tp_size, gpus = tp_size_of(cfg), visible_gpus()
    servers = []
    for number in range(count_servers(cfg.engine, tp_size, len(gpus))):
        own = gpus[number * tp_size : (number + 1) * tp_size]
        port = cfg.engine.port + number
        command = server_command(cfg.engine, cfg.model.path, tp_size, port, draft)
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}
        servers.append(Server(command, port, folder / f"server-{number}.log", environment))
    return servers


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
        raise InputError(
            f"model.path={path} does not say how large it is ({first_line(error)}); set "
            "engine.tp_size"
        ) from None
    return int(model.num_parameters())
