"""One grid: which runs there are, what is done, the rest run, a table, a report."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from hydra_sweeps import record
from hydra_sweeps.command import (
    raising_sigterm,
    refuse_other_choices,
    report,
    run_command,
    run_overrides,
    stopping,
)
from hydra_sweeps.errors import JobFailed, SweepError
from hydra_sweeps.grid.config import ExperimentSweeperConf
from hydra_sweeps.grid.names import named_jobs
from hydra_sweeps.grid.points import points
from hydra_sweeps.jobs import (
    Job,
    Source,
    check_environment,
    check_inputs,
    failure,
    resolved_sweep_dir,
    show_failure,
    surrounded,
)
from hydra_sweeps.processes import check_value
from hydra_sweeps.reading import Inputs, changed, inputs_of, read_once
from hydra_sweeps.record import Run, Sweep
from hydra_sweeps.records import write_whole
from hydra_sweeps.runner import begin, is_basic, launch, neighbours, open_runner
from hydra_sweeps.table import plan, shown, table

log = logging.getLogger(__name__)


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
    inputs: Inputs = field(default_factory=dict)
    """As they were when the jobs were told apart from what is done."""
    returned: dict[int, JobReturn] = field(default_factory=dict)

    @property
    def pending(self) -> list[Job]:
        """What has not completed."""
        return [job for job in self.jobs if self.runs[job.number].status != "completed"]

    def table(self) -> str:
        """What is printed at the end."""
        return table(self.sweep, list(self.runs.values()), self.options.name_key)

    def write(self) -> None:
        """Write sweep.json."""
        record.write(self.sweep_dir, self.sweep)

    def begin(self, jobs: Sequence[Job]) -> None:
        """These are about to run."""
        for job in jobs:
            self.runs[job.number].begin()
        self.write()

    def end(self, number: int, returned: JobReturn, started: float | None = None) -> None:
        """A job has ended; `started` by the monotonic clock, where that is known."""
        run = self.runs[number]
        run.end(record.outcome(returned))
        run.seconds = None if started is None else round(time.monotonic() - started, 3)
        self.returned[number] = returned
        self.write()

    def interrupt(self) -> None:
        """Nothing runs any more: what has not ended is planned."""
        self.sweep.state = "interrupted"
        for run in self.runs.values():
            if run.status == "running":
                run.interrupt()
        self.write()


def run_grid(
    options: ExperimentSweeperConf, source: Source, launcher: Launcher, arguments: Sequence[str]
) -> list[Sequence[JobReturn]]:
    """What `ExperimentSweeper.sweep` does; `launcher` is set up, `arguments` as Hydra got them."""
    master = source.master
    source.context.config_loader = loader = read_once(source.context.config_loader)
    check(options, launcher)
    sweep_dir = resolved_sweep_dir(master)
    choices = points(loader, arguments, options.params or {}, options.cases)
    jobs = chosen(named_jobs(source, choices, options), options.only)
    refuse_other_choices(master, jobs, arguments)
    check_environment(jobs, launcher, options.ignore)
    folder = sweep_dir.absolute()
    sweep = record.fresh("grid", master, options)
    grid = Grid(options, launcher, master, folder, sweep, jobs)
    earlier = record.read(folder)
    record.refuse_other_values(earlier, grid.sweep, {job.subdir for job in jobs})
    done = finished(grid, earlier)
    if options.dry_run:
        print(plan(jobs, done, sweep_dir), flush=True)
        return []
    if any(OmegaConf.select(master, f"hydra.launcher.{name}") for name in ("dry_run", "setup")):
        return [launcher.launch([job.overrides for job in jobs], initial_job_idx=0)]
    check_inputs(options.precheck, [job for job in jobs if job.number not in done], launcher)
    with record.locked(folder), raising_sigterm():
        return carry_out(grid, source)


def chosen(jobs: list[Job], patterns: Sequence[str]) -> list[Job]:
    """The jobs whose names fit one of hydra.sweeper.only, numbered anew; all without patterns."""
    if not patterns:
        return jobs
    names = ", ".join(job.subdir for job in jobs[:12])
    if jobs[0].depends_on_number():
        raise SweepError("hydra.sweeper.only needs runs with names; hydra.sweep.subdir is a number")
    jobs = [job for job in jobs if any(fnmatchcase(job.subdir, pattern) for pattern in patterns)]
    if not jobs:
        raise SweepError(f"no run fits hydra.sweeper.only={[*patterns]}; there are: {names}")
    for number, job in enumerate(jobs):
        job.renumber(number)
    return jobs


def check(options: ExperimentSweeperConf, launcher: Launcher) -> None:
    """Refuse options that do not fit; names them."""
    options.check_counts("max_batch_size", "n_jobs", "repeats")
    if options.if_done not in ("skip", "rerun"):
        raise SweepError(f"hydra.sweeper.if_done={options.if_done}: choose one of: skip, rerun")
    if options.repeats > 1 and not options.repeat_key:
        raise SweepError(
            f"hydra.sweeper.repeats={options.repeats} needs hydra.sweeper.repeat_key, e.g. seed"
        )
    if options.n_jobs is not None and not is_basic(launcher):
        raise SweepError(
            f"hydra.sweeper.n_jobs={options.n_jobs} is for hydra/launcher=basic; other launchers "
            "have limits of their own, such as hydra.launcher.max_parallel"
        )


def finished(grid: Grid, earlier: Sweep | None) -> dict[int, Run]:
    """The records of the jobs that need not run again, by number."""
    if earlier is None or earlier.names != grid.sweep.names:
        return {}
    if grid.options.if_done != "skip" or hasattr(grid.launcher, "session"):
        return {}
    done = {}
    for job in grid.jobs:
        run = earlier.runs.get(job.subdir)
        if run is None or run.status != "completed":
            continue
        evidence = job.value("hydra.sweeper.exists")
        exists = not evidence or Path(str(evidence)).exists()
        if exists and run.digest == job.digest(grid.options.ignore):
            done[job.number] = run
    return done


def carry_out(grid: Grid, source: Source) -> list[Sequence[JobReturn]]:
    """Run what is not done; afterwards the table, the report, and an error if runs failed."""
    write_whole(grid.sweep_dir / "multirun.yaml", OmegaConf.to_yaml(grid.master))
    done = finished(grid, record.read(grid.sweep_dir))
    grid.sweep = record.begin(grid.sweep_dir, grid.sweep)
    set_up(grid, source, done)
    grid.write()
    around = grid.options.around, grid.pending, grid.sweep_dir, grid.options.n_jobs
    with stopping(grid.interrupt, grid.table), surrounded(*around):
        run_pending(grid)
    grid.sweep.state = "complete"
    grid.write()
    print(grid.table(), flush=True)
    report(grid.options.report, grid.master, grid.sweep_dir)
    failed = [run for run in grid.runs.values() if run.status == "failed"]
    if failed:
        raise SweepError(f"{len(failed)} of {len(grid.jobs)} runs failed; why: see the table")
    returned = [grid.returned[number] for number in sorted(grid.returned)]
    return [*chunks(returned, grid.options.max_batch_size)]


def set_up(grid: Grid, source: Source, done: dict[int, Run]) -> None:
    """Put the runs of this command into the record, as they are where they are done."""
    multi = not is_basic(grid.launcher)
    hydra = run_overrides(source, grid.jobs[0].overrides, multi)
    if multi and grid.options.repeats > 1:
        hydra.append("hydra.sweeper.repeats=1")
    if multi and grid.options.cases:
        hydra.append("hydra.sweeper.cases=[]")
    if not multi:  # jobs of other machines read others
        grid.inputs = inputs_of(grid.jobs)
    for job in grid.jobs:
        run = done.get(job.number) or Run(job.number, job.subdir, [])
        run.number, run.overrides = job.number, job.overrides
        if job.number in done:
            overrides = " ".join(filter_overrides(job.overrides))
            log.info(f"\t#{job.number} : {overrides} (done: {shown(run.value)})")
        run.command = run_command(job.overrides, hydra, multi)
        run.digest = job.digest(grid.options.ignore)
        run.record, run.resolved = job.record, job.resolved
        grid.runs[job.number] = run
        grid.sweep.runs[run.name] = run


def run_pending(grid: Grid) -> None:
    """Launch what is not done, the way the launcher needs."""
    if grid.options.n_jobs is not None:
        run_processes(grid, grid.options.n_jobs)
    elif is_basic(grid.launcher):
        for job in grid.pending:
            if unchanged(grid, job):
                run_here(grid, job)
    else:
        for batch in batches(grid):
            grid.begin(batch)
            overrides = [job.overrides for job in batch]
            ends = launch(grid.launcher, overrides, batch[0].number)
            for job, returned in zip(batch, ends, strict=True):
                grid.end(job.number, returned)


def run_processes(grid: Grid, n_jobs: int) -> None:
    """Keep `n_jobs` processes busy."""
    runner = open_runner(grid.launcher, n_jobs > 1)
    waiting, started = deque(grid.pending), dict[int, float]()
    try:
        while waiting or started:
            while waiting and len(started) < n_jobs:
                job = waiting.popleft()
                if not unchanged(grid, job):
                    continue
                grid.begin([job])
                started[job.number] = time.monotonic()
                begin(runner, job)
            for number, returned in runner.ended(1.0):
                grid.end(number, returned, started.pop(number))
    finally:
        runner.close()


def unchanged(grid: Grid, job: Job) -> bool:
    """Whether the inputs of a job are what they were; it has failed otherwise."""
    own = job.inputs
    why = changed({path: before for path, before in grid.inputs.items() if path in own})
    if why:
        grid.end(job.number, failure(job.overrides, JobFailed(why)))
    return not why


def run_here(grid: Grid, job: Job) -> None:
    """One job in this process; what it raises, SystemExit too, is its own failure."""
    grid.begin([job])
    started = time.monotonic()
    try:
        [returned] = grid.launcher.launch([job.overrides], initial_job_idx=job.number)
        check_value(returned)
    except SystemExit as stop:
        returned = failure(job.overrides, JobFailed(f"the job called sys.exit({stop.code!r})"))
    except Exception as error:
        returned = failure(job.overrides, error)
    configure_log(grid.master.hydra.hydra_logging, grid.master.hydra.verbose)
    show_failure(returned)
    grid.end(job.number, returned, started)


def batches(grid: Grid) -> list[list[Job]]:
    """What is not done, in calls of the launcher.

    A launcher numbers the jobs of a call one after the other: only where no folder depends on that
    may jobs beside one that is done go together.
    """
    groups = [grid.pending]
    if len(grid.pending) < len(grid.jobs) and grid.jobs[0].depends_on_number():
        numbers = neighbours([job.number for job in grid.pending])
        groups = [[grid.jobs[number] for number in group] for group in numbers]
    return [batch for group in groups for batch in chunks(group, grid.options.max_batch_size)]


def chunks(items: list[Any], size: int | None) -> list[list[Any]]:
    """`size` of them at a time; None: all."""
    step = size or max(len(items), 1)
    return [items[start : start + step] for start in range(0, len(items), step)]
