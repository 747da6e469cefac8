"""The study plugin: what Hydra imports at every start, so it imports next to nothing."""

from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_sweeps.study.config import OptunaAsyncConf, register, register_samplers

register()


class OptunaSamplers(SearchPathPlugin):
    """Registers the samplers when all plugins have been imported, hydra-optuna-sweeper too."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Leave the path alone; Hydra calls this after its scan and before it composes."""
        register_samplers()


class OptunaAsyncSweeper(Sweeper):
    """Asks Optuna for the next job as soon as one ends."""

    def __init__(self, **settings: Any) -> None:
        self.options = OptunaAsyncConf(**settings)
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Launcher | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra hands over and make the launcher."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run the trials that the study lacks; returns those of this call, by number.

        Raises:
            CompactHydraException: options that do not fit, no trial that completed.
            SystemExit: 130 after Ctrl-C.
        """
        from hydra_sweeps.study.run import search

        return search(self, arguments)
