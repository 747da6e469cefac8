"""Names of runs: made of the choices, the same on every start, never the same for two runs.

Two names are the same where one file system takes them for one: `a//b` and a/b, a and A. Names are
short enough for every file system, and lie in the sweep's folder.
"""

import hashlib
import logging
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hydra_sweeps.errors import SweepError
from hydra_sweeps.grid.config import ExperimentSweeperConf
from hydra_sweeps.jobs import Job, Source, compose, rename
from hydra_sweeps.overrides import bounded, key_of, quoted, safe, without

log = logging.getLogger(__name__)


@dataclass
class NamedJob:
    """A job and what its configuration calls it."""

    job: Job
    label: str
    """name_key's value; without name_key the folder's name."""
    is_first: bool
    """Of several repeats."""
    name: str
    """What it will be called."""


def named_jobs(
    source: Source, points: Sequence[Sequence[str]], options: ExperimentSweeperConf
) -> list[Job]:
    """Every run of the choices in `points`, composed, with a name of its own.

    Two that are the same in everything run once.

    Raises:
        SweepError: one cannot be composed, or two share a name that nothing tells apart.
    """
    runs = without_doubles(repeated(source, points, options))
    name_runs(runs, options)
    tell_apart(runs)
    jobs = []
    for number, run in enumerate(runs):
        if run.name != run.label:
            set_name(source, run, options)
        run.job.renumber(number)
        jobs.append(run.job)
    check_folders(jobs, source)
    return jobs


def repeated(
    source: Source, points: Sequence[Sequence[str]], options: ExperimentSweeperConf
) -> list[NamedJob]:
    """The jobs of all choices, each as often as asked for."""
    key, runs = options.repeat_key or "", list[NamedJob]()
    values = {tuple(text for text in point if key_of(text) == key) for point in points}
    if options.repeats > 1 and len(values) > 1:
        raise SweepError(
            f"{key} is swept and hydra.sweeper.repeats={options.repeats} counts it up; leave one "
            "of them out"
        )
    for overrides in points:
        jobs = [compose(source, overrides, len(runs))]
        if options.repeats > 1:
            start = jobs[0].required(key)
            if not isinstance(start, int) or isinstance(start, bool):
                raise SweepError(f"hydra.sweeper.repeat_key={key} is {start!r}, not an integer")
            rest = without(overrides, key)
            jobs = [
                compose(source, [*rest, f"{key}={start + repeat}"], len(runs) + repeat)
                for repeat in range(options.repeats)
            ]
        for repeat, job in enumerate(jobs):
            label = str(job.required(options.name_key)) if options.name_key else job.subdir
            first = options.repeats > 1 and repeat == 0
            runs.append(NamedJob(job, label, first, label))
    return runs


def without_doubles(runs: list[NamedJob]) -> list[NamedJob]:
    """All but those that repeat an earlier one, with the same name and configuration."""
    unique: dict[tuple[str, str], NamedJob] = {}
    for run in runs:
        first = unique.setdefault((run.label, run.job.digest()), run)
        if first is not run:
            log.info(f"\t{run.job.text} and {first.job.text} are the same run, made once")
    return list(unique.values())


def name_runs(runs: list[NamedJob], options: ExperimentSweeperConf) -> None:
    """Name every run: its label, and where labels meet what differs.

    The first of several repeats has the name that it would have alone.
    """
    groups: dict[str, list[NamedJob]] = defaultdict(list)
    for run in runs:
        groups[place(run.label)].append(run)
    for group in groups.values():
        choices = [choices_of(run.job) for run in group]
        keys = dict.fromkeys(key for choice in choices for key in choice)
        differ = [key for key in keys if len({choice.get(key) for choice in choices}) > 1]
        for run, choice in zip(group, choices, strict=True):
            first = {options.repeat_key} if run.is_first else set()
            said = [key for key in differ if key in choice and key not in first]
            run.name += "".join(f"_{short(key)}{safe(choice[key])}" for key in said)


def choices_of(job: Job) -> dict[str, str]:
    """A job's overrides by key."""
    return {key_of(override): override.partition("=")[2] for override in job.overrides}


def short(key: str) -> str:
    """The last part of a key: draft.ttt_length -> ttt_length."""
    return safe(re.split(r"[./]", key.partition("@")[0])[-1])


def tell_apart(runs: list[NamedJob]) -> None:
    """Where names still meet, add a hash of the overrides; cut names that are too long."""
    count = Counter(place(run.name) for run in runs)
    for run in runs:
        if count[place(run.name)] > 1:
            text = " ".join(sorted(run.job.overrides))
            run.name += f"_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
        run.name = bounded(run.name)


def place(name: str) -> str:
    """The same for all names that can be one folder."""
    return unicodedata.normalize("NFC", posixpath.normpath(name)).casefold()


def set_name(source: Source, run: NamedJob, options: ExperimentSweeperConf) -> None:
    """Give the job its name by an override; SweepError when no key names it."""
    key, job = options.name_key, run.job
    if key is None:
        raise SweepError(
            f"run {job.number} ({job.text}) would write to the folder of another run, "
            f"{job.subdir}; put what differs, or ${{hydra.job.num}}, into hydra.sweep.subdir"
        )
    name = text = run.name.replace("${", "\\${")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9._+-]*", run.name):
        text = quoted(name)
    rename(source, job, key, name, text)


def check_folders(jobs: Sequence[Job], source: Source) -> None:
    """No two jobs write to one folder."""
    writers: dict[str, Job] = {}
    for job in jobs:
        other = writers.setdefault(place(job.subdir), job)
        if other is not job:
            raise SweepError(
                f"runs {other.number} ({other.text}) and {job.number} ({job.text}) would both "
                f"write to {source.master.hydra.sweep.dir}/{job.subdir}; put what differs into "
                "hydra.sweep.subdir"
            )
