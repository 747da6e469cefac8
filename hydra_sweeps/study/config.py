"""Every option of hydra/sweeper=optuna_async, its samplers and its pruners.

The first block of options is that of hydra-optuna-sweeper 1.3.0: the same file serves both.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

PROVIDER = "experiment_sweeper"


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
    report: str | None = None
    """Dotted path of a function (cfg, sweep_dir) that is called at the end."""


@dataclass
class TPE:
    """https://optuna.readthedocs.io/en/stable/reference/samplers ."""

    _target_: str = "optuna.samplers.TPESampler"
    seed: int | None = None
    n_startup_trials: int = 10
    n_ei_candidates: int = 24
    multivariate: bool = False
    constant_liar: bool | None = None
    """null: when several jobs are in flight."""


@dataclass
class Random:
    """Independent draws."""

    _target_: str = "optuna.samplers.RandomSampler"
    seed: int | None = None


@dataclass
class CmaEs:
    """Needs the package cmaes; samples numbers, not choices."""

    _target_: str = "optuna.samplers.CmaEsSampler"
    seed: int | None = None
    x0: dict[str, Any] | None = None
    sigma0: float | None = None
    n_startup_trials: int = 1
    warn_independent_sampling: bool = True
    consider_pruned_trials: bool = False


@dataclass
class NSGAII:
    """For several objectives."""

    _target_: str = "optuna.samplers.NSGAIISampler"
    seed: int | None = None
    population_size: int = 50
    mutation_prob: float | None = None
    crossover_prob: float = 0.9
    swapping_prob: float = 0.5


@dataclass
class Grid:
    """Every combination of lists and ranges once, in order."""

    _target_: str = "optuna.samplers.GridSampler"
    _partial_: bool = True


@dataclass
class NoPruner:
    """Every trial runs to its end."""

    _target_: str = "optuna.pruners.NopPruner"


@dataclass
class Median:
    """Ends what is below the median of earlier trials at the same step."""

    _target_: str = "optuna.pruners.MedianPruner"
    n_startup_trials: int = 5
    n_warmup_steps: int = 0
    interval_steps: int = 1


@dataclass
class Hyperband:
    """Successive halving with several budgets."""

    _target_: str = "optuna.pruners.HyperbandPruner"
    min_resource: int = 1
    max_resource: Any = "auto"
    """Steps of the longest job."""
    reduction_factor: int = 3


@dataclass
class SuccessiveHalving:
    """Only the best share goes on from each rung."""

    _target_: str = "optuna.pruners.SuccessiveHalvingPruner"
    min_resource: Any = "auto"
    reduction_factor: int = 4
    min_early_stopping_rate: int = 0


SAMPLERS = {"tpe": TPE, "random": Random, "cmaes": CmaEs, "nsgaii": NSGAII, "grid": Grid}
PRUNERS = {
    "none": NoPruner,
    "median": Median,
    "hyperband": Hyperband,
    "successive_halving": SuccessiveHalving,
}


def register() -> None:
    """Offer the options, which files called optuna_async extend, and the pruners."""
    store, name = ConfigStore.instance(), "optuna_async_schema"
    store.store(group="hydra/sweeper", name=name, node=OptunaAsyncConf, provider=PROVIDER)
    for name, pruner in PRUNERS.items():
        store.store(group="hydra/sweeper/pruner", name=name, node=pruner, provider=PROVIDER)


def register_samplers() -> None:
    """Offer the samplers that no other plugin offers: hydra-optuna-sweeper has the same names."""
    store = ConfigStore.instance()
    known = store.repo.get("hydra", {}).get("sweeper", {}).get("sampler", {})
    for name, sampler in SAMPLERS.items():
        if f"{name}.yaml" not in known:
            store.store(group="hydra/sweeper/sampler", name=name, node=sampler, provider=PROVIDER)
