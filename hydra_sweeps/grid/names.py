"""Names of runs: made of the choices, the same on every start, never the same for two runs."""

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hydra_sweeps import jobs as _jobs
from hydra_sweeps.errors import SweepError
from hydra_sweeps.grid.config import ExperimentSweeperConf
from hydra_sweeps.grid.overrides import key_of
from hydra_sweeps.jobs import Job, Source

log = logging.getLogger(__name__)


@dataclass
class Named:
    """A job and what its configuration calls it."""

    job: Job
    label: str
    """name_key's value; without name_key the folder's name."""
    point: int
    """Which choice it is of; repeats of one share it."""
    repeat: int
    name: str = ""
    """What it will be called."""


def named_jobs(
    source: Source, points: Sequence[Sequence[str]], options: ExperimentSweeperConf
) -> list[Job]:
    """Every run of the choices in `points`, composed, with a name of its own.

    Two that are the same in everything run once.

    Raises:
        SweepError: one cannot be composed, or two share a name that nothing tells apart.
    """
    all_of_them = repeated(source, points, options)
    for one in all_of_them:
        one.label = label(one.job, options)
    kept = without_doubles(all_of_them, options)
    name_points(kept)
    for one in kept:
        first = next(other for other in kept if other.point == one.point)
        more = first.name.removeprefix(first.label)
        if one.repeat and one.label == first.label:
            more += f"_{short(options.repeat_key or '')}{value_of(one.job, options.repeat_key)}"
        one.name = one.label + more
    tell_apart(kept)
    jobs = []
    for number, one in enumerate(kept):
        job = one.job
        if one.name != one.label:
            job = renamed(source, one, options)
        _jobs.set_number(job, number)
        jobs.append(job)
    check_folders(jobs, source)
    return jobs


def repeated(
    source: Source, points: Sequence[Sequence[str]], options: ExperimentSweeperConf
) -> list[Named]:
    """The jobs of all choices, each as often as asked for."""
    found: list[Named] = []
    said = {tuple(each for each in point if key_of(each) == options.repeat_key) for point in points}
    if options.repeats > 1 and len(said) > 1:
        raise SweepError(
            f"{options.repeat_key} is swept and hydra.sweeper.repeats={options.repeats} counts it "
            "up; leave one of them out"
        )
    for point, overrides in enumerate(points):
        job = _jobs.compose(source, overrides, len(found))
        if options.repeats == 1:
            found.append(Named(job, "", point, 0))
            continue
        key = options.repeat_key or ""
        start = _jobs.value(job, key)
        if not isinstance(start, int) or isinstance(start, bool):
            raise SweepError(f"hydra.sweeper.repeat_key={key} is {start!r}, not an integer")
        for repeat in range(options.repeats):
            given = [
                *(each for each in overrides if key_of(each) != key),
                f"{key}={start + repeat}",
            ]
            job = _jobs.compose(source, given, len(found))
            found.append(Named(job, "", point, repeat))
    return found


def label(job: Job, options: ExperimentSweeperConf) -> str:
    """What a job's own configuration calls it."""
    return str(_jobs.value(job, options.name_key)) if options.name_key else _jobs.subdir(job)


def without_doubles(named: list[Named], options: ExperimentSweeperConf) -> list[Named]:
    """All but those that repeat an earlier one, with the same name and configuration."""
    seen: dict[tuple[str, str], Job] = {}
    kept = []
    for one in named:
        identity = one.label, _jobs.digest(one.job, [])
        if identity in seen:
            log.info(f"\t{one.job.said} and {seen[identity].said} are the same run, made once")
            continue
        seen[identity] = one.job
        kept.append(one)
    return kept


def name_points(kept: list[Named]) -> None:
    """Name the first run of every choice: its label, and where labels meet what differs."""
    groups: dict[str, list[Named]] = defaultdict(list)
    for one in kept:
        one.name = one.label
        if one.repeat == 0:
            groups[one.label].append(one)
    for group in groups.values():
        choices = [choices_of(one.job) for one in group]
        keys = list(dict.fromkeys(key for choice in choices for key in choice))
        differ = [key for key in keys if len({choice.get(key) for choice in choices}) > 1]
        for one, choice in zip(group, choices, strict=True):
            parts = [f"_{short(key)}{safe(choice[key])}" for key in differ if key in choice]
            one.name = one.label + "".join(parts)


def choices_of(job: Job) -> dict[str, str]:
    """A job's overrides by key."""
    return {key_of(each): each.partition("=")[2] for each in job.overrides}


def value_of(job: Job, key: str | None) -> str:
    """What a job's overrides say of a key."""
    return safe(choices_of(job)[key or ""])


def short(key: str) -> str:
    """The last part of a key: draft.ttt_length -> ttt_length."""
    return safe(re.split(r"[./]", key.partition("@")[0])[-1])


def safe(text: str) -> str:
    """Only what every file system takes in a name."""
    bare = re.sub(r"^[^A-Za-z0-9.+-]+|[^A-Za-z0-9.+-]+$", "", text)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", bare)


def tell_apart(kept: list[Named]) -> None:
    """Where names still meet, add a hash of the overrides."""
    count: dict[str, int] = defaultdict(int)
    for one in kept:
        count[one.name] += 1
    for one in kept:
        if count[one.name] > 1:
            text = " ".join(sorted(one.job.overrides))
            one.name += f"_{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def renamed(source: Source, one: Named, options: ExperimentSweeperConf) -> Job:
    """The job with its name as an override; SweepError when no key names it."""
    key, job = options.name_key, one.job
    if key is None:
        raise SweepError(
            f"run {job.number} ({job.said}) would write to the folder of another run, "
            f"{_jobs.subdir(job)}; put what differs, or ${{hydra.job.num}}, into hydra.sweep.subdir"
        )
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9._+-]*", one.name)
    quoted = one.name.replace("\\", "\\\\").replace("'", "\\'")
    given = [each for each in job.overrides if key_of(each) != key]
    given.append(f"{key}={one.name}" if plain else f"{key}='{quoted}'")
    return _jobs.compose(source, given, job.number)


def check_folders(jobs: Sequence[Job], source: Source) -> None:
    """No two jobs write to one folder."""
    seen: dict[str, Job] = {}
    for job in jobs:
        folder = _jobs.subdir(job)
        if folder in seen:
            raise SweepError(
                f"runs {seen[folder].number} ({seen[folder].said}) and {job.number} ({job.said}) "
                f"would both write to {source.master.hydra.sweep.dir}/{folder}; put what differs "
                "into hydra.sweep.subdir"
            )
        seen[folder] = job
