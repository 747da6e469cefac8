"""One study: what it searches, where it is kept, what it leaves."""

import logging
from collections.abc import Sequence
from contextlib import suppress

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from hydra_sweeps import record
from hydra_sweeps.command import (
    hydra_overrides,
    raising_sigterm,
    refuse_other_choices,
    report,
    stopping,
)
from hydra_sweeps.errors import SweepError
from hydra_sweeps.jobs import (
    Job,
    Source,
    check_environment,
    check_inputs,
    compose,
    resolved_sweep_dir,
)
from hydra_sweeps.reading import inputs_of, read_once
from hydra_sweeps.record import Sweep
from hydra_sweeps.records import write_whole
from hydra_sweeps.runner import is_basic, open_runner
from hydra_sweeps.study.alike import refuse_others
from hydra_sweeps.study.config import OptunaAsyncConf
from hydra_sweeps.study.leases import Leases
from hydra_sweeps.study.loop import loop
from hydra_sweeps.study.space import Point, Search, first_point, read_space
from hydra_sweeps.study.state import Study, named_job, run_of
from hydra_sweeps.study.trials import (
    ERROR,
    OVERRIDES,
    RUN,
    TWIN,
    Place,
    best_trials,
    count_missing,
    enqueue,
    in_state,
    known_study,
    open_study,
    place_of,
    plan,
    stored_outcome,
    write_results,
)

log = logging.getLogger(__name__)


def run_study(
    options: OptunaAsyncConf, source: Source, launcher: Launcher, arguments: Sequence[str]
) -> list[JobReturn]:
    """What `OptunaAsyncSweeper.sweep` does; `launcher` is set up, `arguments` as Hydra got them."""
    master = source.master
    source.context.config_loader = loader = read_once(source.context.config_loader)
    options.check()
    space = read_space(loader, master, options.params or {}, options.conditional, arguments)
    search = Search(options, source, space)
    first = first_points(search)
    sweep_dir = resolved_sweep_dir(master).absolute()
    examples = check_jobs(search)
    check_environment(examples, launcher, options.ignore)
    jobs = [*examples, *choices(search)]
    refuse_other_choices(master, jobs[len(examples) :], arguments, ["launcher"])
    place = place_of(options, sweep_dir)
    known = known_study(place)
    refuse_others(search, place, known)
    trials = known.get_trials(deepcopy=False) if known else []
    if options.dry_run:
        print(plan(search, place, first, trials), flush=True)
        return []
    if OmegaConf.select(master, "hydra.launcher.setup"):
        return list(launcher.launch([job.overrides for job in examples], initial_job_idx=0))
    if options.precheck and count_missing(search, trials):
        plain = compose(source, space.overrides, 0)  # an example is far out, and may be refused
        check_inputs(options.precheck, [plain, *examples], launcher)
    fresh = fresh_record(options, master, place)
    earlier = record.read(sweep_dir)
    sampled = [name for name, run in earlier.runs.items() if run.params] if earlier else []
    record.refuse_other_values(earlier, fresh, sampled)
    with record.locked(sweep_dir), raising_sigterm():
        optuna = open_study(options, place)
        enqueue(search, place, optuna, first)
        trials = optuna.get_trials(deepcopy=False)
        count = count_missing(search, trials) + len(in_state(trials, "RUNNING"))
        write_whole(sweep_dir / "multirun.yaml", OmegaConf.to_yaml(master))
        runner = open_runner(launcher, options.n_jobs > 1, count)
        sweep = record.begin(sweep_dir, fresh)
        leases, multi = Leases(place.alone, str(sweep_dir)), not is_basic(launcher)
        # Jobs of other machines read others.
        inputs = {} if multi else inputs_of(jobs)
        study = Study(options, source, space, place, optuna, runner, sweep, leases, multi, inputs)
        return carry_out(study)


def first_points(search: Search) -> list[Point]:
    """hydra.sweeper.warm_start as values; one on the command line has to fit to the rest of it."""
    key, overrides = "hydra.sweeper.warm_start", hydra_overrides(search.source.master)
    strict = any(override.startswith(f"{key}=") for override in overrides)
    loader = search.source.context.config_loader
    return [
        first_point(loader, search.space, f"{key}[{n}]={text!r}", text, strict)
        for n, text in enumerate(search.options.warm_start)
    ]


def fresh_record(options: OptunaAsyncConf, master: DictConfig, place: Place) -> Sweep:
    """The record of this command, without its runs."""
    sweep = record.fresh("study", master, options)
    sweep.study = {
        "name": place.name,
        "storage": str(place.storage),
        "n_trials": options.n_trials,
        "sampler": options.sampler_class,
        "pruner": options.pruner_class,
        "best": [],
    }
    return sweep


def check_jobs(search: Search) -> list[Job]:
    """Compose jobs that together have every key; SweepError where one cannot be, or shares a folder
    with another."""
    points = [search.space.job(values) for values in search.space.examples()]
    jobs = [named_job(search, point, number) for number, point in enumerate(points)]
    subdir = named_job(search, points[0], len(jobs)).subdir
    if subdir == jobs[0].subdir:
        raise SweepError(
            f"all trials would write to {search.source.master.hydra.sweep.dir}/{subdir}; put "
            "${hydra.job.num} into hydra.sweep.subdir, or name its key in hydra.sweeper.name_key"
        )
    return jobs


def choices(search: Search) -> list[Job]:
    """Jobs that together have every choice; one that cannot be composed is for its trial."""
    jobs = list[Job]()
    for values in search.space.choices():
        with suppress(SweepError):
            jobs.append(named_job(search, search.space.job(values), len(jobs)))
    return jobs


def carry_out(study: Study) -> list[JobReturn]:
    """Run what is missing; afterwards results, the table and the report."""
    catch_up(study)
    study.write()
    with stopping(study.interrupt, study.table):
        loop(study)
    study.runner.close()
    catch_up(study)
    options, failed, trials = study.options, study.failed, study.trials
    elsewhere = [t for t in in_state(trials, "RUNNING") if study.leases.state(t) == "live"]
    early = study.early
    study.sweep.state = "interrupted" if early else "complete"
    study.write()
    write_results(study.stored, study.place.sweep_dir)
    print(study.table(), flush=True)
    if elsewhere:
        numbers = ", ".join(f"#{trial.number}" for trial in elsewhere)
        log.info(f"\t{numbers} run elsewhere; the same command shows what they return")
    report(options.report, study.source.master, study.place.sweep_dir)
    if early:
        raise SweepError(early)
    if not elsewhere and not best_trials(study.stored):
        why = failed[0].user_attrs.get(ERROR) if failed else "all were pruned"
        raise SweepError(f"none of {len(trials)} trials completed; the first: {why}")
    return [study.returned[number] for number in sorted(study.returned)]


def catch_up(study: Study) -> None:
    """Bring sweep.json to where the storage is: a kill may have come between the two, and what it
    says may be of an earlier study in the same folder."""
    begun = [trial for trial in study.trials if {RUN, OVERRIDES} <= trial.user_attrs.keys()]
    trials = [trial for trial in begun if TWIN not in trial.user_attrs]
    own = {trial.user_attrs[RUN] for trial in trials}
    study.sweep.runs = {
        name: run for name, run in study.sweep.runs.items() if name in own or not run.params
    }
    for trial in trials:
        run = study.sweep.runs.get(trial.user_attrs[RUN])
        if run is None or run.overrides != list(trial.user_attrs[OVERRIDES]):
            try:
                job = compose(study.source, list(trial.user_attrs[OVERRIDES]), trial.number)
            except SweepError as error:
                if study.place.alone:
                    raise
                log.warning(f"\t#{trial.number} of another process is left out: {error}")
                continue
            run = run_of(study, job, trial.params)
        outcome = stored_outcome(trial)
        if (run.status, run.value) != (outcome.status, outcome.value):
            run.end(outcome)
        if outcome.status == "planned" and study.leases.state(trial) == "live":
            run.status = "running"
        study.sweep.runs[run.name] = run
