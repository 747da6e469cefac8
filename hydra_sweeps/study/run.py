"""One study: ask, run, report, prune, tell, with n_jobs in flight, until it has its trials."""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from hydra_sweeps import record
from hydra_sweeps.command import (
    hydra_overrides,
    raising_sigterm,
    report,
    run_command,
    run_overrides,
    stopping,
)
from hydra_sweeps.errors import SweepError
from hydra_sweeps.jobs import Job, Source, check_environment, compose, resolved_sweep_dir
from hydra_sweeps.overrides import LONGEST, bounded, key_of, safe, without
from hydra_sweeps.record import Outcome, Run, Sweep
from hydra_sweeps.records import reason, write_whole
from hydra_sweeps.runner import Runner, is_basic, open_runner
from hydra_sweeps.study.config import OptunaAsyncConf
from hydra_sweeps.study.space import Space, first_point, read_space
from hydra_sweeps.study.trials import (
    ERROR,
    OVERRIDES,
    RUN,
    STOPPED,
    Place,
    best_trials,
    count_missing,
    enqueue,
    in_state,
    intermediate,
    known_trials,
    open_study,
    outcome_of,
    place_of,
    plan,
    quiet_optuna,
    stored_outcome,
    tell,
    write_results,
)
from hydra_sweeps.table import shown, table

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between looks at progress files."""


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
class Study:
    """A study while it runs."""

    options: OptunaAsyncConf
    source: Source
    sweep_dir: Path
    space: Space
    optuna: Any
    """Optuna's study."""
    runner: Runner
    sweep: Sweep
    multi: bool
    """Whether a run's own command has -m."""
    running: dict[int, RunningTrial] = field(default_factory=dict)
    returned: dict[int, JobReturn] = field(default_factory=dict)

    @property
    def trials(self) -> list[Any]:
        """As the storage has them."""
        return list(self.optuna.get_trials(deepcopy=False))

    @property
    def failed(self) -> list[Any]:
        """The trials that failed."""
        return in_state(self.trials, "FAIL")

    @property
    def too_many_failed(self) -> bool:
        """Whether the study has failed."""
        return len(self.failed) > self.options.max_failure_rate * self.options.n_trials

    def table(self) -> str:
        """The study's trials, best first."""
        names = {trial.user_attrs.get(RUN) for trial in self.trials}
        runs = [run for run in self.sweep.runs.values() if run.name in names]
        return table(self.sweep, runs, self.options.name_key)

    def write(self) -> None:
        """Write sweep.json."""
        assert self.sweep.study is not None
        self.sweep.study["best"] = [trial.number for trial in best_trials(self.optuna)]
        record.write(self.sweep_dir, self.sweep)

    def interrupt(self) -> None:
        """Stop the jobs; what has not ended is continued by the next start."""
        self.sweep.state = "interrupted"
        for running in self.running.values():
            running.run.interrupt()
        self.write()
        self.runner.close()


def run_study(
    options: OptunaAsyncConf, source: Source, launcher: Launcher, arguments: Sequence[str]
) -> list[JobReturn]:
    """What `OptunaAsyncSweeper.sweep` does; `launcher` is set up, `arguments` as Hydra got them."""
    master, loader = source.master, source.context.config_loader
    options.check()
    space = read_space(loader, master, options.params or {}, options.conditional, arguments)
    first = first_points(options, source, space)
    sweep_dir = resolved_sweep_dir(master).absolute()
    examples = check_jobs(source, options, space)
    check_environment(examples, launcher)
    place = place_of(options, sweep_dir)
    if options.dry_run:
        print(plan(options, space, first, known_trials(place), place), flush=True)
        return []
    if OmegaConf.select(master, "hydra.launcher.setup"):
        return list(launcher.launch([job.overrides for job in examples], initial_job_idx=0))
    fresh = fresh_record(options, master, place)
    with record.locked(sweep_dir), raising_sigterm():
        optuna = open_study(options, place)
        enqueue(optuna, options, space, first)
        trials = optuna.get_trials(deepcopy=False)
        count = count_missing(options, space, trials) + len(in_state(trials, "RUNNING"))
        write_whole(sweep_dir / "multirun.yaml", OmegaConf.to_yaml(master))
        runner = open_runner(launcher, options.n_jobs > 1, count)
        sweep = record.begin(sweep_dir, fresh)
        study = Study(
            options, source, sweep_dir, space, optuna, runner, sweep, not is_basic(launcher)
        )
        return carry_out(study)


def first_points(options: OptunaAsyncConf, source: Source, space: Space) -> list[dict[str, Any]]:
    """hydra.sweeper.warm_start as values; one on the command line has to fit to the rest of it."""
    key, overrides = "hydra.sweeper.warm_start", hydra_overrides(source.master)
    strict = any(override.startswith(f"{key}=") for override in overrides)
    return [
        first_point(source.context.config_loader, space, f"{key}[{n}]={text!r}", text, strict)
        for n, text in enumerate(options.warm_start)
    ]


def fresh_record(options: OptunaAsyncConf, master: DictConfig, place: Place) -> Sweep:
    """The record of this command, without its runs."""
    sweep = record.fresh("study", master, options.names, options.directions)
    sweep.study = {
        "name": place.name,
        "storage": str(place.storage),
        "n_trials": options.n_trials,
        "sampler": options.sampler_class,
        "pruner": options.pruner_class,
        "best": [],
    }
    return sweep


def check_jobs(source: Source, options: OptunaAsyncConf, space: Space) -> list[Job]:
    """Compose jobs that together have every key; SweepError where one cannot be, or shares a folder
    with another."""
    points = [[*space.overrides, *space.texts_of(values)] for values in space.examples()]
    jobs = [named_job(source, options, point, number) for number, point in enumerate(points)]
    subdir = named_job(source, options, points[0], len(jobs)).subdir
    if subdir == jobs[0].subdir:
        raise SweepError(
            f"all trials would write to {source.master.hydra.sweep.dir}/{subdir}; put "
            "${hydra.job.num} into hydra.sweep.subdir, or name its key in hydra.sweeper.name_key"
        )
    return jobs


def named_job(
    source: Source, options: OptunaAsyncConf, overrides: Sequence[str], number: int
) -> Job:
    """The job of a trial: with its number in its name, and the study's where that has one."""
    job = compose(source, overrides, number)
    key = options.name_key
    if key is None:
        return job
    label = re.sub(
        r"\d+\.\d{3,}(e[-+]?\d+)?", lambda match: f"{float(match[0]):.3g}", str(job.required(key))
    )
    trial = f"_trial{number}"
    name = "_".join(safe(part) for part in (label, options.study_name) if part)
    name = bounded(name, LONGEST - len(trial)) + trial
    OmegaConf.update(job.config, key, name)  # as composing it once more would
    job.overrides = [*without(overrides, key), f"{key}={name}"]
    return job


def carry_out(study: Study) -> list[JobReturn]:
    """Run what is missing; afterwards results, the table and the report."""
    catch_up(study)
    study.write()
    with stopping(study.interrupt, study.table):
        loop(study)
    study.runner.close()
    options, failed, trials = study.options, study.failed, study.trials
    study.sweep.state = "interrupted" if study.too_many_failed else "complete"
    study.write()
    write_results(study.optuna, study.sweep_dir)
    print(study.table(), flush=True)
    report(options.report, study.source.master, study.sweep_dir)
    if study.too_many_failed:
        raise SweepError(
            f"{len(failed)} of {len(trials)} trials failed, more than "
            f"hydra.sweeper.max_failure_rate={options.max_failure_rate} of n_trials="
            f"{options.n_trials}; why: see the table"
        )
    if not best_trials(study.optuna):
        why = failed[0].user_attrs.get(ERROR) if failed else "all were pruned"
        raise SweepError(f"none of {len(trials)} trials completed; the first: {why}")
    return [study.returned[number] for number in sorted(study.returned)]


def catch_up(study: Study) -> None:
    """Bring sweep.json to where the storage is: a kill may have come between the two."""
    for trial in study.trials:
        if RUN not in trial.user_attrs:
            continue
        run = study.sweep.runs.get(trial.user_attrs[RUN])
        if run is None:
            job = compose(study.source, list(trial.user_attrs[OVERRIDES]), trial.number)
            run = run_of(study, job, trial.params)
        outcome = stored_outcome(trial)
        if run.status != outcome.status:
            run.end(outcome)
        study.sweep.runs[run.name] = run


def run_of(study: Study, job: Job, params: dict[str, Any]) -> Run:
    """A trial's entry in sweep.json."""
    group = study.options.search_group if study.multi else None
    hydra = run_overrides(study.source.master, study.multi)
    command = run_command(without(job.overrides, group), hydra, study.multi)
    run = Run(job.number, job.subdir, job.overrides, command)
    run.digest, run.record, run.params = job.digest(), job.record, dict(params)
    return run


def loop(study: Study) -> None:
    """Keep n_jobs in flight."""
    unfinished = in_state(study.trials, "RUNNING")
    missing = count_missing(study.options, study.space, study.trials)
    while True:
        while (
            len(study.running) < study.options.n_jobs
            and (unfinished or missing)
            and not study.too_many_failed
        ):
            if unfinished:
                resume(study, unfinished.pop(0))
            else:
                missing -= 1
                start(study, study.optuna.ask())
        if not study.running:
            return
        ended = study.runner.ended(POLL)
        for number, lines in study.runner.reports().items():
            if number in study.running:
                follow(study, study.running[number], lines)
        for number, returned in ended:
            end(study, number, returned)


def resume(study: Study, frozen: Any) -> None:
    """Continue a trial that an earlier process began."""
    trial = quiet_optuna().trial.Trial(study.optuna, frozen._trial_id)  # keeps what it has
    start(study, trial, frozen.user_attrs.get(OVERRIDES))
    if (running := study.running.get(trial.number)) is not None:
        running.steps |= set(frozen.intermediate_values)
        if frozen.user_attrs.get(STOPPED):
            running.stopped = True
            study.runner.stop(trial.number)


def start(study: Study, trial: Any, overrides: Sequence[str] | None = None) -> None:
    """Start a trial's job.

    Args:
        study: the study.
        trial: what `ask` gave.
        overrides: those it was started with before; null: suggest values.
    """
    number, source = trial.number, study.source
    try:
        if overrides:
            job = compose(source, overrides, number)
        else:
            job = named_job(source, study.options, suggested(study, trial), number)
        run = run_of(study, job, trial.params)
    except SweepError as error:
        tell(study.optuna, trial, Outcome("failed", None, reason(error)))
        log.warning(f"\t#{number} failed: {error}")
        return
    trial.set_user_attr(RUN, run.name)
    trial.set_user_attr(OVERRIDES, job.overrides)
    earlier = study.sweep.runs.get(run.name)
    if earlier is not None and earlier.number == number:
        run.seconds = earlier.seconds
    run.begin()
    study.sweep.runs[run.name] = run
    study.write()
    study.running[number] = RunningTrial(trial, run, time.monotonic())
    study.runner.start(number, job.overrides)


def suggested(study: Study, trial: Any) -> list[str]:
    """The overrides of a trial, all values sampled.

    Raises:
        SweepError: the study has other choices for a key.
        CompactHydraException: custom_search_space fails.
    """
    space, custom = study.space, study.options.custom_search_space
    try:
        values = space.fill(lambda param: param.suggest(trial))
    except ValueError as error:
        raise CompactHydraException(
            f"the study {study.optuna.study_name} does not fit to what is searched now ({error}); "
            "give another hydra.sweeper.study_name or hydra.sweep.dir"
        ) from None
    for key, override in space.fixed.items():
        trial.set_user_attr(key, override.get_value_element_as_str())
    if custom:
        try:
            get_method(custom)(study.source.master, trial)
        except (Exception, SystemExit) as error:
            raise CompactHydraException(
                f"hydra.sweeper.custom_search_space={custom}: {reason(error)}"
            ) from error
        twice = {key_of(key) for key in trial.params} & {*space.fixed}
        if twice:
            raise CompactHydraException(
                f"{', '.join(sorted(twice))} is fixed and suggested by custom_search_space={custom}"
            )
        values |= {key: value for key, value in trial.params.items() if key not in values}
    return [*space.overrides, *space.texts_of(values)]


def follow(study: Study, running: RunningTrial, lines: Sequence[dict[str, Any]]) -> None:
    """Report a job's progress, and stop it when the pruner says so."""
    if len(study.options.names) > 1 or running.stopped:
        return
    for step, value in intermediate(lines, study.options):
        if step in running.steps:
            continue
        running.steps.add(step)
        running.trial.report(value, step)
        if study.options.prunes and running.trial.should_prune():
            running.stopped = True
            running.trial.set_user_attr(STOPPED, step)
            study.runner.stop(running.trial.number)
            return


def end(study: Study, number: int, returned: JobReturn) -> None:
    """Tell the study how a job has ended."""
    running = study.running.pop(number)
    run, trial = running.run, running.trial
    outcome = outcome_of(returned, len(study.options.names))
    if running.stopped and outcome.status == "failed":
        outcome = Outcome("pruned", None, f"pruned at step {trial.user_attrs.get(STOPPED)}")
    run.end(outcome)
    run.seconds = round((run.seconds or 0.0) + time.monotonic() - running.started, 3)
    tell(study.optuna, trial, outcome)
    study.returned[number] = returned
    study.write()
    result = shown(run.value) if run.status == "completed" else run.error
    ended = len(in_state(study.trials, "COMPLETE", "PRUNED", "FAIL"))
    log.info(f"\t#{number} {run.status}: {result} ({ended} of {study.options.n_trials})")
