"""One study: ask, run, report, prune, tell, with n_jobs in flight, until it has its trials."""

import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from hydra_sweeps import jobs as _jobs
from hydra_sweeps import record
from hydra_sweeps import table as _show
from hydra_sweeps.errors import SweepError
from hydra_sweeps.grid import names as _names
from hydra_sweeps.grid import run as _runs
from hydra_sweeps.grid.overrides import key_of
from hydra_sweeps.jobs import Job, Source
from hydra_sweeps.record import Run, Sweep
from hydra_sweeps.runner import Runner, is_basic, open_runner
from hydra_sweeps.study import space as _space
from hydra_sweeps.study import trials as _study
from hydra_sweeps.study.config import OptunaAsyncConf
from hydra_sweeps.study.space import Space

if TYPE_CHECKING:
    from hydra_plugins.experiment_sweeper.optuna_async import OptunaAsyncSweeper

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between looks at progress files."""


@dataclass
class Flying:
    """A trial whose job runs."""

    trial: Any
    run: Run
    since: float
    steps: set[int]
    """Those that were reported."""
    stopped: bool = False


@dataclass
class Search:
    """A study while it runs."""

    options: OptunaAsyncConf
    source: Source
    sweep_dir: Path
    space: Space
    study: Any
    runner: Runner
    sweep: Sweep
    hydra: list[str] | None
    """Overrides of Hydra's node that a run's command needs."""
    flying: dict[int, Flying] = field(default_factory=dict)
    returned: dict[int, JobReturn] = field(default_factory=dict)

    @property
    def trials(self) -> list[Any]:
        """As the storage has them."""
        found: list[Any] = self.study.get_trials(deepcopy=False)
        return found

    def write(self) -> None:
        """Write sweep.json."""
        assert self.sweep.study is not None
        self.sweep.study["best"] = [trial.number for trial in _study.best(self.study)]
        record.write(self.sweep_dir, self.sweep)


def search(sweeper: "OptunaAsyncSweeper", arguments: list[str]) -> list[JobReturn]:
    """What `OptunaAsyncSweeper.sweep` does."""
    options, master, launcher = sweeper.options, sweeper.config, sweeper.launcher
    context = sweeper.hydra_context
    assert master is not None and launcher is not None and context is not None
    _study.check(options)
    loader, source = context.config_loader, Source(master, context)
    space = _space.read(loader, master, options.params or {}, options.conditional, arguments)
    asked = _runs.asked_of_hydra(master)
    strict = any(each.startswith("hydra.sweeper.warm_start=") for each in asked)
    first = [
        _space.first_point(loader, space, f"hydra.sweeper.warm_start[{n}]={said!r}", said, strict)
        for n, said in enumerate(options.warm_start)
    ]
    examples = check_jobs(source, options, space)
    sweep_dir = Path(str(master.hydra.sweep.dir)).absolute()
    storage = _study.location(options, sweep_dir)
    name = _study.study_name(options, sweep_dir)
    if options.dry_run:
        trials = _study.known_trials(options, storage, name)
        print(
            "\n".join(_study.plan(options, space, first, trials, f"{name} in {storage}")),
            flush=True,
        )
        return []
    if OmegaConf.select(master, "hydra.launcher.setup"):
        return list(launcher.launch([job.overrides for job in examples], initial_job_idx=0))
    fresh = record_of(options, master, storage, name)
    with record.locked(sweep_dir), _runs.raising_sigterm():
        study = _study.open_study(options, storage, name)
        _study.enqueue(study, options, space, first)
        trials = study.get_trials(deepcopy=False)
        count = _study.missing(options, space, trials) + len(_study.in_state(trials, "RUNNING"))
        hydra = None if is_basic(launcher) else _runs.kept_of_hydra(master)
        # Copied, since a launcher may resolve or change what it gets.
        OmegaConf.save(master, sweep_dir / "multirun.yaml")
        runner = open_runner(launcher, options.n_jobs > 1, count)
        sweep = record.begin(sweep_dir, fresh)
        one = Search(options, source, sweep_dir, space, study, runner, sweep, hydra)
        return carry_out(one)


def record_of(options: OptunaAsyncConf, master: DictConfig, storage: Any, name: str) -> Sweep:
    """The record of this command, without its runs."""
    said = zip(options.names, _study.directions(options), strict=True)
    objectives = [{"name": each, "direction": direction} for each, direction in said]
    script = str(master.hydra.job.name)
    sweep = Sweep("study", script, record.command_line(), os.getcwd(), objectives)
    sweep.study = {
        "name": name,
        "storage": str(storage),
        "n_trials": options.n_trials,
        "sampler": _study.class_name(options.sampler),
        "pruner": _study.class_name(options.pruner),
        "best": [],
    }
    return sweep


def check_jobs(source: Source, options: OptunaAsyncConf, space: Space) -> list[Job]:
    """Compose jobs that together have every key; SweepError where one cannot be, or shares a folder
    with another."""
    examples = [[*space.overrides, *_space.text(values)] for values in space.examples()]
    jobs = [named(source, options, each, number) for number, each in enumerate(examples)]
    more = named(source, options, examples[0], len(jobs))
    if _jobs.subdir(more) == _jobs.subdir(jobs[0]):
        raise SweepError(
            f"all trials would write to {source.master.hydra.sweep.dir}/{_jobs.subdir(more)}; put "
            "${hydra.job.num} into hydra.sweep.subdir, or name its key in hydra.sweeper.name_key"
        )
    return jobs


def named(source: Source, options: OptunaAsyncConf, overrides: Sequence[str], number: int) -> Job:
    """The job of a trial: with its number in its name, and the study's where that has one."""
    job = _jobs.compose(source, overrides, number)
    key = options.name_key
    if key is None:
        return job
    base = str(_jobs.value(job, key))
    base = re.sub(r"\d+\.\d{3,}(e[-+]?\d+)?", lambda found: f"{float(found[0]):.3g}", base)
    parts = [base, *([options.study_name] if options.study_name else []), f"trial{number}"]
    name = "_".join(_names.safe(part) for part in parts)
    OmegaConf.update(job.config, key, name)  # as composing it once more would
    job.overrides = [each for each in overrides if key_of(each) != key]
    job.overrides.append(f"{key}={name}")
    return job


def carry_out(one: Search) -> list[JobReturn]:
    """Run what is missing; afterwards results, the table and the report."""
    catch_up(one)
    one.write()
    try:
        loop(one)
    except (KeyboardInterrupt, _runs.Terminated) as stop:
        end_all(one)
        print(table(one), flush=True)
        print("interrupted; the same command continues", file=sys.stderr, flush=True)
        raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else 143) from None
    except BaseException:
        end_all(one)
        raise
    one.runner.close()
    failed = _study.in_state(one.trials, "FAIL")
    one.sweep.state = "interrupted" if too_many(one) else "complete"
    one.write()
    _study.write_results(one.study, one.sweep_dir)
    print(table(one), flush=True)
    _runs.report(one.options.report, one.source.master, one.sweep_dir)
    if too_many(one):
        raise SweepError(
            f"{len(failed)} of {len(one.trials)} trials failed, more than "
            f"hydra.sweeper.max_failure_rate={one.options.max_failure_rate} of n_trials="
            f"{one.options.n_trials}; why: see the table"
        )
    if not _study.best(one.study):
        why = failed[0].user_attrs.get(_study.ERROR) if failed else "all were pruned"
        raise SweepError(f"none of {len(one.trials)} trials completed; the first: {why}")
    return [one.returned[number] for number in sorted(one.returned)]


def table(one: Search) -> str:
    """The study's trials, best first."""
    names = {trial.user_attrs.get(_study.RUN) for trial in one.trials}
    key = one.options.name_key
    return _show.table(
        one.sweep,
        [
            replace(run, overrides=[each for each in run.overrides if key_of(each) != key])
            for run in one.sweep.runs
            if run.name in names
        ],
    )


def end_all(one: Search) -> None:
    """Stop the jobs; what has not ended is continued by the next start."""
    one.sweep.state = "interrupted"
    for flying in one.flying.values():
        flying.run.status, flying.run.started = "planned", None
    one.write()
    one.runner.close()


def too_many(one: Search) -> bool:
    """Whether the study has failed."""
    failed = len(_study.in_state(one.trials, "FAIL"))
    return failed > one.options.max_failure_rate * one.options.n_trials


def catch_up(one: Search) -> None:
    """Bring sweep.json to where the storage is: a kill may have come between the two."""
    for trial in one.trials:
        if _study.RUN not in trial.user_attrs:
            continue
        overrides = list(trial.user_attrs[_study.OVERRIDES])
        run = one.sweep.run(trial.user_attrs[_study.RUN])
        if run is None:
            run = run_of(one, _jobs.compose(one.source, overrides, trial.number), trial.params)
        status = _study.STATUS[trial.state.name]
        if run.status != status:
            run.status, run.error = status, trial.user_attrs.get(_study.ERROR)
            values = list(trial.values or []) if status == "completed" else []
            run.value = (values[0] if len(values) == 1 else values) if values else None
        one.sweep.put(run)


def run_of(one: Search, job: Job, params: dict[str, Any]) -> Run:
    """A trial's entry in sweep.json."""
    run = Run(job.number, _jobs.subdir(job), job.overrides)
    group = one.options.search_group if one.hydra is not None else None
    alone = [each for each in job.overrides if key_of(each) != group]
    run.command = record.run_command(alone, one.hydra)
    run.digest, run.record = _jobs.digest(job, []), _jobs.record(job)
    run.params = dict(params)
    return run


def loop(one: Search) -> None:
    """Keep n_jobs in flight."""
    left = _study.in_state(one.trials, "RUNNING")
    missing = _study.missing(one.options, one.space, one.trials)
    while True:
        while len(one.flying) < one.options.n_jobs and (left or missing) and not too_many(one):
            if left:
                again(one, left.pop(0))
            else:
                missing -= 1
                start(one, one.study.ask())
        if not one.flying:
            return
        ended = one.runner.ended(POLL)
        for number, lines in one.runner.reports().items():
            if number in one.flying:
                hear(one, one.flying[number], lines)
        for number, returned in ended:
            end(one, number, returned)


def again(one: Search, frozen: Any) -> None:
    """Continue a trial that an earlier process began."""
    trial = _study.trial_of(one.study, frozen)
    start(one, trial, frozen.user_attrs.get(_study.OVERRIDES))
    if (flying := one.flying.get(trial.number)) is not None:
        flying.steps |= set(frozen.intermediate_values)
        if frozen.user_attrs.get(_study.STOPPED):
            flying.stopped = True
            one.runner.stop(trial.number)


def start(one: Search, trial: Any, overrides: Sequence[str] | None = None) -> None:
    """Start a trial's job.

    Args:
        one: the study.
        trial: what `ask` gave.
        overrides: those it was started with before; null: suggest values.
    """
    number = trial.number
    try:
        given = overrides or suggested(one, trial)
        if overrides is None:
            job = named(one.source, one.options, given, number)
        else:
            job = _jobs.compose(one.source, given, number)
        run = run_of(one, job, trial.params)
    except SweepError as error:
        trial.set_user_attr(_study.ERROR, record.one_line(error))
        _study.tell(one.study, trial, "FAIL")
        log.warning(f"\t#{number} failed: {error}")
        return
    trial.set_user_attr(_study.RUN, run.name)
    trial.set_user_attr(_study.OVERRIDES, job.overrides)
    earlier = one.sweep.run(run.name)
    if earlier is not None and earlier.number == number:
        run.seconds = earlier.seconds
    run.status, run.started = "running", record.now()
    one.sweep.put(run)
    one.write()
    one.flying[number] = Flying(trial, run, time.monotonic(), set())
    one.runner.start(number, job.overrides)


def suggested(one: Search, trial: Any) -> list[str]:
    """The overrides of a trial, all values sampled.

    Raises:
        SweepError: the study has other choices for a key.
        CompactHydraException: custom_search_space fails.
    """
    space, custom = one.space, one.options.custom_search_space
    try:
        values = space.fill(lambda param: param.suggest(trial))
    except ValueError as error:
        raise CompactHydraException(
            f"the study {one.study.study_name} does not fit to what is searched now ({error}); "
            "give another hydra.sweeper.study_name or hydra.sweep.dir"
        ) from None
    for key, override in space.fixed.items():
        trial.set_user_attr(key, override.get_value_element_as_str())
    if custom:
        try:
            get_method(custom)(one.source.master, trial)
        except Exception as error:
            raise CompactHydraException(
                f"hydra.sweeper.custom_search_space={custom}: {record.one_line(error)}"
            ) from error
        both = {key_of(key) for key in trial.params} & {*space.fixed}
        if both:
            raise CompactHydraException(
                f"{', '.join(sorted(both))} is fixed and suggested by custom_search_space={custom}"
            )
        values |= {key: value for key, value in trial.params.items() if key not in values}
    return [*space.overrides, *_space.text(values)]


def hear(one: Search, flying: Flying, lines: Sequence[dict[str, Any]]) -> None:
    """Report a job's progress, and stop it when the pruner says so."""
    if len(one.options.names) > 1 or flying.stopped:
        return
    for step, value in _study.intermediate(lines, one.options):
        if step in flying.steps:
            continue
        flying.steps.add(step)
        flying.trial.report(value, step)
        if _study.prunes(one.options) and flying.trial.should_prune():
            flying.stopped = True
            flying.trial.set_user_attr(_study.STOPPED, step)
            one.runner.stop(flying.trial.number)
            return


def end(one: Search, number: int, returned: JobReturn) -> None:
    """Tell the study how a job has ended."""
    flying = one.flying.pop(number)
    run, trial = flying.run, flying.trial
    run.status, run.value, run.error = _study.outcome(returned, len(one.options.names))
    if flying.stopped and run.status == "failed":
        step = trial.user_attrs.get(_study.STOPPED)
        run.status, run.value, run.error = "pruned", None, f"pruned at step {step}"
    run.seconds = round((run.seconds or 0.0) + time.monotonic() - flying.since, 3)
    if run.status == "completed":
        values = run.value if isinstance(run.value, list) else [run.value]
        _study.tell(one.study, trial, "COMPLETE", [float(value or 0.0) for value in values])
    else:
        trial.set_user_attr(_study.ERROR, run.error)
        _study.tell(one.study, trial, {"pruned": "PRUNED", "failed": "FAIL"}[run.status])
    one.returned[number] = returned
    one.write()
    said = _show.shown(run.value) if run.status == "completed" else run.error
    ended = len(_study.in_state(one.trials, "COMPLETE", "PRUNED", "FAIL"))
    log.info(f"\t#{number} {run.status}: {said} ({ended} of {one.options.n_trials})")
