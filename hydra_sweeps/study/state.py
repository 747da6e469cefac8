"""A study while it runs, and the jobs of its trials."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hydra.core.utils import JobReturn

from hydra_sweeps import record
from hydra_sweeps.command import run_command, run_overrides
from hydra_sweeps.jobs import Job, compose, rename
from hydra_sweeps.overrides import LONGEST, bounded, safe, without
from hydra_sweeps.reading import Inputs, changed
from hydra_sweeps.record import Run, Sweep
from hydra_sweeps.runner import Runner
from hydra_sweeps.study.config import OptunaAsyncConf
from hydra_sweeps.study.leases import Leases
from hydra_sweeps.study.space import Search
from hydra_sweeps.study.trials import (
    POINT,
    RUN,
    Place,
    best_trials,
    count_missing,
    in_state,
    look,
)
from hydra_sweeps.table import table


@dataclass
class RunningTrial:
    """A trial whose job runs."""

    trial: Any
    run: Run
    started: float
    steps: set[int] = field(default_factory=set)
    """Those that were reported."""
    stopped: bool = False


@dataclass
class Study(Search):
    """A study while it runs."""

    place: Place
    optuna: Any
    """Optuna's study."""
    runner: Runner
    sweep: Sweep
    leases: Leases
    multi: bool
    """Whether a run's own command has -m."""
    inputs: Inputs
    """As they were when this process began."""
    running: dict[int, RunningTrial] = field(default_factory=dict)
    waiting: dict[int, tuple[Any, int]] = field(default_factory=dict)
    """By number: trials of a point that runs, and the number of that trial."""
    points: list[str] = field(default_factory=list)
    """Digests of all points, once there may be no others."""
    returned: dict[int, JobReturn] = field(default_factory=dict)

    @property
    def stored(self) -> Any:
        """Optuna's study as the storage has it, with what other processes wrote."""
        return self.optuna if self.leases.alone else look(self.place)

    @property
    def trials(self) -> list[Any]:
        """As the storage has them."""
        return list(self.stored.get_trials(deepcopy=False))

    @property
    def exhausted(self) -> bool:
        """Whether every point has been measured, or is being measured."""
        if self.options.custom_search_space or self.options.is_grid:
            return False
        space = self.space.few(self.options.n_trials)
        begun = in_state(self.trials, "COMPLETE", "PRUNED", "RUNNING")
        known = {trial.user_attrs.get(POINT) for trial in begun} - {None}
        if space is None or len(known) < len(space):
            return False
        if not self.points:
            jobs = [compose(self.source, self.space.job(values), 0) for values in space]
            self.points = [point_of(self.options, job) for job in jobs]
        return {*self.points} <= known

    @property
    def failed(self) -> list[Any]:
        """The trials that failed."""
        return in_state(self.trials, "FAIL")

    @property
    def early(self) -> str:
        """Why no trial starts any more, although some are missing; empty: nothing stands against
        it."""
        rate, total = self.options.max_failure_rate, self.options.n_trials
        failed, trials = len(self.failed), self.trials
        if failed > rate * total:
            return (
                f"{failed} of {len(trials)} trials failed, more than hydra.sweeper."
                f"max_failure_rate={rate} of n_trials={total}; why: see the table"
            )
        return changed(self.inputs) if count_missing(self, trials) else ""

    @cached_property
    def own_overrides(self) -> list[str]:
        """Of Hydra's node, those of a run's own command."""
        return run_overrides(self.source, self.of_run(self.space.overrides), self.multi)

    def of_run(self, overrides: Sequence[str]) -> list[str]:
        """A job's overrides without the search that they were part of."""
        return without(overrides, self.options.search_group if self.multi else None)

    def table(self) -> str:
        """The study's trials, best first."""
        names = {trial.user_attrs.get(RUN) for trial in self.trials}
        runs = [run for run in self.sweep.runs.values() if run.name in names]
        return table(self.sweep, runs, self.options.name_key)

    def write(self) -> None:
        """Write sweep.json."""
        assert self.sweep.study is not None
        self.sweep.study["best"] = [trial.number for trial in best_trials(self.stored)]
        record.write(self.place.sweep_dir, self.sweep)

    def interrupt(self) -> None:
        """Stop the jobs; what has not ended is continued by the next start."""
        self.sweep.state = "interrupted"
        for running in self.running.values():
            running.run.interrupt()
        self.write()
        self.runner.close()


def point_of(options: OptunaAsyncConf, job: Job) -> str:
    """What two trials of one point have in common: all but the name."""
    return job.digest(options.left_out)


def named_job(search: Search, overrides: Sequence[str], number: int) -> Job:
    """The job of a trial: with its number in its name, and the study's where that has one."""
    job = compose(search.source, overrides, number)
    key = search.options.name_key
    if key is None:
        return job
    label = re.sub(
        r"\d+\.\d{3,}(e[-+]?\d+)?", lambda match: f"{float(match[0]):.3g}", str(job.required(key))
    )
    trial = f"_trial{number}"
    name = "_".join(safe(part) for part in (label, search.options.study_name) if part)
    name = bounded(name, LONGEST - len(trial)) + trial
    rename(search.source, job, key, name, name)
    return job


def run_of(study: Study, job: Job, params: dict[str, Any]) -> Run:
    """A trial's entry in sweep.json."""
    command = run_command(study.of_run(job.overrides), study.own_overrides, study.multi)
    run = Run(job.number, job.subdir, job.overrides, command)
    run.digest, run.record, run.params = job.digest(), job.record, dict(params)
    return run
