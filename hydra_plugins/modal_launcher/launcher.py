"""The launcher plugin: what Hydra imports at every start, so it imports next to nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.utils import JobReturn
from hydra.plugins.search_path_plugin import SearchPathPlugin

from modal_sweep.config import register

register()

if TYPE_CHECKING:
    from modal_sweep.client.session import Session


class ModalLauncherRegistration(SearchPathPlugin):
    """Registers the options once more when all plugins have been imported.

    hydra-modal-launcher registers hydra/launcher=modal too; which of the two Hydra imports last
    depends on the order of sys.path.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Leave the path alone; Hydra calls this after its scan and before it composes."""
        register()


class ModalLauncher(BasicLauncher):
    """Spawns the jobs of a multirun on Modal and brings their results back."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()  # the options are read where they are resolved, in `hydra.launcher`

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run every list of overrides as a job; returns in the same order.

        Raises:
            SystemExit: after a dry run (0), a detached submission (0) or Ctrl-C (130).
            CompactHydraException: for what the user can mend, before anything is spawned.
        """
        from modal_sweep.client.launch import launch

        assert self.config and self.hydra_context and self.task_function
        return launch(
            self.config, self.hydra_context, self.task_function, job_overrides, initial_job_idx
        )

    def session(self, total: int = 1) -> "Session":
        """Keep jobs in flight, for a sweeper that chooses the next ones by how others end.

        Args:
            total: how many jobs it is going to start, for the estimate of the cost.
        """
        from modal_sweep.client.session import Session

        assert self.config and self.hydra_context and self.task_function
        return Session(self.config, self.hydra_context, self.task_function, total)
