"""From composed configurations to jobs: payload, identity, function and options."""

import base64
import copy
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cloudpickle
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from modal_sweep.client import code as _code
from modal_sweep.client import image as _image
from modal_sweep.client import settings as _settings
from modal_sweep.config import JobSettings, ModalLauncherConf
from modal_sweep.protocol import delta


@dataclass
class Job:
    """One composed job."""

    number: int
    overrides: list[str]
    config: DictConfig
    settings: JobSettings
    output_dir: str
    image: dict[str, Any]
    code: _code.Shipment
    identity: str = ""

    @property
    def function(self) -> dict[str, Any]:
        """What needs a deployed function of its own: the rest is set per call."""
        gpus = _settings.gpu_list(self.settings.gpu)
        return {
            "image": self.image,
            "code": self.code.digest,
            "gpu": gpus if len(gpus) > 1 else None,
            "single_use": _settings.single_use(self.settings),
            "startup_timeout": self.settings.startup_timeout,
        }


def compose(
    master: DictConfig, context: HydraContext, job_overrides: Sequence[Sequence[str]], first: int
) -> list[DictConfig]:
    """The configuration of every job, as Hydra's own launchers compose it."""
    configs = []
    for number, overrides in enumerate(job_overrides, first):
        config = context.config_loader.load_sweep_config(master, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"job_id_for_{number}"
            config.hydra.job.num = number
            # Typed by a class of the sweeper's plugin, which a container need not have.
            config.hydra.sweeper = OmegaConf.to_container(config.hydra.sweeper)
        configs.append(config)
    return configs


Packed = tuple[dict[str, Any], _code.Shipment]
# What a container does not depend on, and `function`'s.
OWN = {
    "hours", "requires", "unique", "progress_file", "progress_keys", "checkpoints", "single_use",
}  # fmt: skip


def describe(
    configs: list[DictConfig],
    conf: ModalLauncherConf,
    root: Path | None,
    sweep_dir: Path,
    known: dict[str, Packed],
) -> list[Job]:
    """Settings, code and identity of every composed job.

    Args:
        known: images and the code in them, by what was asked for; new ones are added. What is
            known stays as it was, also when somebody edits the files.
    """
    jobs = []
    for config in configs:
        settings = _settings.job_settings(conf, config)
        wanted = json.dumps(asdict(settings.image), sort_keys=True)
        if wanted not in known:
            image = _image.image_spec(settings.image, root)
            known[wanted] = image, _code.shipment(root, settings.image.sources, sweep_dir)
        job = Job(
            number=config.hydra.job.num,
            overrides=list(filter_overrides(config.hydra.overrides.task)),
            config=config,
            settings=settings,
            output_dir=fix_output_dir(config),
            image=known[wanted][0],
            code=known[wanted][1],
        )
        job.identity = identity(job, conf.resources)
        jobs.append(job)
    return jobs


def fix_output_dir(config: DictConfig) -> str:
    """Resolve where a job writes, here, so that it is the same place in the container."""
    if "${hydra:" in str(OmegaConf.to_container(config.hydra.sweep, resolve=False)):
        HydraConfig.instance().set_config(config)
    folder, subdir = str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)
    with read_write(config.hydra.sweep):
        config.hydra.sweep.dir, config.hydra.sweep.subdir = folder, subdir
    return os.path.abspath(os.path.join(folder, subdir))


def identity(job: Job, resources: str) -> str:
    """Hash of code, image, configuration and output directory; what a job runs on is not part."""
    content = {
        str(key): OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        for key, node in job.config.items_ex(resolve=False)
        if key not in ("hydra", resources)
    }
    said = [job.code.digest, job.image, content, job.config.hydra.job.name, job.output_dir]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:20]


def pickled(config: DictConfig) -> bytes:
    """A job's configuration with its types."""
    data: bytes = cloudpickle.dumps(config)
    return data


def plan_event(
    job: Job, conf: ModalLauncherConf, sweep: dict[str, Any], alike: bytes
) -> dict[str, Any]:
    """The journal's line for a job: enough to spawn it from any process."""
    packed = delta.pack(pickled(job.config), alike)
    settings = job.settings
    return {
        "event": "plan",
        "identity": job.identity,
        "job": job.number,
        "overrides": job.overrides,
        "code": job.code.digest,
        "task": str(job.config.hydra.job.name),
        "app": sweep["app"],
        "function": function_name(job.function),
        "options": call_options(settings, conf, sweep),
        "subdir": os.path.relpath(job.output_dir, str(job.config.hydra.sweep.dir)),
        "unique": list(settings.unique),
        "hours": settings.hours,
        "ref": {
            "sweep": sweep["id"],
            "identity": job.identity,
            "dict": sweep["dict"],
            "volume": sweep["volume"],
            "common": sweep["common"],
            "sha256": hashlib.sha256(packed).hexdigest(),
            "cwd": os.getcwd(),
            "output_dir": job.output_dir,
            "mounts": dict(settings.volumes),
            "timeout": settings.timeout,
            "progress_file": settings.progress_file,
            "progress_keys": list(settings.progress_keys),
            "checkpoints": settings.checkpoints,
            "sync_cwd": conf.sync_cwd,
            "single_use": _settings.single_use(settings),
            "versions": _image.versions(),
        },
        "payload": base64.b64encode(packed).decode(),
    }


def call_options(
    settings: JobSettings, conf: ModalLauncherConf, sweep: dict[str, Any]
) -> dict[str, Any]:
    """What `Function.with_options` gets, as plain values."""
    gpus = _settings.gpu_list(settings.gpu)
    return {
        "gpu": gpus[0] if len(gpus) == 1 else None,
        "gpus": gpus,
        "cpu": settings.cpu,
        "memory": settings.memory,
        "timeout": settings.timeout,
        "retries": settings.retries,
        "region": settings.region,
        "cloud": settings.cloud,
        "volumes": dict(settings.volumes),
        "secrets": copy.deepcopy(settings.secrets),
        "env": dict(settings.env),
        "max_containers": sweep["max_containers"].get(job_kind(settings)),
    }


def job_kind(settings: JobSettings) -> str:
    """Jobs of one kind share containers, and the limit on them."""
    said = asdict(settings)
    return _image.digest({name: said[name] for name in said if name not in OWN})


def function_name(function: dict[str, Any]) -> str:
    """Name of the deployed function for an image, GPU list, reuse and start-up timeout."""
    return f"job-{_image.digest(function)}"
