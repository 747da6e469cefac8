"""sweep.json: what a sweep's folder holds, for the next start, for reports and for people.

It is written whole after every change. A run is identified by its name, the resolved
hydra.sweep.subdir; those of earlier commands in the same folder stay.
"""

import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from hydra_sweeps.command import command_line
from hydra_sweeps.config import SweepConf
from hydra_sweeps.errors import SweepError
from hydra_sweeps.records import reason, write_whole

log = logging.getLogger(__name__)

FILE = "sweep.json"
LOCK = ".sweep.lock"
VERSION = 1

Value = float | list[float | None] | None
"""What a run returned: one number, several, or nothing; NaN and infinity are None."""


@dataclass(frozen=True)
class Outcome:
    """How a job has ended."""

    status: str
    """completed, failed or pruned."""
    value: Value = None
    error: str | None = None
    """Why it failed, in one line."""


@dataclass
class Run:
    """One run of a sweep."""

    number: int
    """Job number in the command that ran it."""
    name: str
    """The resolved hydra.sweep.subdir."""
    overrides: list[str]
    """As they were typed."""
    command: str = ""
    """Reproduces this run alone."""
    status: str = "planned"
    """planned, running, completed, failed or pruned."""
    value: Value = None
    error: str | None = None
    """Why it failed, in one line."""
    started: str | None = None
    seconds: float | None = None
    digest: str = ""
    """Hash of the composed configuration."""
    record: dict[str, Any] = field(default_factory=dict)
    """hydra.sweeper.record in this run's configuration."""
    params: dict[str, Any] = field(default_factory=dict)
    """What a study sampled, by key."""
    resolved: list[str] = field(default_factory=list)
    """Overrides with the values that their interpolations had; [] where that is no other text."""

    def begin(self) -> None:
        """It starts."""
        self.status, self.started = "running", now()

    def end(self, outcome: Outcome) -> None:
        """It has ended."""
        self.status, self.value, self.error = outcome.status, outcome.value, outcome.error

    def interrupt(self) -> None:
        """Its process is gone; it is to run again."""
        self.status, self.started = "planned", None


@dataclass
class Sweep:
    """The content of sweep.json."""

    kind: str
    """grid or study."""
    script: str
    """hydra.job.name."""
    command: str
    """What started it last."""
    cwd: str
    objectives: list[dict[str, str]]
    """name and direction (maximize or minimize) of each returned value."""
    started: str = ""
    updated: str = ""
    state: str = "running"
    """running, complete or interrupted."""
    runs: dict[str, Run] = field(default_factory=dict)
    """By name; a list in the file."""
    study: dict[str, Any] | None = None
    """Of studies: name, storage, n_trials, sampler, pruner, best."""
    version: int = VERSION

    @property
    def names(self) -> list[str]:
        """Of the values that a run returns."""
        return [objective["name"] for objective in self.objectives]


def fresh(kind: str, master: DictConfig, options: SweepConf) -> Sweep:
    """The record of this command, without its runs."""
    named = zip(options.names, options.directions, strict=True)
    objectives = [{"name": name, "direction": direction} for name, direction in named]
    return Sweep(kind, str(master.hydra.job.name), command_line(), os.getcwd(), objectives)


def read(sweep_dir: Path) -> Sweep | None:
    """The record of a folder; None where there is none.

    Raises:
        SweepError: it cannot be read.
    """
    file = sweep_dir / FILE
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, this code writes {VERSION}")
        runs = [Run(**known_fields(Run, run)) for run in content["runs"]]
        content["runs"] = {run.name: run for run in runs}
        return Sweep(**known_fields(Sweep, content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SweepError(
            f"{file} cannot be read ({error!r}); move it away to start anew, or give another "
            "hydra.sweep.dir"
        ) from None


def known_fields(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    """The keys of a mapping that are fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    return {key: value for key, value in content.items() if key in names}


def refuse_other_values(earlier: Sweep | None, fresh: Sweep, again: Collection[str]) -> None:
    """One record has values of one meaning.

    Args:
        again: names of runs that this command makes.

    Raises:
        SweepError: other runs have returned something else.
    """
    if earlier is None or earlier.names == fresh.names:
        return
    kept = [run for name, run in earlier.runs.items() if run.value is not None]
    if others := [run.name for run in kept if run.name not in again]:
        raise SweepError(
            f"{others[0]} of this sweep has returned {', '.join(earlier.names)}, and the runs of "
            f"this command return {', '.join(fresh.names)}: one table would show both as one; give "
            "another hydra.sweep.dir"
        )


def begin(sweep_dir: Path, fresh: Sweep) -> Sweep:
    """`fresh` with the runs and the start of what was there before; nothing of it is running.

    Call it while the folder is locked.
    """
    earlier = read(sweep_dir)
    if earlier is not None:
        for run in earlier.runs.values():
            if run.status == "running":
                run.interrupt()
                run.seconds = None
        fresh.started, fresh.runs = earlier.started, earlier.runs
        fresh.study = fresh.study or earlier.study
    fresh.started = fresh.started or now()
    return fresh


def write(sweep_dir: Path, sweep: Sweep) -> None:
    """Replace sweep.json at once.

    NaN and infinity become null, what JSON has no form for its text.
    """
    sweep.updated = now()
    content = {**vars(sweep), "runs": [asdict(run) for run in sweep.runs.values()]}
    content = json.loads(json.dumps(content, default=str), parse_constant=lambda name: None)
    write_whole(sweep_dir / FILE, json.dumps(content, indent=1))


@contextmanager
def locked(sweep_dir: Path) -> Iterator[None]:
    """Only one process runs a sweep's folder; its end opens the lock, whatever ended it.

    A record lock, since processes that jobs leave behind would inherit a flock. What is refused
    before any job leaves no folder that was not there.

    Raises:
        SweepError: another one does.
    """
    made = [folder for folder in (sweep_dir, *sweep_dir.parents) if not folder.exists()]
    sweep_dir.mkdir(parents=True, exist_ok=True)
    with (sweep_dir / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise SweepError(
                f"another process ({file.read().strip() or 'of another machine'}) runs the sweep "
                f"in {sweep_dir}; wait for it, end it, or give another hydra.sweep.dir"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s: %s: nothing refuses a second process here", file.name, error.strerror)
        file.truncate(0)
        print(f"pid {os.getpid()}", file=file, flush=True)
        try:
            yield
        except CompactHydraException:
            if made and not begun(sweep_dir):
                shutil.rmtree(sweep_dir)
                for folder in made[1:]:
                    with suppress(OSError):
                        folder.rmdir()
            raise


def begun(sweep_dir: Path) -> bool:
    """Whether a job has come so far that it left something: in the record, or in files."""
    sweep = read(sweep_dir)
    if sweep and any(run.status != "planned" for run in sweep.runs.values()):
        return True
    ours = (FILE, LOCK, "multirun.yaml", "study.db")
    files = [path for path in sweep_dir.rglob("*") if path.is_file() and path.stat().st_size]
    return any(not path.name.startswith(ours) for path in files)


def outcome(returned: JobReturn) -> Outcome:
    """The end of a job: completed with its value, or failed with a reason in one line.

    A number that is NaN or infinite, alone or among several, is a failure.
    """
    value = returned._return_value
    if returned.status != JobStatus.COMPLETED:
        lost = "the launcher brought no result"
        return Outcome("failed", None, reason(value) if isinstance(value, BaseException) else lost)
    several = isinstance(value, list | tuple)
    numbers: list[Any] = [number(item) for item in (value if several else [value])]
    if not numbers or None in numbers:
        return Outcome("completed")
    finite = [item if math.isfinite(item) else None for item in numbers]
    result = finite if several else finite[0]
    if None in finite:
        return Outcome("failed", result, f"returned {numbers[finite.index(None)]}")
    return Outcome("completed", result)


def number(value: Any) -> float | None:
    """A returned number, also as NumPy or torch hold it; None for anything else."""
    if isinstance(value, bool | str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def now() -> str:
    """The time, with its zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
