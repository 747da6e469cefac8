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

PROVIDER = "experiment_sweeper"

ConfigStore.instance().store(
    group="hydra/sweeper", name="experiment_schema", node=ExperimentSweeperConf, provider=PROVIDER
)


class SweeperFiles(SearchPathPlugin):
    """Offers both sweepers, pruners and samplers to every app."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add folders behind the app's own; Hydra calls this when it has imported all plugins.

        Samplers only where nobody has stored some: hydra-optuna-sweeper has the same names, its
        schema refuses files with other keys, and ours runs with its samplers too.
        """
        samplers = ConfigStore.instance().repo["hydra"]["sweeper"].get("sampler", {})
        for name in ["_conf"] if "tpe.yaml" in samplers else ["_conf", "_samplers"]:
            search_path.append(PROVIDER, f"file://{Path(__file__).parent / name}")


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

        assert self.config and self.hydra_context and self.launcher
        source = Source(self.config, self.hydra_context)
        return run_grid(self.options, source, self.launcher, arguments)
