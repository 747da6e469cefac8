"""The Optuna side of a study: opening it, first points, what its trials are, its results.

Only calls that Optuna 2.10 and 5 both have.
"""

import importlib.metadata
import logging
import math
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_sweeps import record
from hydra_sweeps.errors import SweepError
from hydra_sweeps.record import Outcome
from hydra_sweeps.records import write_whole
from hydra_sweeps.study.config import OptunaAsyncConf
from hydra_sweeps.study.leases import ENDED, LEASE, SETTLED, Leases
from hydra_sweeps.study.space import Point, Search

FIRST, MEASURED = "hydra.first", "hydra.measured"
"""Attributes of a study: the points it tries first; what its trials return and report."""
RUN, OVERRIDES, ERROR, STOPPED = "hydra.run", "hydra.overrides", "hydra.error", "hydra.stopped"
"""Attributes of a trial: name of its run, overrides, why it failed, whether it is being pruned."""
POINT, TWIN = "hydra.configuration", "hydra.twin"
"""Digest of its configuration but for the name; the number of the trial whose result it has."""
STATUS = {"COMPLETE": "completed", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "planned"}
"""State of a trial: status of its run."""
OPENINGS = 6
"""Tries to open a storage."""
INSTALL = "pip install -c constraints.txt 'specforge-exp[optuna]'"


@dataclass(frozen=True)
class Place:
    """Where a study is kept."""

    storage: Any
    """A URL, or what a node made."""
    name: str
    sweep_dir: Path
    alone: bool
    """The storage is the sweep's own, which one process at a time has."""

    def __str__(self) -> str:
        return f"{self.name} in {self.storage}"

    @property
    def exists(self) -> bool:
        """Whether a look would not make the storage."""
        url = str(self.storage)
        file = url.removeprefix("sqlite:///").partition("?")[0]
        return not url.startswith("sqlite:///") or Path(file).exists()

    def check(self) -> None:
        """SweepError for packages that cannot open the storage together."""
        if not isinstance(self.storage, str):
            return
        ours, tables = (importlib.metadata.version(name) for name in ("optuna", "sqlalchemy"))
        if int(ours.split(".")[0]) < 3 and int(tables.split(".")[0]) >= 2:
            raise SweepError(
                f"Optuna {ours} opens no storage with SQLAlchemy {tables}: {INSTALL} (or, without "
                "hydra-optuna-sweeper: pip install 'optuna>=4.9,<6')"
            )


def place_of(options: OptunaAsyncConf, sweep_dir: Path) -> Place:
    """Where the study of a sweep's folder is kept."""
    storage, alone = options.storage, options.storage is None
    if alone:
        storage = f"sqlite:///{sweep_dir / 'study.db'}"
    elif isinstance(storage, DictConfig):
        storage = instantiate(storage)
    return Place(storage, options.study_name or "/".join(sweep_dir.parts[-2:]), sweep_dir, alone)


@cache
def connection(storage: Any) -> Any:
    """What Optuna takes as a storage: of a URL one connection, which waits for other writers."""
    if not isinstance(storage, str) or "://" not in storage or storage.startswith("redis"):
        return storage
    waits = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else None
    return quiet_optuna().storages.RDBStorage(storage, engine_kwargs=waits)


def look(place: Place) -> Any:
    """The study as the storage has it now, also what other processes wrote."""
    return quiet_optuna().load_study(study_name=place.name, storage=connection(place.storage))


def quiet_optuna() -> Any:
    """The package, without its notes on every call; SweepError when it is missing."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it talks while it is imported
    try:
        import optuna
    except ImportError as error:
        raise SweepError(f"hydra/sweeper=optuna_async needs Optuna ({error}): {INSTALL}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="optuna")
    return optuna


def answered(place: Place, ask: Callable[[], Any]) -> Any:
    """What a storage answers; two processes that make it at once disturb each other.

    Raises:
        SweepError: it cannot be opened.
        KeyError, ValueError: what Optuna says of its content.
    """
    for attempt in range(OPENINGS, 0, -1):
        try:
            return ask()
        except (KeyError, ValueError):
            raise
        except Exception as error:
            if attempt == 1 or place.alone or isinstance(error, ImportError):
                text = f"the storage {place.storage} cannot be opened: {error}"
                raise SweepError(text) from None
            time.sleep(0.5)
    raise AssertionError("the last attempt returns or raises")


def open_study(options: OptunaAsyncConf, place: Place) -> Any:
    """Make a study, or open the one that is there.

    Raises:
        SweepError: it has other directions, or cannot be opened.
    """
    optuna, directions = quiet_optuna(), options.directions
    place.check()

    def create(load_if_exists: bool) -> Any:
        return optuna.create_study(
            storage=connection(place.storage),
            study_name=place.name,
            directions=directions,
            load_if_exists=load_if_exists,
        )

    def open_it() -> tuple[Any, bool]:
        try:
            return create(False), True
        except optuna.exceptions.DuplicatedStudyError:
            return create(True), False

    try:
        study, is_new = answered(place, open_it)
    except ValueError as error:
        raise SweepError(f"the study {place} cannot be opened: {error}") from None
    refuse_other_directions(options, place, study)
    if MEASURED not in study.user_attrs:
        study.set_user_attr(MEASURED, options.measured)
    trials = len(study.get_trials(deepcopy=False))
    apart = 0 if place.alone else zlib.crc32(str(place.sweep_dir).encode()) % 10**6
    study.sampler = new_sampler(options, 0 if is_new else trials + apart)
    if options.pruner:
        study.pruner = made("pruner", options.pruner)
    return study


def refuse_other_directions(options: OptunaAsyncConf, place: Place, study: Any) -> None:
    """SweepError where the study ranks its values the other way."""
    stored = [direction.name.lower() for direction in study.directions]
    if stored != options.directions:
        raise SweepError(
            f"the study {place} has other directions ({', '.join(stored)}) than "
            f"hydra.sweeper.direction={options.direction}; give another hydra.sweeper.study_name"
        )


def new_sampler(options: OptunaAsyncConf, count: int) -> Any:
    """The sampler of a study; a `seed` in its options grows by `count`."""
    if options.is_grid:  # its points are enqueued
        return quiet_optuna().samplers.RandomSampler()
    if not options.sampler:
        return None
    node = OmegaConf.create(options.sampler)
    with open_dict(node):
        if options.sampler_class == "TPESampler" and node.get("constant_liar") is None:
            node.constant_liar = options.n_jobs > 1
        if node.get("seed") is not None:  # no other start or process may draw the same points
            node.seed += count
    return made("sampler", node)


def made(name: str, node: Any) -> Any:
    """What a node makes; SweepError, in one line, where Optuna refuses its options."""
    try:
        return instantiate(node)
    except Exception as error:
        text = " ".join(str(error.__cause__ or error).split())
        raise SweepError(f"hydra.sweeper.{name}: {text}") from None


def known_study(place: Place) -> Any:
    """Optuna's study; None where there is none, or one that is just being made: nothing is made."""
    quiet_optuna()
    if not place.exists:
        return None
    place.check()
    try:
        study = answered(place, lambda: look(place))
    except KeyError:
        return None
    made = all(direction.name != "NOT_SET" for direction in study.directions)
    return study if made else None


def in_state(trials: Sequence[Any], *names: str) -> list[Any]:
    """Those that are, say, RUNNING."""
    return [trial for trial in trials if trial.state.name in names]


def total_of(search: Search) -> int:
    """How many trials the study has in the end."""
    points = search.space.points() if search.options.is_grid else count()
    return len(list(islice(points, search.options.n_trials)))


def count_missing(search: Search, trials: Sequence[Any]) -> int:
    """How many trials have to be asked for, beside those that run."""
    return max(0, total_of(search) - len(in_state(trials, *STATUS)))


def enqueue(search: Search, place: Place, study: Any, first: list[Point]) -> None:
    """Put the points that are tried first into the queue, each once also when this is killed.

    They are the first trials of a study, so their number says how many of them are there. Of
    several processes the one that signed last does it, and looks before each whether it still is.
    """
    known = len(study.get_trials(deepcopy=False))
    if search.options.is_grid:
        points = list(islice(search.space.points(), search.options.n_trials))
    else:
        if not known:
            study.set_user_attr(FIRST, first)
        points = study.user_attrs.get(FIRST, [])
    leases, patience = Leases(place.alone, str(place.sweep_dir)), 0.0
    while known < len(points):
        if place.alone or leases.is_own(look(place)):
            study.enqueue_trial(points[known])
            known += 1
            continue
        if time.monotonic() > patience:  # it has not signed yet, or who did is gone
            leases.write(study)
            patience = time.monotonic() + ENDED
        time.sleep(SETTLED)
        known = len(look(place).get_trials(deepcopy=False))


def tell(study: Any, trial: Any, outcome: Outcome) -> None:
    """End a trial."""
    state = next(state for state, status in STATUS.items() if status == outcome.status)
    values = None
    if outcome.status == "completed":
        value = outcome.value
        values = [float(v or 0.0) for v in (value if isinstance(value, list) else [value])]
    else:
        trial.set_user_attr(ERROR, outcome.error)
    study.tell(trial, values, state=quiet_optuna().trial.TrialState[state])


def stored_outcome(trial: Any) -> Outcome:
    """How a trial has ended; planned where it has not."""
    status = STATUS[trial.state.name]
    values = list(trial.values or []) if status == "completed" else []
    value = (values[0] if len(values) == 1 else values) if values else None
    failed = status in ("failed", "pruned")  # a kill may have come between reason and end
    return Outcome(status, value, trial.user_attrs.get(ERROR) if failed else None)


def best_trials(study: Any) -> list[Any]:
    """The best trial, or the Pareto front, without those that have another's result; [] when none
    completed."""
    trials = in_state(study.get_trials(deepcopy=False), "COMPLETE")
    trials = [trial for trial in trials if TWIN not in trial.user_attrs]
    if len(study.directions) > 1:
        front = {trial.number for trial in study.best_trials} if trials else set()
        return [trial for trial in trials if trial.number in front]
    sign = -1 if study.direction.name == "MAXIMIZE" else 1
    return sorted(trials, key=lambda trial: (sign * trial.value, trial.number))[:1]


def write_results(study: Any, sweep_dir: Path) -> None:
    """optimization_results.yaml as hydra-optuna-sweeper has it, with number and folder."""

    def folder(trial: Any) -> str:
        lease = trial.user_attrs.get(LEASE) or {}
        return str(Path(lease.get("folder", sweep_dir), trial.user_attrs.get(RUN, "")))

    solutions: list[dict[str, Any]] = [
        {
            "params": trial.params,
            "values": list(trial.values),
            "trial": trial.number,
            "directory": folder(trial),
        }
        for trial in best_trials(study)
    ]
    content: dict[str, Any] = {"name": "optuna"}
    if len(study.directions) > 1:
        content["solutions"] = solutions
    for best in solutions if len(study.directions) == 1 else []:
        [best["value"]] = best.pop("values")
        content |= {f"best_{key}": best[key] for key in ("params", "value", "trial", "directory")}
    text = OmegaConf.to_yaml(OmegaConf.create(content))
    write_whole(sweep_dir / "optimization_results.yaml", text)


def intermediate(
    lines: Sequence[Mapping[str, Any]], options: OptunaAsyncConf
) -> Iterator[tuple[int, float]]:
    """Step and value of the lines that have both, finite."""
    for line in lines:
        step, value = line.get(options.progress_step), line.get(options.progress_metric or "")
        if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value):
            yield step, float(value)


def plan(search: Search, place: Place, first: Sequence[Point], trials: Sequence[Any]) -> str:
    """What a dry run prints; the last line is the number of runs."""
    options, space = search.options, search.space
    objectives = zip(options.directions, options.names, strict=True)
    counts = {status: len(in_state(trials, state)) for state, status in STATUS.items()}
    counts["to be continued"] = counts.pop("planned")
    lines = [
        *(f"{param.key}: {param.described()}" for param in space.params),
        f"all jobs: {' '.join(space.overrides) or 'no overrides'}",
        *(f"first: {' '.join(space.texts_of(point))}" for point in first),
        f"study: {place}",
        f"objectives: {', '.join(map(' '.join, objectives))}",
        f"sampler: {options.sampler_class}, pruner: {options.pruner_class}, "
        f"in flight: {options.n_jobs}",
        f"trials: {', '.join(f'{count} {status}' for status, count in counts.items())}",
        f"{count_missing(search, trials) + counts['to be continued']} runs",
    ]
    return "\n".join(lines)


def outcome_of(returned: JobReturn, count: int) -> Outcome:
    """How a job has ended: a trial has to return `count` finite numbers."""
    outcome = record.outcome(returned)
    value = outcome.value
    if outcome.status == "failed":
        return outcome
    if count == 1 and not isinstance(value, float):
        reason = "not a number"
    elif count > 1 and (not isinstance(value, list) or len(value) != count):
        reason = f"not {count} numbers"
    else:
        return outcome
    return Outcome("failed", None, f"returned {returned._return_value!r}, {reason}"[:500])
