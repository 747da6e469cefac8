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
from hydra._internal.config_repository import ConfigRepository
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


class ReadOnce(ConfigLoaderImpl):
    """A loader that remembers files, and what Hydra merged of them before a job's values are set.

    Sent elsewhere it is the one that it was made of: a container has no sweeper.
    """

    def __init__(self, loader: ConfigLoaderImpl, read: dict[Any, Any]) -> None:
        self.loader, self.read = loader, read
        self.config_search_path = loader.config_search_path
        self.repository = FirstRead(loader.repository, read)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (ConfigLoaderImpl,), vars(self.loader)

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: Any
    ) -> DictConfig:
        key = (repr(defaults), *(source.path for source in repo.get_sources()))
        if key not in self.read:  # Hydra merges into what it read
            merged = super()._compose_config_from_defaults_list(defaults, copy.deepcopy(repo))
            self.read[key] = merged
        config: DictConfig = copy.deepcopy(self.read[key])
        return config


def read_once(loader: ConfigLoader, read: dict[Any, Any] | None = None) -> ConfigLoader:
    """A loader for a whole sweep; one that is not Hydra's own stays as it is.

    Args:
        loader: that of the command.
        read: what is known already, of other loaders.
    """
    if not isinstance(loader, ConfigLoaderImpl):
        return loader
    return ReadOnce(loader, {} if read is None else read)


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
