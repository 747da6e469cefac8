"""A job before it runs: its configuration, its folder, what identifies it."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from hydra_sweeps.errors import SweepError
from hydra_sweeps.processes import job_config


@dataclass
class Source:
    """What jobs are composed of."""

    master: DictConfig
    context: HydraContext


@dataclass
class Job:
    """One composed job."""

    number: int
    overrides: list[str]
    config: DictConfig

    @property
    def said(self) -> str:
        """Its overrides, for messages."""
        return " ".join(self.overrides) or "no overrides"


def compose(source: Source, overrides: Sequence[str], number: int) -> Job:
    """A job's configuration, as Hydra's own launchers make it.

    Raises:
        SweepError: it cannot be composed.
    """
    loader = source.context.config_loader
    try:
        config = loader.load_sweep_config(source.master, list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        said = " ".join(overrides)
        raise SweepError(f"run {number} ({said}) cannot be composed: {error}") from None
    job = Job(number, list(overrides), config)
    set_number(job, number)
    return job


def set_number(job: Job, number: int) -> None:
    """Number a job, as a launcher would."""
    job.number = number
    with read_write(job.config.hydra), open_dict(job.config.hydra):
        job.config.hydra.job.id = number
        job.config.hydra.job.num = number


def resolved(job: Job, what: str, get: Callable[[DictConfig], Any]) -> Any:
    """Something in a job's configuration, with `${hydra:...}` meaning this job.

    Raises:
        SweepError: it cannot be resolved; names `what`.
    """
    try:
        with job_config(job.config):
            return get(job.config)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise SweepError(f"{what} of run {job.number} ({job.said}): {reason}") from None


def subdir(job: Job) -> str:
    """Where it writes, below hydra.sweep.dir."""
    return str(resolved(job, "hydra.sweep.subdir", lambda config: config.hydra.sweep.subdir))


def depends_on_number(job: Job) -> bool:
    """Whether its folder is another one under another job number."""
    other = Job(job.number, job.overrides, copy.deepcopy(job.config))
    set_number(other, job.number + 1_000_003)
    return subdir(other) != subdir(job)


def value(job: Job, key: str) -> Any:
    """The value of a key of the job's configuration; SweepError when there is none."""
    found = resolved(job, key, lambda config: OmegaConf.select(config, key))
    if found is None:
        raise SweepError(f"{key}, which hydra.sweeper names, is not in the configuration")
    return found


def record(job: Job) -> dict[str, Any]:
    """hydra.sweeper.record, resolved."""

    def get(config: DictConfig) -> Any:
        node = OmegaConf.select(config, "hydra.sweeper.record")
        return {} if node is None else OmegaConf.to_container(node, resolve=True)

    found: dict[str, Any] = resolved(job, "hydra.sweeper.record", get)
    return found


def evidence(job: Job) -> Path | None:
    """hydra.sweeper.exists, resolved."""
    path = resolved(
        job, "hydra.sweeper.exists", lambda config: OmegaConf.select(config, "hydra.sweeper.exists")
    )
    return Path(str(path)) if path else None


def digest(job: Job, ignore: Sequence[str]) -> str:
    """Hash of the configuration as written, without Hydra's node and the keys to ignore."""
    content = OmegaConf.to_container(job.config, resolve=False)
    assert isinstance(content, dict)
    del content["hydra"]
    for key in ignore:
        *above, last = key.split(".")
        node: Any = content
        for part in above:
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.pop(last, None)
    text = OmegaConf.to_yaml(OmegaConf.create(content), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
