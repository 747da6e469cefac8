"""Every option of hydra/sweeper=experiment.

The options are stored as experiment_schema; _conf/ has the file `experiment` that extends it, and
an app may have a file of that name with values of its own.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ExperimentSweeperConf:
    """A grid of runs that continues where it was, and ends with a table."""

    _target_: str = "hydra_plugins.experiment_sweeper.sweeper.ExperimentSweeper"
    max_batch_size: int | None = None
    """Jobs of one call of the launcher, at most; null: all."""
    params: dict[str, str] | None = None
    """Sweeps, as on the command line, by key; the command line wins."""
    cases: list[str] = field(default_factory=list)
    """Options that go together, e.g. ["loss=baseline lr=1e-4", "loss=full-opd lr=5e-5"]: one run
    each, times what else is swept."""
    repeats: int = 1
    """Runs of each choice, with this many values of `repeat_key`."""
    repeat_key: str | None = None
    """An integer that repeats count up, beginning with the configured one, e.g. seed."""
    only: list[str] = field(default_factory=list)
    """Of all runs those whose name, as the dry run prints it, fits one of these patterns, e.g.
    ["*full-opd*"]; []: all."""
    dry_run: bool = False
    """Print what would run, start and write nothing."""
    n_jobs: int | None = None
    """With hydra/launcher=basic: processes at a time on this machine; null: one job after the other
    in this process. Other launchers have limits of their own."""
    if_done: str = "skip"
    """What happens to a run that this sweep has finished with the same configuration: skip or
    rerun. A launcher that knows its finished jobs decides by itself."""
    exists: str | None = None
    """A file or folder, named in each job's configuration, without which no run counts as finished;
    null: the record is enough."""
    ignore: list[str] = field(default_factory=list)
    """Keys of a job's configuration that do not make it another run."""
    inputs: list[str] = field(default_factory=list)
    """Small files that a job reads, named in its configuration, such as records with digests of
    its data: with another content it is another run."""
    names: list[str] = field(default_factory=lambda: ["value"])
    """What the values that a job returns are called; [] when it returns none."""
    direction: Any = "maximize"
    """maximize or minimize, or a list with one for each of `names`; the first ranks the table."""
    name_key: str | None = None
    """The key that names a run; where two runs of a sweep would have the same name, it gets the
    choices in which they differ. null: they are refused."""
    record: dict[str, Any] = field(default_factory=dict)
    """Kept in sweep.json with every run, resolved in its configuration."""
    precheck: str | None = None
    """Dotted path of a function (script, configurations) that is called with what is to run here
    before the first job starts; what it raises refuses the sweep."""
    around: str | None = None
    """Dotted path of a context manager (script, configurations, the sweep's folder, n_jobs or null
    where that is not how jobs run) that is open while what is to run runs; what it raises before
    refuses the sweep."""
    report: str | None = None
    """Dotted path of a function (cfg, sweep_dir) that is called at the end."""
