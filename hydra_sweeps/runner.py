"""How a sweeper keeps jobs in flight: one interface over processes here, Modal and launch()."""

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol, cast

from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher

from hydra_sweeps.errors import JobFailed
from hydra_sweeps.jobs import Ends, Job, Reports, failure, show_failure
from hydra_sweeps.records import reason

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
log = logging.getLogger(__name__)


class Runner(Protocol):
    """Jobs in flight. A job is known by its number; a number is started once."""

    def start(self, number: int, overrides: Sequence[str]) -> None:
        """Start a job; whatever is wrong with it alone becomes a failed end."""

    def ended(self, seconds: float) -> Ends:
        """Wait at most `seconds` for an end; returns all ends since the last call."""

    def reports(self) -> Reports:
        """The new JSON lines of the jobs' progress files since the last call, by number.

        The last lines of a job may come when `ended` has given its end.
        A number that continues an earlier job reports that one's lines again.
        """

    def stop(self, number: int) -> None:
        """Ask a job to end; its end follows through `ended`."""

    def close(self) -> None:
        """End what still runs. May be called again."""


def is_basic(launcher: Launcher) -> bool:
    """Whether it is Hydra's own, which runs one job after the other in this process.

    By name: Hydra's scan executes plugin modules again, and so makes their classes again.
    """
    kind = type(launcher)
    return f"{kind.__module__}.{kind.__qualname__}" == BASIC


def open_runner(launcher: Launcher, several: bool, total: int = 1) -> Runner:
    """What keeps the jobs of a launcher in flight.

    Args:
        launcher: after its `setup`.
        several: more than one job at a time, so that each needs a file for what it prints.
        total: how many jobs are going to be started, for estimates.
    """
    if session := getattr(launcher, "session", None):
        return cast(Runner, session(total))
    if is_basic(launcher):
        from hydra_sweeps.processes import Processes

        return Processes(launcher, several)
    return Batches(launcher)


def begin(runner: Runner, job: Job) -> None:
    """Start a job that is composed, which processes of this machine take as it is."""
    from hydra_sweeps.processes import Processes

    if isinstance(runner, Processes):
        runner.start(job.number, job.overrides, job)
    else:
        runner.start(job.number, job.overrides)


class Batches:
    """A launcher that only knows `launch`: the jobs that were started go out together."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.waiting: dict[int, list[str]] = {}
        self.warned = False

    def start(self, number: int, overrides: Sequence[str]) -> None:
        """Wait for the next `ended`."""
        self.waiting[number] = list(overrides)

    def ended(self, seconds: float) -> Ends:
        """Launch what waits; returns when the slowest of them is done, whatever `seconds` says."""
        if not self.warned and len(self.waiting) > 1:
            self.warned = True
            name = type(self.launcher).__name__
            log.info(f"\t{name} runs whole batches: each waits for the slowest of its jobs")
        ends = []
        for group in neighbours(sorted(self.waiting)):
            batch = [self.waiting.pop(number) for number in group]
            ends += list(zip(group, launch(self.launcher, batch, group[0]), strict=True))
        return ends

    def reports(self) -> Reports:
        """Nothing: no job runs between two calls."""
        return {}

    def stop(self, number: int) -> None:
        """Forget a job that waits."""
        self.waiting.pop(number, None)

    def close(self) -> None:
        """Forget all jobs that wait."""
        self.waiting.clear()


def launch(launcher: Launcher, batch: list[list[str]], first: int) -> list[JobReturn]:
    """One call of a launcher; where it breaks, each of its jobs has failed.

    Args:
        launcher: after its `setup`.
        batch: overrides of each job.
        first: the number of the first job.

    Raises:
        CompactHydraException: the launcher refuses: so it would refuse all others.
    """
    try:
        returns = launcher.launch(batch, initial_job_idx=first)
    except CompactHydraException:
        raise
    except Exception as error:
        log.error(f"the launcher failed: {reason(error)}", exc_info=error)
        return [failure(overrides, error) for overrides in batch]
    lost = JobFailed("the launcher returned nothing for this job")
    ends = [end or failure(job, lost) for job, end in zip(batch, returns, strict=True)]
    for end in ends:
        show_failure(end)
    return ends


def neighbours(numbers: Sequence[int]) -> list[list[int]]:
    """Runs of consecutive numbers: `launch` knows its first number only."""
    groups = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    return [[number for _, number in group] for _, group in groups]
