"""What is edited while a sweep runs changes none of its jobs.

Hydra reads the configuration files again whenever it composes a job, which for one that waits may
be days later: here they are read once. Inputs are looked at before a job starts.
"""

import copy
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ResultDefault
from omegaconf import DictConfig

from hydra_sweeps.errors import SweepError
from hydra_sweeps.jobs import Job
from hydra_sweeps.records import digests

Inputs = dict[Path, list[str]]
"""Digests of the files that jobs read, by what hydra.sweeper.inputs names."""


class FirstRead(ConfigRepository):
    """Files of the search path as they were when each was asked for first."""

    def __init__(self, files: ConfigRepository, read: dict[Any, Any]) -> None:
        self.sources, self.read = files.sources, read

    def __deepcopy__(self, memo: dict[int, Any]) -> "FirstRead":
        return FirstRead(self, self.read)  # with another search path it gets a list of its own

    def once(self, name: str, path: str) -> Any:
        """What a method of ConfigRepository said of a path when it was called first."""
        key = (name, path, *(source.path for source in self.sources))
        if key not in self.read:
            self.read[key] = getattr(super(), name)(path)
        return self.read[key]

    def load_config(self, config_path: str) -> Any:
        """What a file holds, None where there is none."""
        return self.once("load_config", config_path)

    def group_exists(self, config_path: str) -> bool:
        """Whether the search path has a folder of that name."""
        return bool(self.once("group_exists", config_path))

    def config_exists(self, config_path: str) -> bool:
        """Whether it has a file of that name."""
        return bool(self.once("config_exists", config_path))


def read_once(loader: ConfigLoader, read: dict[Any, Any] | None = None) -> None:
    """Let a loader remember files, and what it has made of them before a job's values are set.

    Args:
        loader: Hydra's; one that is no `ConfigLoaderImpl` stays as it is.
        read: what is known already, of other loaders.
    """
    if not isinstance(loader, ConfigLoaderImpl):
        return
    read = {} if read is None else read
    compose = loader._compose_config_from_defaults_list

    def composed(defaults: list[ResultDefault], repo: CachingConfigRepository) -> DictConfig:
        key = (repr(defaults), *(source.path for source in repo.get_sources()))
        if key not in read:
            read[key] = compose(defaults, copy.deepcopy(repo))  # which merges into what it read
        config: DictConfig = copy.deepcopy(read[key])
        return config

    loader.repository = FirstRead(loader.repository, read)
    vars(loader)[compose.__name__] = composed


def inputs_of(jobs: Iterable[Job]) -> Inputs:
    """What lies there now; of a job whose inputs cannot be told that is said when it starts."""
    inputs: Inputs = {}
    for job in jobs:
        with suppress(SweepError):
            inputs |= {path: [*digests(path)] for path in job.inputs}
    return inputs


def changed(inputs: Inputs) -> str:
    """Says which of them is another one by now; empty: none."""
    names = ", ".join(str(path) for path, before in inputs.items() if [*digests(path)] != before)
    return names and (
        f"{names} has changed since the sweep began: what starts now would be no comparison for "
        "what was started before; put it back, or begin again with the same command"
    )
