"""The study plugin: what Hydra imports at every start, so it imports next to nothing."""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn

from hydra_sweeps.study.config import OptunaAsyncConf

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="optuna_async_schema",
    node=OptunaAsyncConf,
    provider="experiment_sweeper",
)


class OptunaAsyncSweeper(BasicSweeper):
    """Asks Optuna for the next job as soon as one ends."""

    def __init__(self, **settings: Any) -> None:
        self.options = OptunaAsyncConf(**settings)
        super().__init__(None, self.options.params)

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run the trials that the study lacks; returns those of this call, by number.

        Raises:
            CompactHydraException: options that do not fit, no trial that completed.
            SystemExit: 130 after Ctrl-C.
        """
        from hydra_sweeps.jobs import Source
        from hydra_sweeps.study.run import run_study

        assert self.config and self.hydra_context and self.launcher
        source = Source(self.config, self.hydra_context)
        return run_study(self.options, source, self.launcher, arguments)
