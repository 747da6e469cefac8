"""The sweeper plugin: what Hydra imports at every start, so it imports next to nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.search_path_plugin import SearchPathPlugin

from hydra_sweeps.grid.config import ExperimentSweeperConf

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="experiment_schema",
    node=ExperimentSweeperConf,
    provider="experiment_sweeper",
)


class ExperimentSweeperOptions(SearchPathPlugin):
    """Offers hydra/sweeper=experiment to every app."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add a folder behind the app's own."""
        folder = Path(__file__).parent / "_conf"
        search_path.append(provider="experiment_sweeper", path=f"file://{folder}")


class ExperimentSweeper(BasicSweeper):
    """Runs a grid, goes on past failures, continues where it was, ends with a table."""

    def __init__(self, **settings: Any) -> None:
        self.options = ExperimentSweeperConf(**settings)
        super().__init__(self.options.max_batch_size, self.options.params)

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Run every job that is not done; returns what was launched, batch by batch.

        Raises:
            CompactHydraException: nothing to run, options that do not fit, failed runs.
            SystemExit: 130 after Ctrl-C.
        """
        from hydra_sweeps.grid.run import run_grid
        from hydra_sweeps.jobs import Source

        assert self.config is not None and self.hydra_context is not None
        assert self.launcher is not None
        source = Source(self.config, self.hydra_context)
        return run_grid(self.options, source, self.launcher, arguments)
