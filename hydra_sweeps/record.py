"""sweep.json: what a sweep's folder holds, for the next start, for reports and for people.

It is written whole, under another name first, after every change. Runs are known by their name,
the resolved hydra.sweep.subdir; those of earlier commands in the same folder stay.
"""

import fcntl
import json
import math
import numbers
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException

from hydra_sweeps.errors import SweepError

FILE = "sweep.json"
LOCK = ".sweep.lock"
VERSION = 1
CONFIG_FLAGS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")

Value = float | list[float | None] | None
"""What a run returned: one number, several, or nothing; NaN and infinity are None."""


@dataclass
class Run:
    """One run of a sweep."""

    number: int
    """Job number in the command that ran it."""
    name: str
    """The resolved hydra.sweep.subdir."""
    overrides: list[str]
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
    runs: list[Run] = field(default_factory=list)
    study: dict[str, Any] | None = None
    """Of studies: name, storage, n_trials, sampler, pruner, best."""
    version: int = VERSION

    def run(self, name: str) -> Run | None:
        """The run of this name."""
        return next((run for run in self.runs if run.name == name), None)

    def put(self, run: Run) -> None:
        """Add a run, in the place of the one with its name."""
        for index, known in enumerate(self.runs):
            if known.name == run.name:
                self.runs[index] = run
                return
        self.runs.append(run)


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
        runs = [Run(**known(Run, run)) for run in content["runs"]]
        return Sweep(**{**known(Sweep, content), "runs": runs})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SweepError(
            f"{file} cannot be read ({error!r}); move it away to start anew, or give another "
            "hydra.sweep.dir"
        ) from None


def known(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    """The keys of a mapping that are fields of a dataclass."""
    names = {each.name for each in fields(kind)}
    return {key: value for key, value in content.items() if key in names}


def begin(sweep_dir: Path, fresh: Sweep) -> Sweep:
    """`fresh` with the runs and the start of what was there before; nothing of it is running.

    Call it while the folder is locked.
    """
    earlier = read(sweep_dir)
    fresh.started = fresh.started or now()
    if earlier is None:
        return fresh
    for run in earlier.runs:
        if run.status == "running":  # its process is gone
            run.status, run.started, run.seconds = "planned", None, None
    fresh.started = earlier.started or fresh.started
    fresh.runs = [*earlier.runs]
    fresh.study = fresh.study or earlier.study
    return fresh


def write(sweep_dir: Path, sweep: Sweep) -> None:
    """Replace sweep.json at once."""
    sweep.updated = now()
    sweep_dir.mkdir(parents=True, exist_ok=True)
    partial = sweep_dir / f"{FILE}.partial"
    with partial.open("w") as file:
        json.dump(plain(asdict(sweep)), file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, sweep_dir / FILE)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity become null, what is unknown its text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


@contextmanager
def locked(sweep_dir: Path) -> Iterator[None]:
    """Only one process runs a sweep's folder; its end opens the lock, whatever ended it.

    A record lock, since processes that jobs leave behind would inherit a flock.

    Raises:
        SweepError: another one does.
    """
    sweep_dir.mkdir(parents=True, exist_ok=True)
    with (sweep_dir / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise SweepError(
                f"another process ({file.read().strip() or 'of another machine'}) runs the sweep "
                f"in {sweep_dir}; wait for it, end it, or give another hydra.sweep.dir"
            ) from None
        file.truncate(0)
        print(f"pid {os.getpid()}", file=file, flush=True)
        yield


def outcome(returned: JobReturn) -> tuple[str, Value, str | None]:
    """Status (completed or failed), value and one-line reason of a job that has ended.

    A number that is NaN or infinite, alone or among several, is a failure.
    """
    error = returned._return_value
    if returned.status != JobStatus.COMPLETED:
        known = isinstance(error, BaseException)
        return "failed", None, one_line(error) if known else "the launcher brought no result"
    value = returned._return_value
    values = [number(each) for each in (value if isinstance(value, list | tuple) else [value])]
    if not values or None in values:
        return "completed", None, None
    kept = [each if each is not None and math.isfinite(each) else None for each in values]
    bad = [each for each in values if each is not None and not math.isfinite(each)]
    status, reason = ("failed", f"returned {bad[0]}") if bad else ("completed", None)
    return status, kept if isinstance(value, list | tuple) else kept[0], reason


def number(value: Any) -> float | None:
    """A returned number, also as NumPy or torch hold it; None for anything else."""
    if isinstance(value, bool | str | bytes) or value is None:
        return None
    if isinstance(value, numbers.Real) or getattr(value, "shape", None) == ():
        try:
            return float(value)
        except (TypeError, ValueError):
            return None
    return None


def one_line(error: BaseException) -> str:
    """An error as the first line of its text; with its type, where that tells something."""
    lines = str(error).strip().splitlines()
    first = lines[0].removeprefix("error: ") if lines else ""
    if not first:
        return type(error).__name__
    text = first if isinstance(error, HydraException) else f"{type(error).__name__}: {first}"
    return text[:500]


def now() -> str:
    """The time, with its zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def command_line(argv: Sequence[str] | None = None) -> str:
    """This process's command, for a shell."""
    return shlex.join(["python", *(sys.argv if argv is None else argv)])


def run_command(overrides: Iterable[str], hydra: Sequence[str] | None = None) -> str:
    """The command that reproduces one run alone.

    Args:
        overrides: the job's own.
        hydra: with -m, and these overrides of Hydra's node; None: without -m.
    """
    flags, given = [], sys.argv[1:]
    for index, word in enumerate(given):
        if word in CONFIG_FLAGS:
            flags += given[index : index + 2]
        elif word.partition("=")[0] in CONFIG_FLAGS:
            flags.append(word)
    many = [] if hydra is None else ["-m"]
    return command_line([sys.argv[0], *flags, *many, *overrides, *(hydra or [])])
