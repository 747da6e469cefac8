"""Ask, run, report, prune, tell, with n_jobs in flight, until the study has its trials.

The law of points: one that has been measured in this study, or is being measured, is not trained
again; its result counts for every trial that asks for it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.utils import get_method

from hydra_sweeps.command import refuse_other_choices
from hydra_sweeps.errors import SweepError
from hydra_sweeps.jobs import compose
from hydra_sweeps.overrides import key_of
from hydra_sweeps.record import Outcome
from hydra_sweeps.records import reason
from hydra_sweeps.runner import begin
from hydra_sweeps.study.leases import ENDED, LEASE, SETTLED
from hydra_sweeps.study.state import RunningTrial, Study, named_job, point_of, run_of
from hydra_sweeps.study.trials import (
    OVERRIDES,
    POINT,
    RUN,
    STOPPED,
    TWIN,
    in_state,
    intermediate,
    outcome_of,
    quiet_optuna,
    stored_outcome,
    tell,
    total_of,
)
from hydra_sweeps.table import shown

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between looks at progress files."""


def loop(study: Study) -> None:
    """Keep n_jobs in flight."""
    total, told = total_of(study), set[int]()
    while True:
        renew(study)
        unclear = fill(study, total)
        if not study.running and not study.waiting and not unclear:
            break
        for trial in unclear:
            if trial.number not in told:
                told.add(trial.number)
                host = (trial.user_attrs.get(LEASE) or {}).get("host", "another process")
                log.info(f"\t#{trial.number} is of {host}: {ENDED:.0f} s for a sign of life")
        ended = study.runner.ended(POLL)
        for number, lines in study.runner.reports().items():
            if number in study.running:
                shared(study, number, partial(follow, study, study.running[number], lines))
        for number, returned in ended:
            end(study, number, returned)
        if not study.running:
            time.sleep(POLL if study.waiting or unclear else 0)
        settle(study)
    trials = study.trials
    if len(trials) < total and study.exhausted:
        print(f"all {len(study.points)} points are measured: {len(trials)} trials, not {total}")


def renew(study: Study) -> None:
    """Show the others that this process lives; let go of trials that they have taken."""
    if not study.leases.due():
        return
    stored = study.trials
    waiting = {number: trial for number, (trial, _) in study.waiting.items()}
    mine = waiting | {number: running.trial for number, running in study.running.items()}
    for number, trial in mine.items():
        if stored[number].state.name == "RUNNING" and study.leases.is_own(stored[number]):
            shared(study, number, partial(study.leases.write, trial))
        else:
            let_go(study, number)


def shared(study: Study, number: int, write: Callable[[], None]) -> bool:
    """Write to a trial; where another process has ended it, it is let go."""
    try:
        write()
    except (RuntimeError, ValueError):
        if study.leases.alone:
            raise
        let_go(study, number)
    return number in study.running


def let_go(study: Study, number: int) -> None:
    """Another process runs a trial now."""
    log.warning(f"\t#{number} was taken over by another process; its job here ends")
    study.waiting.pop(number, None)
    if running := study.running.pop(number, None):
        running.run.interrupt()
        study.runner.stop(number)
        study.write()


def fill(study: Study, total: int) -> list[Any]:
    """Start trials: those of dead processes first, then new ones.

    Returns:
        Trials of other machines of which it is not clear yet whether they run.
    """
    unclear = list[Any]()
    while len(study.running) < study.options.n_jobs and not study.early:
        trials = study.trials
        mine = {*study.running, *study.waiting}
        others = [t for t in in_state(trials, "RUNNING") if t.number not in mine]
        states = {trial.number: study.leases.state(trial) for trial in others}
        gone = [trial for trial in others if states[trial.number] == "gone"]
        unclear = [trial for trial in others if states[trial.number] == "unclear"]
        ended = len(in_state(trials, "COMPLETE", "PRUNED", "FAIL"))
        busy = ended + len(mine) + len(others) - len(gone) - len(unclear)
        if busy >= total:
            return []
        if gone and busy + len(unclear) < total:
            resume(study, gone[0])
            continue
        full = busy + len(unclear) + len(gone) >= total
        if full or len(mine) >= study.options.n_jobs or study.exhausted:
            return unclear
        ask(study, total)
    return unclear


def ask(study: Study, total: int) -> None:
    """Start a new trial; where another process was faster with the last one, leave it."""
    trial = study.optuna.ask()
    study.leases.write(trial)
    if not study.leases.alone:
        trials = study.trials
        earlier = trials[: trial.number]
        if len(earlier) - len(in_state(earlier, "WAITING")) >= total:
            trial.set_user_attr(LEASE, {})
            return
        # Out of the queue two may have taken it at once: Optuna looks, and writes then.
        if "fixed_params" in trials[trial.number].system_attrs and not settled(study, trial):
            return
    start(study, trial)


def settled(study: Study, trial: Any) -> bool:
    """Whether a trial that this process has signed is still its own when others have signed."""
    time.sleep(SETTLED)
    return study.leases.is_own(study.trials[trial.number])


def resume(study: Study, frozen: Any) -> None:
    """Continue a trial that an earlier process began."""
    trial = quiet_optuna().trial.Trial(study.optuna, frozen._trial_id)  # keeps what it has
    stored = study.trials[trial.number]  # that process may have ended it, another have it by now
    if stored.state != frozen.state or stored.user_attrs.get(LEASE) != frozen.user_attrs.get(LEASE):
        return
    study.leases.write(trial)
    if not study.leases.alone:
        if not settled(study, trial):
            return
        log.info(f"\t#{trial.number} is continued here: its process is gone")
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
            job = named_job(study, suggested(study, trial), number)
            refuse_other_choices(source.master, [job], [], ["launcher"])
        run = run_of(study, job, trial.params)
    except SweepError as error:
        tell(study.optuna, trial, Outcome("failed", None, reason(error)))
        log.warning(f"\t#{number} failed: {error}")
        return
    point = point_of(study.options, job)
    trial.set_user_attr(POINT, point)
    if twin := twin_of(study, trial, point):
        if twin.state.name == "RUNNING":
            study.waiting[number] = (trial, twin.number)
        else:
            reuse(study, trial, twin)
        return
    trial.set_user_attr(RUN, run.name)
    trial.set_user_attr(OVERRIDES, job.overrides)
    run.resolved = job.resolved  # here: elsewhere the environment may be another one
    run.begin()
    study.sweep.runs[run.name] = run
    study.write()
    study.running[number] = RunningTrial(trial, run, time.monotonic())
    begin(study.runner, job)


def twin_of(study: Study, trial: Any, point: str) -> Any:
    """Another trial of the same point: one that has a result, or one that runs and began before.

    An earlier trial goes first where neither has a job yet: of two processes one waits.
    """
    trials = [t for t in study.trials if t.user_attrs.get(POINT) == point]
    known = in_state(trials, "COMPLETE", "PRUNED")
    own = RUN not in trial.user_attrs, trial.number
    runs = [t for t in trials if (RUN not in t.user_attrs, t.number) < own and is_running(study, t)]
    return next(iter([*known, *runs]), None)


def is_running(study: Study, trial: Any) -> bool:
    """Whether some process runs a trial."""
    here = trial.number in study.running or trial.number in study.waiting
    return trial.state.name == "RUNNING" and (here or study.leases.state(trial) != "gone")


def settle(study: Study) -> None:
    """Trials that wait for the result of their point: it may be there, or not come."""
    if not study.waiting:
        return
    running = {trial.number for trial in study.trials if is_running(study, trial)}
    for number, (trial, twin) in list(study.waiting.items()):
        if twin not in running:
            del study.waiting[number]
            start(study, trial)


def reuse(study: Study, trial: Any, twin: Any) -> None:
    """End a trial with the result that its point has."""
    trial.set_user_attr(TWIN, twin.number)  # first: the run is the other trial's
    for key in (RUN, OVERRIDES):
        trial.set_user_attr(key, twin.user_attrs[key])
    outcome = stored_outcome(twin)
    tell(study.optuna, trial, outcome)
    value = shown(outcome.value)
    log.info(f"\t#{trial.number} {outcome.status}: {value}, as #{twin.number}, the same point")


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
    return space.job(values)


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
    if number not in study.running:  # it was let go
        return
    if not study.leases.alone:
        stored = study.trials[number]
        if stored.state.name != "RUNNING" or not study.leases.is_own(stored):
            let_go(study, number)
            return
    running = study.running[number]
    run, trial = running.run, running.trial
    outcome = outcome_of(returned, len(study.options.names))
    if running.stopped and outcome.status == "failed":
        outcome = Outcome("pruned", None, f"pruned at step {trial.user_attrs.get(STOPPED)}")
    if not shared(study, number, partial(tell, study.optuna, trial, outcome)):
        return
    del study.running[number]
    run.end(outcome)
    run.seconds = round(time.monotonic() - running.started, 3)
    study.returned[number] = returned
    study.write()
    result = shown(run.value) if run.status == "completed" else run.error
    ended = len(in_state(study.trials, "COMPLETE", "PRUNED", "FAIL"))
    log.info(f"\t#{number} {run.status}: {result} ({ended} of {study.options.n_trials})")
