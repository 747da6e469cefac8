"""Every option of hydra/sweeper=optuna_async; its samplers and pruners are files of the plugin.

The first block of options is that of hydra-optuna-sweeper 1.3.0: the same file serves both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from hydra_sweeps.errors import SweepError


@dataclass
class OptunaAsyncConf:
    """A study that keeps jobs in flight and continues where it was."""

    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "none"}])
    _target_: str = "hydra_plugins.experiment_sweeper.optuna_async.OptunaAsyncSweeper"
    _recursive_: bool = False

    sampler: Any = MISSING
    """A node with a _target_; hydra/sweeper/sampler= tpe, random, cmaes, nsgaii or grid."""
    direction: Any = "minimize"
    """minimize or maximize, or a list with one for each value that a job returns."""
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
    params: dict[str, str] | None = None
    """What is searched, by key; the command line wins: choice(a,b), range(1,9), interval(0.0,1.0),
    tag(log,interval(1e-5,1e-3)), a,b,c, glob(*). A single value is an override of all jobs."""
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
    dry_run: bool = False
    """Print the space and how many trials would run, start and write nothing."""
    names: list[str] = field(default_factory=lambda: ["value"])
    """What the values that a job returns are called."""
    name_key: str | None = None
    """The key that names a run; each trial adds _trial<number> to it. null: hydra.sweep.subdir has
    to depend on ${hydra.job.num}."""
    search_group: str | None = None
    """The config group that chooses a search; with -m a run's own command leaves it out."""
    record: dict[str, Any] = field(default_factory=dict)
    """Kept in sweep.json with every run, resolved in its configuration."""
    ignore: list[str] = field(default_factory=list)
    """Keys of a job's configuration that do not make it another point."""
    inputs: list[str] = field(default_factory=list)
    """Small files that a job reads, named in its configuration, such as records with digests of
    its data: with another content it is another point."""
    alike: bool = True
    """Refuse to go on with a study whose trials this command would have made with other options,
    beside what is searched; false: what differs changes no number."""
    repeats: int = 1
    """Refused above 1: only a grid repeats its runs."""
    precheck: str | None = None
    """Dotted path of a function (script, configurations) that is called with what is to run here
    before the first job starts; what it raises refuses the sweep."""
    report: str | None = None
    """Dotted path of a function (cfg, sweep_dir) that is called at the end."""

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
        names = ("names", "progress_metric", "progress_step")
        return {name: list(value) if name == "names" else value
                for name in names for value in [getattr(self, name)]}  # fmt: skip

    @property
    def directions(self) -> list[str]:
        """minimize or maximize, for each of `names`; SweepError where they do not fit."""
        single = isinstance(self.direction, str) or not isinstance(self.direction, Sequence)
        entries = [self.direction] if single else list(self.direction)
        words = [str(getattr(entry, "name", entry)).lower() for entry in entries]
        if not words or {*words} - {"minimize", "maximize"}:
            raise SweepError(
                f"hydra.sweeper.direction={self.direction} must be minimize or maximize, or a list "
                "with one of them for each value that a job returns"
            )
        if len(self.names) != len(words):
            raise SweepError(
                f"hydra.sweeper.direction has {len(words)} entries, hydra.sweeper.names "
                f"({', '.join(self.names)}) {len(self.names)}: one of each for every value that a "
                "job returns"
            )
        return words

    def check(self) -> None:
        """Refuse options that do not fit; names them."""
        for name in ("n_jobs", "n_trials"):
            if (value := getattr(self, name)) < 1:
                raise SweepError(f"hydra.sweeper.{name}={value} must be at least 1")
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
        count = len(self.directions)
        if self.prunes and count > 1:
            raise SweepError(
                f"hydra/sweeper/pruner={self.pruner_class} and hydra.sweeper.direction with "
                f"{count} objectives do not go together: Optuna cannot prune by several; give "
                "hydra/sweeper/pruner=none, or one direction"
            )
        if self.prunes and not (self.progress_file and self.progress_metric):
            raise SweepError(
                f"hydra/sweeper/pruner={self.pruner_class} needs hydra.sweeper.progress_file and "
                "hydra.sweeper.progress_metric: what it compares while jobs run"
            )


def class_name(node: Any) -> str:
    """The last part of a node's _target_."""
    return str(node["_target_"]).rpartition(".")[2] if node else "none"
