"""A job before it runs: its configuration, its folder, what identifies it."""

import copy
import hashlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from hydra_sweeps.errors import SweepError
from hydra_sweeps.records import first_line


@dataclass(frozen=True)
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
    def text(self) -> str:
        """Its overrides, for messages."""
        return " ".join(self.overrides) or "no overrides"

    @property
    def subdir(self) -> str:
        """Where it writes, below hydra.sweep.dir."""
        return str(self.required("hydra.sweep.subdir"))

    @property
    def record(self) -> dict[str, Any]:
        """hydra.sweeper.record, resolved."""
        return self.value("hydra.sweeper.record") or {}

    def value(self, key: str) -> Any:
        """What a key of its configuration holds, resolved, with `${hydra:...}` meaning this job.

        None when there is no such key.

        Raises:
            SweepError: it cannot be resolved.
        """
        try:
            with job_config(self.config):
                node = OmegaConf.select(self.config, key)
                return (
                    OmegaConf.to_container(node, resolve=True)
                    if OmegaConf.is_config(node)
                    else node
                )
        except OmegaConfBaseException as error:
            text = f"{key} of run {self.number} ({self.text}): {first_line(error)}"
            raise SweepError(text) from None

    def required(self, key: str) -> Any:
        """The same; SweepError when there is no such key."""
        value = self.value(key)
        if value is None:
            raise SweepError(f"{key}, which hydra.sweeper names, is not in the configuration")
        return value

    def depends_on_number(self) -> bool:
        """Whether its folder is another one under another job number."""
        other = Job(self.number, self.overrides, copy.deepcopy(self.config))
        other.renumber(self.number + 1_000_003)
        return other.subdir != self.subdir

    def renumber(self, number: int) -> None:
        """Number it, as a launcher would."""
        self.number = number
        with read_write(self.config.hydra), open_dict(self.config.hydra):
            self.config.hydra.job.id = number
            self.config.hydra.job.num = number

    def digest(self, ignore: Sequence[str] = ()) -> str:
        """Hash of the configuration as written, without Hydra's node and the keys to ignore."""
        content: Any = OmegaConf.to_container(self.config, resolve=False)
        for key in ("hydra", *ignore):
            *above, last = key.split(".")
            node = content
            for part in above:
                node = node.get(part, {}) if isinstance(node, dict) else {}
            if isinstance(node, dict):
                node.pop(last, None)
        text = OmegaConf.to_yaml(OmegaConf.create(content), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def compose(source: Source, overrides: Sequence[str], number: int) -> Job:
    """A job's configuration, as Hydra's own launchers make it.

    Raises:
        SweepError: it cannot be composed.
    """
    loader = source.context.config_loader
    try:
        config = loader.load_sweep_config(source.master, list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = first_line(error.__cause__) if error.__cause__ else ""
        reason = f"{error} {cause}".strip()
        text = f"run {number} ({' '.join(overrides)}) cannot be composed: {reason}"
        raise SweepError(text) from None
    job = Job(number, list(overrides), config)
    job.renumber(number)
    return job


@contextmanager
def job_config(config: DictConfig) -> Iterator[None]:
    """`${hydra:...}` means this job."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def failure(overrides: Sequence[str], error: Exception) -> JobReturn:
    """The record of a job that has no configuration, or none that is known here."""
    return JobReturn(list(overrides), status=JobStatus.FAILED, _return_value=error)


def show_failure(returned: JobReturn) -> None:
    """Print why a job failed where its output is; Hydra's launchers do not."""
    error = returned._return_value
    if isinstance(error, CompactHydraException):
        print(error, file=sys.stderr, flush=True)
    elif isinstance(error, BaseException):
        traceback.print_exception(error)
