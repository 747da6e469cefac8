"""The app whose containers serve the target: deployed once for each version of what is in it."""

import json
import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modal

import specforge_exp
from modal_sweep.client.code import digest_of
from modal_sweep.client.image import digest
from modal_sweep.client.volumes import volume
from specforge_exp.artifacts import model_digest
from specforge_exp.config import Config
from specforge_exp.config.machine import command, prefetched
from specforge_exp.errors import InputError
from specforge_exp.generation.modal_worker import SERVER, Worker, read

log = logging.getLogger(__name__)

CODE = Path(specforge_exp.__file__).parent
MODEL = "/root/model"
"""Where a container has a target that is a folder of this machine."""
MOST_BYTES = 2e9
PYTHON = "RUN command -v python || ln -s $(command -v python3) /usr/local/bin/python"
"""Modal starts `python`, which vLLM's image has as python3 alone."""
NEEDED = ("omegaconf>=2.3", "aiohttp>=3.11", "orjson>=3.10")
"""What our code needs beside SGLang; what its image has already stays as it is."""
WHOLE = (
    "omegaconf", "aiohttp", "orjson", "torch", "transformers", "safetensors", "numpy",
    "huggingface_hub",
)  # fmt: skip
"""What it needs in an image without SGLang."""
CPU, MEMORY = 4.0, 32768
"""Cores, and MiB that are kept free, per GPU."""
ALONE = 4
"""Most containers for suspicious parts."""
OF_CLIENT = ("name", "urls", "num_servers", "usd_per_gpu_hour", "rate_limit", "port")
"""Options of the engine that do not reach the containers."""


def app_name(cfg: Config) -> str:
    """Holds the hash of everything the app consists of: its content never changes."""
    code = digest_of({path.relative_to(CODE).as_posix(): path for path in CODE.rglob("*.py")})
    model, *_ = model_digest(cfg.model.path).splitlines()  # of a hub id the cache is this machine's
    parts = [server_settings(cfg), code, packages(cfg), model]
    parts += [cfg.model.secrets, mounts(cfg), cfg.resources["env"]]
    return f"specforge-regen-{digest(parts)}"


def server_settings(cfg: Config) -> dict[str, Any]:
    """What a container is told about its server; engine.tp_size must be known."""
    options = {k: v for k, v in asdict(cfg.engine).items() if k not in OF_CLIENT}
    path = MODEL if shipped(cfg) else cfg.model.path
    return {
        "engine": {**options, "name": cfg.engine.server, "num_servers": 1},
        "model": {"name": cfg.model.name, "path": path},
    }


def shipped(cfg: Config) -> bool:
    """Whether the target is a folder of this machine, which goes into the containers."""
    path = Path(cfg.model.path)
    return path.is_dir() and not any(
        path.is_relative_to(mount) for mount in cfg.resources["volumes"]
    )


def mounts(cfg: Config) -> dict[str, str]:
    """The Volumes that a server reads its model from: mount path and name."""
    cache = cfg.resources["env"].get("HF_HOME", "")
    return {
        mount: name
        for mount, name in cfg.resources["volumes"].items()
        if mount == cache or Path(cfg.model.path).is_relative_to(mount)
    }


def packages(cfg: Config) -> list[str]:
    """What is installed; in an image of our own, the versions that are here."""
    if cfg.engine.image != "debian_slim":
        return list(NEEDED)
    return [f"{name}=={version(name).partition('+')[0]}" for name in WHOLE]


def image(cfg: Config) -> modal.Image:
    """The containers' image, with our code and, if it is no hub id, the target."""
    if cfg.engine.image == "debian_slim":
        base = modal.Image.debian_slim()
    else:
        base = modal.Image.from_registry(
            cfg.engine.image, setup_dockerfile_commands=[PYTHON]
        ).entrypoint([])
    installed = base.uv_pip_install(*packages(cfg))
    if shipped(cfg):
        folder = Path(cfg.model.path)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > MOST_BYTES:
            raise InputError(
                f"model.path={folder} has {size / 1e9:.0f} GB, too much for an upload with every "
                "version of the code; use a hub id, or put it on a Volume of resources.volumes"
            )
        installed = installed.add_local_dir(folder, MODEL)
    package = f"/root/{CODE.name}"
    return installed.add_local_dir(CODE, package, ignore=lambda path: path.suffix != ".py")


async def deployed(cfg: Config) -> str:
    """The app's name, once it is there; deploys it when it is not."""
    name = app_name(cfg)
    try:
        await modal.Cls.from_name(name, Worker.__name__).hydrate.aio()
        return name
    except modal.exception.NotFoundError:
        log.info("regen: deploying %s; an image that is new to Modal takes minutes", name)
    await warn_of_downloads(cfg)
    engine = cfg.engine
    tp_size = engine.tp_size or 1
    app = modal.App(name)
    secrets = [modal.Secret.from_name(n, required_keys=k) for n, k in cfg.model.secrets.items()]
    app.cls(
        image=image(cfg),
        gpu=f"{engine.gpu}:{tp_size}",
        cpu=CPU * tp_size,
        memory=MEMORY * tp_size,
        env={**cfg.resources["env"], SERVER: json.dumps(server_settings(cfg))},
        secrets=secrets,
        volumes={mount: volume(name) for mount, name in mounts(cfg).items()},
        timeout=86400,
        startup_timeout=int(engine.startup_timeout) + 300,
        scaledown_window=30,
        retries=modal.Retries(max_retries=2, initial_delay=1.0, backoff_coefficient=1.0),
        include_source=False,
    )(modal.concurrent(max_inputs=2)(Worker))
    await app.deploy.aio()
    return name


async def warn_of_downloads(cfg: Config) -> None:
    """Say so when every container will have to fetch the model by itself."""
    marker, home = prefetched(cfg.model.path), cfg.resources["env"].get("HF_HOME")
    name = mounts(cfg).get(home or "")
    if marker and name and await read(volume(name), marker) is None:
        log.warning(
            "regen: Volume %s has no whole %s, so every container downloads it, at the price of "
            "its GPUs; to do so once: %s hydra/launcher=modal",
            name, cfg.model.path, command("prefetch"),
        )  # fmt: skip


def pools(name: str, most: int | None) -> tuple[Any, Any]:
    """The app's containers: those for chunks, and those for one suspicious part at a time."""
    worker = modal.Cls.from_name(name, Worker.__name__)
    alone = worker.with_options(max_containers=min(most or ALONE, ALONE))
    pool = worker.with_options(max_containers=most) if most else worker
    return pool(), alone.with_concurrency(max_inputs=1)()
