"""A job's settings: what the launcher says, overlaid with the job's own `resources` node."""

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pkgutil import resolve_name
from typing import Any

from hydra.core.utils import filter_overrides
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modal_sweep.config import ImageSettings, JobSettings, ModalLauncherConf
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.records import first_line

GPU = re.compile(r"(?P<type>[A-Za-z0-9-]+)(?P<exact>!|\+)?(?::(?P<count>[1-9][0-9]*))?")
MOST_SECONDS = 86400
OF_JOBS = [field.name for field in fields(JobSettings)]
OF_IMAGES = [field.name for field in fields(ImageSettings)]


def launcher_conf(config: DictConfig) -> ModalLauncherConf:
    """The launcher's own node; raises LaunchError for a value that is not valid.

    What `JobSettings` has is left unresolved: `${name}` means something else in every job.
    """
    node = config.hydra.launcher
    raw: Any = OmegaConf.to_container(node, resolve=False)
    values = {key: raw[key] if key in OF_JOBS else plain(node[key]) for key in raw}
    values["image"] = ImageSettings(**values["image"])
    conf = ModalLauncherConf(**values)
    if conf.if_done not in ("skip", "rerun", "fail"):
        raise LaunchError(
            f"hydra.launcher.if_done={conf.if_done} is not valid; choose one of: skip, rerun, fail"
        )
    if conf.max_parallel is not None and conf.max_parallel < 1:
        raise LaunchError(f"hydra.launcher.max_parallel={conf.max_parallel} must be at least 1")
    return conf


def volume_name(conf: ModalLauncherConf) -> str:
    """The Volume for outputs and results."""
    return conf.volume or f"{conf.app}-sweeps"


def plain(value: Any) -> Any:
    """A resolved value without OmegaConf's wrapping."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def resolved(node: Any, where: str) -> Any:
    """What a node holds; raises LaunchError that names it."""
    try:
        return OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise LaunchError(f"{where}: {first_line(error)}") from None


def job_settings(conf: ModalLauncherConf, job: DictConfig) -> JobSettings:
    """Settings of one composed job; raises LaunchError that names the key."""
    own = own_settings(conf, job)
    refuse_unknown(own, OF_JOBS, conf.resources, "a job")
    values = {name: getattr(conf, name) for name in OF_JOBS} | {"image": asdict(conf.image)}
    if "${" in str(values):  # means this job
        node = OmegaConf.create(values)
        node._set_parent(job)
        values = resolved(node, "hydra.launcher")
    defaults = asdict(JobSettings())
    for name, value in own.items():
        if values[name] != defaults[name]:
            raise LaunchError(
                f"hydra.launcher.{name} has no effect: the job says "
                f"{conf.resources}.{name}={value}; set that one"
            )
        values[name] = value
    refuse_unknown(values["image"], OF_IMAGES, f"{conf.resources}.image", "an image")
    return typed(pickle.dumps(values), conf.resources)


@lru_cache(maxsize=64)  # hundreds of jobs have the same, and OmegaConf takes milliseconds
def typed(values: bytes, where: str) -> JobSettings:
    """Pickled values as settings that may be used and are not written to; LaunchError as above."""
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(JobSettings, pickle.loads(values)))
    except OmegaConfBaseException as error:
        raise LaunchError(f"{where}.{error.full_key}: {first_line(error)}") from None
    assert isinstance(settings, JobSettings)
    check(settings, where)
    return settings


def own_settings(conf: ModalLauncherConf, job: DictConfig) -> dict[str, Any]:
    """What the job's node says, with the part for this script laid over it."""
    node = OmegaConf.select(job, conf.resources)
    if node is None:
        return {}
    settings = resolved(node, conf.resources)
    if not isinstance(settings, dict):
        raise LaunchError(f"{conf.resources}={settings!r} must be a mapping of a job's settings")
    tasks = settings.pop("tasks", None) or {}
    made = made_by(settings.get("machine"), job)
    own = {**settings, **made, **(tasks.get(job.hydra.job.name) or {})}
    return {str(key): value for key, value in own.items()}


def made_by(dotted: str | None, job: DictConfig) -> dict[str, Any]:
    """What the application's function says of one job; {} without one."""
    if dotted is None:
        return {}
    machine = imported("machine", dotted)
    try:
        return dict(machine(job.hydra.job.name, without_hydra(job)))
    except Exception as error:
        overrides = " ".join(filter_overrides(job.hydra.overrides.task))
        raise LaunchError(f"job {job.hydra.job.num} [{overrides}]: {error}") from None


def without_hydra(job: DictConfig) -> DictConfig:
    """A job's configuration as its task gets it."""
    keys = [key for key in job if key != "hydra"]
    return OmegaConf.masked_copy(job, keys)  # type: ignore[arg-type]


def imported(option: str, dotted: str) -> Any:
    """The function that an option names."""
    try:
        return resolve_name(dotted)
    except (ImportError, AttributeError, ValueError):
        raise LaunchError(f"{option}={dotted} does not name an importable function") from None


def refuse_unknown(values: Iterable[str], names: list[str], where: str, owner: str) -> None:
    """Name the first key that is no setting."""
    for name in sorted(set(values) - set(names)):
        raise LaunchError(f"{where}.{name} is not a setting of {owner}; valid: {', '.join(names)}")


def check(settings: JobSettings, where: str) -> None:
    """Refuse what Modal would refuse, before anything is spawned."""
    for gpu in gpu_list(settings.gpu):
        type_and_count(gpu, where)
    for name in ("timeout", "startup_timeout"):
        if not 1 <= (seconds := getattr(settings, name)) <= MOST_SECONDS:
            raise LaunchError(
                f"{where}.{name}={seconds} must be in 1..{MOST_SECONDS} seconds; a job "
                "that takes longer continues in a new attempt"
            )
    if not 0 <= settings.retries <= 10:
        raise LaunchError(f"{where}.retries={settings.retries} must be in 0..10")
    for mount in settings.volumes:
        if not mount.startswith("/") or mount.rstrip("/") in ("", "/root", "/tmp"):
            raise LaunchError(
                f"{where}.volumes: {mount} cannot hold a Volume; use an absolute path below / "
                "other than /root and /tmp themselves"
            )
    entries = list(settings.requires)
    for entry in entries:  # and what that needs in turn
        if not isinstance(entry, Mapping) or not {"volume", "path"} <= set(entry):
            raise LaunchError(
                f"{where}.requires: {entry} must have volume and path (and may have remedy, local, "
                "record, requires)"
            )
        entries += entry.get("requires") or []


def gpu_list(gpu: Any) -> list[str]:
    """The acceptable GPUs in order; empty for none."""
    if gpu is None or gpu == "":
        return []
    return [str(name) for name in gpu] if isinstance(gpu, list | tuple) else [str(gpu)]


def type_and_count(gpu: str, where: str = "resources") -> tuple[str, int]:
    """`H100!:8` -> ("H100", 8); raises LaunchError for what Modal does not take."""
    match = GPU.fullmatch(gpu)
    if match is None or int(match["count"] or 1) > 8:
        raise LaunchError(
            f"{where}.gpu={gpu} is not valid; write H100, H100:8 (at most 8), H100! or a list"
        )
    return match["type"].upper(), int(match["count"] or 1)


def single_use(settings: JobSettings) -> bool:
    """Whether every job gets a container of its own."""
    return bool(settings.gpu) if settings.single_use is None else settings.single_use
