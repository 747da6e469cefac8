"""How many servers a machine's GPUs carry, and how many GPUs one of them needs."""

import os
from dataclasses import replace
from pathlib import Path

from specforge_exp.artifacts import files_of
from specforge_exp.config import Config, EngineConfig, ModelConfig
from specforge_exp.config.machine import on_the_hub
from specforge_exp.errors import InputError, first_line
from specforge_exp.offline import offline
from specforge_exp.serving.command import Speculation, check_installed, program, server_command
from specforge_exp.serving.server import Server

SIZES = ((9e9, 1), (35e9, 2))
"""Most parameters, GPUs: 80 GB hold so many in 16 bits and leave room for keys and values."""
LARGEST = 8


def visible_gpus() -> list[str]:
    """This machine's GPUs, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def count_servers(options: EngineConfig, tp_size: int, gpus: int) -> int:
    """Number of servers on a machine; raises InputError when it has too few GPUs.

    Without any, another server's command is believed to need none, and so is vLLM when the number
    of servers is given: there are builds of it for CPUs.
    """
    if not gpus and (options.command or (options.name == "vllm" and options.num_servers)):
        return options.num_servers or 1
    most = gpus // tp_size
    if not most:
        raise InputError(
            f"engine.tp_size={tp_size}, but this machine has {gpus} GPUs; engine=modal rents them, "
            "engine=transformers works without, and so does engine=vllm engine.num_servers=1 with "
            "a vLLM that was built for CPUs"
        )
    count = options.num_servers or most
    if count > most:
        raise InputError(
            f"engine.tp_size={tp_size} x engine.num_servers={count} are {tp_size * count} GPUs, "
            f"but this machine has {gpus}; with this tp_size at most engine.num_servers={most}"
        )
    return count


def make_servers(cfg: Config, folder: Path, draft: Speculation | None = None) -> list[Server]:
    """This machine's servers, not yet started, with their logs in `folder`.

    Raises:
        InputError: the GPUs do not suffice, or the server is not installed.
    """
    check_installed(cfg.engine)
    options = cfg.engine
    if marks_of(cfg.model):
        options = replace(options, args={**program(options).READING, **options.args})
    tp_size, gpus = tp_size_of(cfg), visible_gpus()
    servers = []
    for number in range(count_servers(cfg.engine, tp_size, len(gpus))):
        own = gpus[number * tp_size : (number + 1) * tp_size]
        port = cfg.engine.port + number
        command = server_command(options, cfg.model.path, tp_size, port, draft)
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}
        servers.append(Server(command, port, folder / f"server-{number}.log", environment))
    return servers


def marks_of(model: ModelConfig) -> list[str]:
    """See `turns.own_marks`; [] where there is no tokenizer to ask."""
    from specforge_exp.data.turns import own_marks
    from specforge_exp.target.files import load_tokenizer

    if files_of(model.path) is None:  # what is on a hub alone is not fetched for this
        return []
    try:
        tokenizer = load_tokenizer(model)
    except InputError:
        return []
    return own_marks(tokenizer, model.chat_template_kwargs)


def tp_size_of(cfg: Config) -> int:
    """engine.tp_size, or what the target's size asks for."""
    if cfg.engine.tp_size:
        return cfg.engine.tp_size
    if cfg.engine.command:
        return 1
    given = cfg.model.billions
    count = given * 1e9 if given else parameters(cfg.model.path)
    return next((gpus for most, gpus in SIZES if count <= most), LARGEST)


def parameters(path: str) -> int:
    """Parameters of a model, read off its configuration; raises InputError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = offline() if on_the_hub(path) else None
        raise InputError(
            f"model.path={path} does not say how large it is ({why or first_line(error)}); say it "
            "with model.billions=8, or set engine.tp_size"
        ) from None
    return int(model.num_parameters())
