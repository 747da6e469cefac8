"""Launchers that break, leave and remember."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException

HERE = "hydra_plugins.odd_launchers.launchers"


class Breaking(BasicLauncher):
    """Breaks where a job raises, refuses where one dies, leaves where one waits."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """As every launcher."""
        words = [word for overrides in job_overrides for word in overrides]
        print("LAUNCH", initial_job_idx, len(job_overrides))
        if "kind=raises" in words:
            raise RuntimeError("a launcher that breaks")
        if "kind=dies" in words:
            raise CompactHydraException("a launcher that refuses")
        if "kind=waits" in words:
            raise SystemExit(0)
        return super().launch(job_overrides, initial_job_idx)


class Remembering(Breaking):
    """Has a session, as launchers that know their finished jobs."""

    def session(self) -> None:
        """Nothing that a grid asks for."""


@dataclass
class BreakingConf:
    """No options."""

    _target_: str = f"{HERE}.Breaking"


@dataclass
class RememberingConf:
    """No options."""

    _target_: str = f"{HERE}.Remembering"


for name, conf in (("breaking", BreakingConf), ("remembering", RememberingConf)):
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=conf)
