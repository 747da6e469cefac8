"""One sweep: which runs there are, what is done, the rest run, a table, a report."""

import copy
import importlib
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from hydra.core.utils import JobReturn, configure_log, filter_overrides
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from hydra_sweeps import jobs as _jobs
from hydra_sweeps import record, table
from hydra_sweeps.errors import SweepError
from hydra_sweeps.grid import names as _names
from hydra_sweeps.grid import overrides as _grid
from hydra_sweeps.grid.config import ExperimentSweeperConf
from hydra_sweeps.jobs import Job, Source
from hydra_sweeps.processes import show
from hydra_sweeps.record import Run, Sweep
from hydra_sweeps.runner import JobFailed, failure, is_basic, neighbours, open_runner

if TYPE_CHECKING:
    from hydra_plugins.experiment_sweeper.sweeper import ExperimentSweeper

log = logging.getLogger(__name__)


class Terminated(BaseException):
    """SIGTERM, as an exception that no job catches."""


@dataclass
class Grid:
    """A sweep while it runs."""

    options: ExperimentSweeperConf
    launcher: Launcher
    master: DictConfig
    sweep_dir: Path
    sweep: Sweep
    jobs: list[Job]
    runs: dict[int, Run] = field(default_factory=dict)
    """By job number."""
    done: set[int] = field(default_factory=set)
    """What an earlier command finished."""
    returned: dict[int, JobReturn] = field(default_factory=dict)

    @property
    def pending(self) -> list[Job]:
        """What is to be launched."""
        return [job for job in self.jobs if job.number not in self.done]

    def write(self) -> None:
        """Write sweep.json."""
        record.write(self.sweep_dir, self.sweep)

    def begin(self, jobs: Sequence[Job]) -> None:
        """These are about to run."""
        for job in jobs:
            run = self.runs[job.number]
            run.status, run.started = "running", record.now()
        self.write()

    def end(self, job: Job, returned: JobReturn, seconds: float | None) -> None:
        """A job has ended after `seconds`, if that is known."""
        run = self.runs[job.number]
        run.status, run.value, run.error = record.outcome(returned)
        run.seconds = None if seconds is None else round(seconds, 3)
        self.returned[job.number] = returned
        self.write()


def sweep(sweeper: "ExperimentSweeper", arguments: list[str]) -> list[Sequence[JobReturn]]:
    """What `ExperimentSweeper.sweep` does."""
    options, master, launcher = sweeper.options, sweeper.config, sweeper.launcher
    context = sweeper.hydra_context
    assert master is not None and launcher is not None and context is not None
    check(options, launcher, master)
    points = _grid.grid(context.config_loader, arguments, options.params or {}, options.cases)
    jobs = _names.named_jobs(Source(master, context), points, options)
    sweep_dir = Path(str(master.hydra.sweep.dir)).absolute()
    grid = Grid(options, launcher, master, sweep_dir, fresh(options, master), jobs)
    if options.dry_run:
        earlier = record.read(sweep_dir)
        done = finished(grid, earlier) if earlier else {}
        print(table.plan(jobs, done, Path(str(master.hydra.sweep.dir))), flush=True)
        return []
    if any(OmegaConf.select(master, f"hydra.launcher.{name}") for name in ("dry_run", "setup")):
        return [launcher.launch([job.overrides for job in jobs], initial_job_idx=0)]
    with record.locked(sweep_dir), raising_sigterm():
        return carry_out(grid)


def check(options: ExperimentSweeperConf, launcher: Launcher, master: DictConfig) -> None:
    """Refuse options that do not fit; names them."""
    for name in ("max_batch_size", "n_jobs", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise SweepError(f"hydra.sweeper.{name}={value} must be at least 1")
    if options.if_done not in ("skip", "rerun"):
        raise SweepError(f"hydra.sweeper.if_done={options.if_done}: choose one of: skip, rerun")
    if options.repeats > 1 and not options.repeat_key:
        raise SweepError(
            f"hydra.sweeper.repeats={options.repeats} needs hydra.sweeper.repeat_key, e.g. seed"
        )
    if options.n_jobs is not None and not is_basic(launcher):
        name = master.hydra.runtime.choices.get("hydra/launcher")
        key = "hydra.launcher.max_parallel"
        own = f", {key}" if OmegaConf.select(master, key, default=0) != 0 else ""
        raise SweepError(
            f"hydra.sweeper.n_jobs={options.n_jobs} is for hydra/launcher=basic; "
            f"hydra/launcher={name} has a limit of its own{own}"
        )


def fresh(options: ExperimentSweeperConf, master: DictConfig) -> Sweep:
    """The record of this command, without its runs."""
    names = list(options.names)
    said = options.direction
    directions = [str(said)] * len(names) if isinstance(said, str) else [str(one) for one in said]
    if len(directions) != len(names) or {*directions} - {"maximize", "minimize"}:
        raise SweepError(
            f"hydra.sweeper.direction={said} must be maximize or minimize, or a list with one of "
            f"them for each of hydra.sweeper.names={names}"
        )
    objectives = [
        {"name": name, "direction": direction}
        for name, direction in zip(names, directions, strict=True)
    ]
    script = str(master.hydra.job.name)
    return Sweep("grid", script, record.command_line(), os.getcwd(), objectives)


def finished(grid: Grid, earlier: Sweep) -> dict[int, Run]:
    """The records of the jobs that need not run again, by number."""
    if grid.options.if_done != "skip" or hasattr(grid.launcher, "session"):
        return {}
    found = {}
    for job in grid.jobs:
        run = earlier.run(_jobs.subdir(job))
        if run is None or run.status != "completed":
            continue
        evidence = _jobs.evidence(job)
        there = evidence is None or evidence.exists()
        if there and run.digest == _jobs.digest(job, grid.options.ignore):
            found[job.number] = run
    return found


def carry_out(grid: Grid) -> list[Sequence[JobReturn]]:
    """Run what is not done; afterwards the table, the report, and an error if runs failed."""
    OmegaConf.save(grid.master, grid.sweep_dir / "multirun.yaml")
    grid.sweep = record.begin(grid.sweep_dir, grid.sweep)
    set_up(grid, finished(grid, grid.sweep))
    grid.write()
    try:
        run_pending(grid)
        grid.sweep.state = "complete"
    except (KeyboardInterrupt, Terminated) as stop:
        interrupted(grid)
        print(table.table(grid.sweep, list(grid.runs.values())), flush=True)
        print("interrupted; the same command continues", file=sys.stderr, flush=True)
        raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else 143) from None
    except SystemExit:  # a launcher's: its jobs go on without this process
        raise
    except BaseException:
        interrupted(grid)
        raise
    grid.write()
    print(table.table(grid.sweep, list(grid.runs.values())), flush=True)
    report(grid.options.report, grid.master, grid.sweep_dir)
    failed = [run for run in grid.runs.values() if run.status == "failed"]
    if failed:
        raise SweepError(f"{len(failed)} of {len(grid.jobs)} runs failed; why: see the table")
    return batches(grid, [job for job in grid.jobs if job.number in grid.returned])


def set_up(grid: Grid, done: Mapping[int, Run]) -> None:
    """Put the runs of this command into the record."""
    hydra = None
    if not is_basic(grid.launcher):
        hydra = needed_of_hydra(grid)
    for job in grid.jobs:
        run = Run(job.number, _jobs.subdir(job), job.overrides)
        if job.number in done:
            run = done[job.number]
            run.number, run.overrides = job.number, job.overrides
            grid.done.add(job.number)
            said = " ".join(filter_overrides(job.overrides))
            log.info(f"\t#{job.number} : {said} (done: {table.shown(run.value)})")
        run.command = record.run_command(job.overrides, hydra)
        run.digest = _jobs.digest(job, grid.options.ignore)
        run.record = _jobs.record(job)
        grid.runs[job.number] = run
        grid.sweep.put(run)


def needed_of_hydra(grid: Grid) -> list[str]:
    """The overrides of Hydra's node without which a run alone would be another one."""
    kept = kept_of_hydra(grid.master)
    if grid.options.repeats > 1:
        kept.append("hydra.sweeper.repeats=1")
    if grid.options.cases:
        kept.append("hydra.sweeper.cases=[]")
    return kept


def kept_of_hydra(master: DictConfig) -> list[str]:
    """The command line's overrides that say where a job runs and writes."""
    kinds = ("hydra/launcher=", "hydra.launcher.", "hydra.sweep.")
    return [each for each in asked_of_hydra(master) if each.startswith(kinds)]


def asked_of_hydra(master: DictConfig) -> list[str]:
    """The command line's overrides of Hydra's node, interpolations as they were written."""
    return cast(list[str], OmegaConf.to_container(master.hydra.overrides.hydra))


def run_pending(grid: Grid) -> None:
    """Launch what is not done, the way the launcher needs."""
    if grid.options.n_jobs is not None:
        run_processes(grid, grid.options.n_jobs)
    elif is_basic(grid.launcher):
        for job in grid.pending:
            run_here(grid, job)
    else:
        for batch in batches_to_launch(grid):
            run_batch(grid, batch)


def run_processes(grid: Grid, n_jobs: int) -> None:
    """Keep `n_jobs` processes busy."""
    runner = open_runner(grid.launcher, n_jobs > 1)
    waiting, running = deque(grid.pending), dict[int, tuple[Job, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < n_jobs:
                job = waiting.popleft()
                grid.begin([job])
                running[job.number] = job, time.monotonic()
                runner.start(job.number, job.overrides)
            for number, returned in runner.ended(1.0):
                job, started = running.pop(number)
                grid.end(job, returned, time.monotonic() - started)
    finally:
        runner.close()


def run_here(grid: Grid, job: Job) -> None:
    """One job in this process; what it raises, SystemExit too, is its own failure."""
    grid.begin([job])
    started = time.monotonic()
    try:
        [returned] = grid.launcher.launch([job.overrides], initial_job_idx=job.number)
    except SystemExit as stop:
        returned = failure(job.overrides, JobFailed(f"the job called sys.exit({stop.code!r})"))
    except Exception as error:
        returned = failure(job.overrides, error)
    configure_log(grid.master.hydra.hydra_logging, grid.master.hydra.verbose)
    show_failure(returned)
    grid.end(job, returned, time.monotonic() - started)


def run_batch(grid: Grid, batch: list[Job]) -> None:
    """One call of the launcher; where it breaks, its jobs have failed."""
    grid.begin(batch)
    overrides = [job.overrides for job in batch]
    try:
        returns = list(grid.launcher.launch(overrides, initial_job_idx=batch[0].number))
    except CompactHydraException:  # it refuses: so it would refuse the others
        raise
    except Exception as error:
        log.error(f"the launcher failed: {record.one_line(error)}", exc_info=error)
        returns = [failure(each, error) for each in overrides]
    else:
        for returned in returns:
            show_failure(returned)
    for job, returned in zip(batch, returns, strict=True):
        nothing = JobFailed("the launcher returned nothing for this job")
        grid.end(job, returned or failure(job.overrides, nothing), None)


def show_failure(returned: JobReturn | None) -> None:
    """Print on standard error why a job failed; Hydra's launchers do not."""
    error = returned._return_value if returned else None
    if isinstance(error, BaseException):
        show(error)


def batches_to_launch(grid: Grid) -> list[list[Job]]:
    """What is not done, in calls of the launcher.

    A launcher numbers the jobs of a call one after the other: only where no folder depends on that
    may jobs beside one that is done go together.
    """
    by_number = {job.number: job for job in grid.pending}
    groups = [list(by_number)]
    if grid.done and _jobs.depends_on_number(grid.jobs[0]):
        groups = neighbours(list(by_number))
    size = grid.options.max_batch_size or len(grid.jobs)
    return [
        [by_number[number] for number in group[at : at + size]]
        for group in groups
        for at in range(0, len(group), size)
    ]


def batches(grid: Grid, jobs: Sequence[Job]) -> list[Sequence[JobReturn]]:
    """What was returned, in the batches that were asked for."""
    size = grid.options.max_batch_size or max(len(jobs), 1)
    returned = [grid.returned[job.number] for job in jobs]
    return [returned[at : at + size] for at in range(0, len(returned), size)]


def interrupted(grid: Grid) -> None:
    """Nothing runs any more: what has not ended is planned."""
    grid.sweep.state = "interrupted"
    for run in grid.runs.values():
        if run.status == "running":
            run.status, run.started, run.seconds = "planned", None, None
    grid.write()


@contextmanager
def raising_sigterm() -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does, and children that are forked here as ever."""
    here = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == here:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report(dotted: str | None, master: DictConfig, sweep_dir: Path) -> None:
    """Call hydra.sweeper.report; its failure is a warning."""
    if not dotted:
        return
    config = copy.deepcopy(master)
    OmegaConf.set_readonly(config, False)
    with read_write(config), open_dict(config):
        del config["hydra"]
    try:
        module, _, name = dotted.rpartition(".")
        call: Any = getattr(importlib.import_module(module), name)
        call(config, sweep_dir)
    except (Exception, SystemExit) as error:
        again = f"python report.py sweep={sweep_dir}"
        log.warning(f"no report ({record.one_line(error)}); to try again: {again}")
