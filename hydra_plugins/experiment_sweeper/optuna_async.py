"""The study plugin: what Hydra imports at every start, so it imports next to nothing."""

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_sweeps.study.config import OptunaAsyncConf

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="optuna_async_schema",
    node=OptunaAsyncConf,
    provider="experiment_sweeper",
)


class OptunaAsyncSweeper(Sweeper):
    """Asks Optuna for the next job as soon as one ends."""

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def __init__(self, **settings: Any) -> None:
        self.options = OptunaAsyncConf(**settings)

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
        from hydra_sweeps.jobs import Source
        from hydra_sweeps.study.run import run_study

        source = Source(self.config, self.hydra_context)
        return run_study(self.options, source, self.launcher, arguments)
