"""What hydra/sweeper=optuna_async has beside the options of both sweepers.

Its samplers and pruners are files of the plugin. The options of hydra-optuna-sweeper 1.3.0 are
among them: the same file serves both.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from hydra_sweeps.config import SweepConf
from hydra_sweeps.errors import SweepError


@dataclass
class OptunaAsyncConf(SweepConf):
    """A study that keeps jobs in flight and continues where it was."""

    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "none"}])
    _target_: str = "hydra_plugins.experiment_sweeper.optuna_async.OptunaAsyncSweeper"
    _recursive_: bool = False

    sampler: Any = MISSING
    """A node with a _target_; hydra/sweeper/sampler= tpe, random, cmaes, nsgaii or grid."""
    direction: Any = "minimize"
    storage: Any = None
    """URL or a node with a _target_; null: study.db (SQLite) in hydra.sweep.dir. Only this process
    writes to it."""
    study_name: str | None = None
    """null: made of hydra.sweep.dir."""
    n_trials: int = 20
    """How many trials the study has in the end: completed, pruned and failed ones."""
    n_jobs: int = 2
    """Jobs in flight."""
    max_failure_rate: float = 1.0
    """The study ends when more than this share of n_trials has failed."""
    search_space: Any = None
    """Refused: `params` says the same in one line a key."""
    custom_search_space: str | None = None
    """Dotted path of a function (cfg, trial) that may suggest more."""

    pruner: Any = MISSING
    """A node with a _target_; hydra/sweeper/pruner= none, median, hyperband, successive_halving."""
    progress_file: str | None = None
    """JSON lines that a job appends to while it runs, named in its configuration."""
    progress_metric: str | None = None
    """Key of a line: the value that pruning compares."""
    progress_step: str = "step"
    """Key of a line: an integer that grows."""
    conditional: dict[str, Any] = field(default_factory=dict)
    """Keys that are searched only where an earlier one has some value, e.g.
    {"loss=full-opd,mixed": {loss.lambda_rkl: "interval(0.1,1.0)"}}."""
    warm_start: list[str] = field(default_factory=list)
    """Points that a new study tries first, e.g. ["loss=full-opd lr=5e-5"]; what a point leaves out
    is sampled."""
    search_group: str | None = None
    """The config group that chooses a search; with -m a run's own command leaves it out."""
    alike: bool = True
    """Refuse to go on with a study whose trials this command would have made with other options,
    beside what is searched; false: what differs changes no number."""

    @property
    def sampler_class(self) -> str:
        """The last part of the sampler's _target_."""
        return class_name(self.sampler)

    @property
    def pruner_class(self) -> str:
        """The same of the pruner."""
        return class_name(self.pruner)

    @property
    def prunes(self) -> bool:
        """Whether there is a pruner."""
        return self.pruner_class not in ("none", "NopPruner")

    @property
    def is_grid(self) -> bool:
        """Whether all points are tried in order."""
        return self.sampler_class == "GridSampler"

    @property
    def measured(self) -> dict[str, Any]:
        """What a job returns, and reports while it runs."""
        return {
            "names": list(self.names),
            "progress_metric": self.progress_metric,
            "progress_step": self.progress_step,
        }

    @property
    def left_out(self) -> list[str]:
        """Keys of a job's configuration that do not make it another point: its name, too."""
        return [*self.ignore, *filter(None, [self.name_key])]

    def check(self) -> None:
        """Refuse options that do not fit; names them."""
        self.check_counts("n_jobs", "n_trials")
        if self.repeats > 1:
            raise SweepError(
                f"hydra.sweeper.repeats={self.repeats} is for hydra/sweeper=experiment: a study "
                "measures every point once; leave out what sets it, and repeat the best point in a "
                "grid"
            )
        if not 0 <= self.max_failure_rate <= 1:
            raise SweepError(f"hydra.sweeper.max_failure_rate={self.max_failure_rate}: from 0 to 1")
        if self.search_space:
            raise SweepError(
                "hydra.sweeper.search_space is an old form; write it as hydra.sweeper.params, a "
                "line a key: 'lr: tag(log, interval(1e-5, 1e-3))', 'loss: choice(baseline, "
                "mixed)', 'layers: range(1, 5)'"
            )
        if self.is_grid and (unknown := {*self.sampler} - {"_target_", "_partial_"}):
            raise SweepError(
                f"hydra.sweeper.sampler.{min(unknown)} is no option of a grid, which tries what is "
                "listed, in that order; leave it out, or give hydra/sweeper/sampler=grid"
            )
        count = len(self.directions)
        if count > 1 and not self.listed:  # one word rarely suits all that a study searches by
            raise SweepError(
                f"hydra.sweeper.direction={self.direction}, and hydra.sweeper.names={self.names}: "
                "a study needs a list with a direction for each of them"
            )
        if not count:
            raise SweepError("hydra.sweeper.names=[]: a study needs a value to search by")
        if self.prunes and count > 1:
            raise SweepError(
                f"hydra/sweeper/pruner={self.pruner_class} and hydra.sweeper.direction with "
                f"{count} objectives do not go together: Optuna cannot prune by several; "
                "give hydra/sweeper/pruner=none, or one direction"
            )
        if self.prunes and not (self.progress_file and self.progress_metric):
            raise SweepError(
                f"hydra/sweeper/pruner={self.pruner_class} needs hydra.sweeper.progress_file and "
                "hydra.sweeper.progress_metric: what it compares while jobs run"
            )


def class_name(node: Any) -> str:
    """The last part of a node's _target_."""
    return str(node["_target_"]).rpartition(".")[2] if node else "none"
