"""What hydra/sweeper=experiment has beside the options of both sweepers.

The options are stored as experiment_schema; _conf/ has the file `experiment` that extends it, and
an app may have a file of that name with values of its own.
"""

from dataclasses import dataclass, field

from hydra_sweeps.config import SweepConf


@dataclass
class ExperimentSweeperConf(SweepConf):
    """A grid of runs that continues where it was, and ends with a table."""

    _target_: str = "hydra_plugins.experiment_sweeper.sweeper.ExperimentSweeper"
    max_batch_size: int | None = None
    """Jobs of one call of the launcher, at most; null: all."""
    cases: list[str] = field(default_factory=list)
    """Options that go together, e.g. ["loss=baseline lr=1e-4", "loss=full-opd lr=5e-5"]: one run
    each, times what else is swept."""
    repeat_key: str | None = None
    """An integer that repeats count up, beginning with the configured one, e.g. seed."""
    only: list[str] = field(default_factory=list)
    """Of all runs those whose name, as the dry run prints it, fits one of these patterns, e.g.
    ["*full-opd*"]; []: all."""
    n_jobs: int | None = None
    """With hydra/launcher=basic: processes at a time on this machine; null: one job after the other
    in this process. Other launchers have limits of their own."""
    if_done: str = "skip"
    """What happens to a run that this sweep has finished with the same configuration: skip or
    rerun. A launcher that knows its finished jobs decides by itself."""
    exists: str | None = None
    """A file or folder, named in each job's configuration, without which no run counts as finished;
    null: the record is enough."""
    around: str | None = None
    """Dotted path of a context manager (script, configurations, the sweep's folder, n_jobs or null
    where that is not how jobs run) that is open while what is to run runs; what it raises before
    refuses the sweep."""
