"""Configuration files are read once: what is edited while a sweep runs changes none of its jobs.

Hydra reads them again whenever it composes one, which for a job that waits may be days later.
"""

import copy
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ResultDefault
from omegaconf import DictConfig


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
