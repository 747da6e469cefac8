"""Plan: from overrides to composed jobs with payload, identity, function and options."""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, filter_overrides, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from modal_sweep.client.code import Shipment, project_root, shipment
from modal_sweep.client.environ import environ
from modal_sweep.client.image import digest, image_spec
from modal_sweep.client.settings import gpu_list, job_settings, launcher_conf, single_use
from modal_sweep.config import JobSettings, ModalLauncherConf
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.names import versions
from modal_sweep.protocol.payload import pack_config


@dataclass(frozen=True)
class Sweep:
    """What Hydra hands over, with the options read and the sweep's folder made."""

    config: DictConfig
    context: HydraContext
    task: TaskFunction
    conf: ModalLauncherConf
    folder: Path
    builds: dict[str, tuple[dict[str, Any], Shipment]] = field(default_factory=dict)
    """Image and code by the settings of the image. They stay as they were, also when files are
    edited."""


@dataclass
class Job:
    """One composed job."""

    number: int
    overrides: list[str]
    config: DictConfig
    settings: JobSettings
    output_dir: str
    image: dict[str, Any]
    code: Shipment
    environ: dict[str, str | None]
    """The variables that its configuration reads."""
    identity: str = ""

    @property
    def label(self) -> str:
        """What the user knows it by."""
        return f"job {self.number} [{' '.join(self.overrides)}]"

    @property
    def function(self) -> dict[str, Any]:
        """What needs a deployed function of its own: the rest is set per call."""
        gpus = gpu_list(self.settings.gpu)
        return {
            "image": self.image,
            "code": self.code.digest,
            "gpu": gpus if len(gpus) > 1 else None,
            "single_use": single_use(self.settings),
            "startup_timeout": self.settings.startup_timeout,
        }

    @property
    def function_name(self) -> str:
        """Name of that function."""
        return f"job-{digest(self.function)}"


# What a container does not depend on, and `function`'s.
OWN = set(
    "hours requires unique progress_file progress_keys outputs checkpoints single_use "
    "without".split()
)


def open_sweep(config: DictConfig, context: HydraContext, task: TaskFunction) -> Sweep:
    """Take over what Hydra has set up."""
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    folder = Path(str(config.hydra.sweep.dir))
    return Sweep(config, context, task, launcher_conf(config), folder)


def refuse_search(sweep: Sweep) -> None:
    """A sweeper that needs every job's value cannot go on without the values."""
    for name in ("dry_run", "detach"):
        if getattr(sweep.conf, name):
            sweeper = str(sweep.config.hydra.sweeper._target_).rpartition(".")[2]
            raise LaunchError(
                f"hydra.launcher.{name}=true and {sweeper} do not go together: "
                "it chooses the next jobs by the results of the last ones; "
                "leave one of them out (hydra/sweeper=basic for a dry run)"
            )


def plan_jobs(sweep: Sweep, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
    """Settings, code and identity of the jobs of these overrides, numbered from `first`."""
    root = project_root(sweep.task)
    # All are composed before the first is resolved: that may set Hydra's own configuration.
    ours: Any = OmegaConf.to_container(sweep.config.hydra.launcher)
    configs = [compose(sweep, ours, *job) for job in enumerate(job_overrides, first)]
    jobs = []
    for config in configs:
        settings = job_settings(sweep.conf, config)
        key = json.dumps(asdict(settings.image), sort_keys=True)
        if key not in sweep.builds:
            files = shipment(root, settings.image.sources, sweep.folder)
            sweep.builds[key] = image_spec(settings.image, root), files
        image, code = sweep.builds[key]
        job = Job(
            number=config.hydra.job.num,
            environ=environ(config, settings, sweep.conf.resources),  # before it is resolved
            overrides=list(filter_overrides(config.hydra.overrides.task)),
            config=config,
            settings=settings,
            output_dir=fix_output_dir(config),
            image=image,
            code=code,
        )
        job.identity = identity(job, sweep.conf.resources)
        jobs.append(job)
    return jobs


def compose(
    sweep: Sweep, ours: dict[str, Any], number: int, overrides: Sequence[str]
) -> DictConfig:
    """The configuration of a job, as Hydra's own launchers compose it.

    Args:
        ours: the launcher's options of this command, which no job may change.
    """
    config = sweep.context.config_loader.load_sweep_config(sweep.config, list(overrides))
    if ours != OmegaConf.to_container(config.hydra.launcher):
        raise LaunchError(
            f"job {number} [{' '.join(overrides)}] chooses another hydra.launcher than this "
            "command, which has one for all jobs; launch what differs by commands of their own"
        )
    with open_dict(config):
        config.hydra.job.id = f"job_id_for_{number}"
        config.hydra.job.num = number
        # Typed by a class of the sweeper's plugin, which a container need not have.
        config.hydra.sweeper = OmegaConf.to_container(config.hydra.sweeper)
    return config


def fix_output_dir(config: DictConfig) -> str:
    """Resolve where a job writes, here, so that it is the same place in the container."""
    if "${hydra:" in str(OmegaConf.to_container(config.hydra.sweep, resolve=False)):
        HydraConfig.instance().set_config(config)
    folder, subdir = str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)
    with read_write(config.hydra.sweep):
        config.hydra.sweep.dir, config.hydra.sweep.subdir = folder, subdir
    return os.path.abspath(os.path.join(folder, subdir))


def identity(job: Job, resources: str) -> str:
    """Hash of code, image, configuration with the variables that it reads, and output directory.

    What a job runs on is not part.
    """
    content = {
        str(key): OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        for key, node in job.config.items_ex(resolve=False)
        if key not in ("hydra", resources)
    }
    parts = [job.code.digest, job.image, content, job.config.hydra.job.name, job.output_dir]
    text = json.dumps(parts, sort_keys=True, default=str)
    if read := {name: value for name, value in job.environ.items() if name in text}:
        text += json.dumps(read, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def plan_event(job: Job, conf: ModalLauncherConf, sweep: dict[str, Any]) -> dict[str, Any]:
    """The journal's line for a job: enough to spawn it from any process."""
    packed = pack_config(job.config)
    settings = job.settings
    return {
        "event": "plan",
        "identity": job.identity,
        "job": job.number,
        "overrides": job.overrides,
        "code": job.code.digest,
        "task": str(job.config.hydra.job.name),
        "app": sweep["app"],
        "function": job.function_name,
        "options": call_options(settings, sweep),
        "subdir": os.path.relpath(job.output_dir, str(job.config.hydra.sweep.dir)),
        "unique": settings.unique,
        "ref": {
            "sweep": sweep["id"],
            "identity": job.identity,
            **{name: sweep[name] for name in ("dict", "volume", "common")},
            "sha256": hashlib.sha256(packed).hexdigest(),
            "cwd": os.getcwd(),
            "output_dir": job.output_dir,
            "mounts": settings.volumes,
            **chosen(settings, "timeout progress_file progress_keys outputs checkpoints"),
            "sync_cwd": conf.sync_cwd,
            "single_use": single_use(settings),
            "versions": versions(),
            "environ": job.environ,
        },
        "payload": base64.b64encode(packed).decode(),
    }


def call_options(settings: JobSettings, sweep: dict[str, Any]) -> dict[str, Any]:
    """What `Function.with_options` gets, as plain values."""
    gpus = gpu_list(settings.gpu)
    return {
        "gpu": gpus[0] if len(gpus) == 1 else None,
        "gpus": gpus,
        **chosen(settings, "cpu memory timeout retries region cloud volumes secrets env"),
        "max_containers": sweep["max_containers"].get(job_kind(settings)),
    }


def chosen(settings: JobSettings, names: str) -> dict[str, Any]:
    """Some of a job's settings."""
    return {name: getattr(settings, name) for name in names.split()}


def job_kind(settings: JobSettings) -> str:
    """Jobs of one kind share containers, and the limit on them."""
    return digest({name: value for name, value in asdict(settings).items() if name not in OWN})
