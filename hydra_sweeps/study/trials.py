"""The Optuna side of a study: opening it, first points, what its trials are, its results.

Only calls that Optuna 2.10 and 5 both have.
"""

import importlib.metadata
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_sweeps import record
from hydra_sweeps.errors import SweepError
from hydra_sweeps.study.config import OptunaAsyncConf
from hydra_sweeps.study.space import Space, text

FIRST = "hydra.first"
"""Attribute of a study: the points it tries first."""
RUN, OVERRIDES, ERROR, STOPPED = "hydra.run", "hydra.overrides", "hydra.error", "hydra.stopped"
"""Attributes of a trial: name of its run, overrides, why it failed, whether it is being pruned."""
STATUS = {"COMPLETE": "completed", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "planned"}
INSTALL = "pip install -c constraints.txt 'specforge-exp[optuna]'"


def optuna() -> Any:
    """The package, without its notes on every call; SweepError when it is missing."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it talks while it is imported
    try:
        import optuna as found
    except ImportError as error:
        raise SweepError(f"hydra/sweeper=optuna_async needs Optuna ({error}): {INSTALL}") from None
    found.logging.set_verbosity(found.logging.WARNING)
    warnings.filterwarnings("ignore", category=found.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="optuna")
    return found


def directions(options: OptunaAsyncConf) -> list[str]:
    """minimize or maximize, for each objective; SweepError where they do not fit to the names."""
    said = options.direction
    found = [said] if isinstance(said, str) or not isinstance(said, Sequence) else list(said)
    words = [str(getattr(each, "name", each)).lower() for each in found]
    if not words or {*words} - {"minimize", "maximize"}:
        raise SweepError(
            f"hydra.sweeper.direction={said} must be minimize or maximize, or a list with one of "
            "them for each value that a job returns"
        )
    if len(options.names) != len(words):
        raise SweepError(
            f"hydra.sweeper.direction has {len(words)} entries, hydra.sweeper.names "
            f"({', '.join(options.names)}) {len(options.names)}: one of each for every value that "
            "a job returns"
        )
    return words


def check(options: OptunaAsyncConf) -> None:
    """Refuse options that do not fit; names them."""
    for name in ("n_jobs", "n_trials"):
        if (value := getattr(options, name)) < 1:
            raise SweepError(f"hydra.sweeper.{name}={value} must be at least 1")
    if not 0 <= options.max_failure_rate <= 1:
        raise SweepError(f"hydra.sweeper.max_failure_rate={options.max_failure_rate}: from 0 to 1")
    if options.search_space:
        raise SweepError(
            "hydra.sweeper.search_space is an old form; write it as hydra.sweeper.params, a line "
            "a key: 'lr: tag(log, interval(1e-5, 1e-3))', 'loss: choice(baseline, mixed)', "
            "'layers: range(1, 5)'"
        )
    several = len(directions(options)) > 1
    if prunes(options) and several:
        raise SweepError(
            f"hydra/sweeper/pruner={class_name(options.pruner)} and hydra.sweeper.direction with "
            f"{len(directions(options))} objectives do not go together: Optuna cannot prune by "
            "several; give hydra/sweeper/pruner=none, or one direction"
        )
    if prunes(options) and not (options.progress_file and options.progress_metric):
        raise SweepError(
            f"hydra/sweeper/pruner={class_name(options.pruner)} needs hydra.sweeper.progress_file "
            "and hydra.sweeper.progress_metric: what it compares while jobs run"
        )


def class_name(node: Any) -> str:
    """The last part of a node's _target_."""
    return str(node["_target_"]).rpartition(".")[2] if node else "none"


def prunes(options: OptunaAsyncConf) -> bool:
    """Whether there is a pruner."""
    return class_name(options.pruner) not in ("none", "NopPruner")


def is_grid(options: OptunaAsyncConf) -> bool:
    """Whether all points are tried in order."""
    return class_name(options.sampler) == "GridSampler"


def location(options: OptunaAsyncConf, sweep_dir: Path) -> Any:
    """The storage: a URL, or what the node makes."""
    if options.storage is None:
        return f"sqlite:///{sweep_dir / 'study.db'}"
    if isinstance(options.storage, DictConfig):
        return instantiate(options.storage)
    return options.storage


def study_name(options: OptunaAsyncConf, sweep_dir: Path) -> str:
    """The study's name."""
    return options.study_name or "/".join(sweep_dir.parts[-2:])


def exists(storage: Any) -> bool:
    """Whether a look at a storage would not make it."""
    file = str(storage).removeprefix("sqlite:///").partition("?")[0]
    return not str(storage).startswith("sqlite:///") or Path(file).exists()


def check_storage(storage: Any) -> None:
    """SweepError for packages that cannot open a storage together."""
    if not isinstance(storage, str):
        return
    ours, tables = (importlib.metadata.version(name) for name in ("optuna", "sqlalchemy"))
    if int(ours.split(".")[0]) < 3 and int(tables.split(".")[0]) >= 2:
        raise SweepError(
            f"Optuna {ours} opens no storage with SQLAlchemy {tables}: {INSTALL} (or, without "
            "hydra-optuna-sweeper: pip install 'optuna>=4.9,<6')"
        )


def open_study(options: OptunaAsyncConf, storage: Any, name: str) -> Any:
    """Make a study, or open the one that is there.

    Raises:
        SweepError: it has other directions, or cannot be opened.
    """
    package, wanted = optuna(), directions(options)
    check_storage(storage)
    try:
        study = package.create_study(
            storage=storage, study_name=name, directions=wanted, load_if_exists=True
        )
        has = [direction.name.lower() for direction in study.directions]
    except ValueError as error:
        has = [str(error)]
    except Exception as error:
        raise SweepError(f"the storage {storage} cannot be opened: {error}") from None
    if has != wanted:
        raise SweepError(
            f"the study {name} in {storage} has other directions ({', '.join(has)}) than "
            f"hydra.sweeper.direction={options.direction}; give another hydra.sweeper.study_name"
        )
    study.sampler = sampler(options, len(study.get_trials(deepcopy=False)))
    if options.pruner:
        study.pruner = instantiate(options.pruner)
    return study


def sampler(options: OptunaAsyncConf, count: int) -> Any:
    """The sampler of a study that has `count` trials."""
    package = optuna()
    if is_grid(options) or not options.sampler:  # a grid's points are enqueued
        return package.samplers.RandomSampler() if is_grid(options) else None
    node = OmegaConf.create(options.sampler)
    with open_dict(node):
        if class_name(node) == "TPESampler" and node.get("constant_liar") is None:
            node.constant_liar = options.n_jobs > 1
        if node.get("seed") is not None:  # a second start must not draw the first one's points
            node.seed += count
    try:
        return instantiate(node)
    except Exception as error:
        raise SweepError(f"hydra.sweeper.sampler: {error}") from None


def known_trials(options: OptunaAsyncConf, storage: Any, name: str) -> list[Any]:
    """The trials of a study; nothing is made."""
    package = optuna()
    if not exists(storage):
        return []
    check_storage(storage)
    try:
        study = package.load_study(study_name=name, storage=storage)
    except KeyError:
        return []
    found: list[Any] = study.get_trials(deepcopy=False)
    return found


def in_state(trials: Sequence[Any], *names: str) -> list[Any]:
    """Those that are, say, RUNNING."""
    return [trial for trial in trials if trial.state.name in names]


def total(options: OptunaAsyncConf, space: Space) -> int:
    """How many trials the study has in the end."""
    if not is_grid(options):
        return options.n_trials
    return sum(1 for _ in islice(space.points(), options.n_trials))


def missing(options: OptunaAsyncConf, space: Space, trials: Sequence[Any]) -> int:
    """How many trials have to be asked for, beside those that run."""
    there = len(in_state(trials, "COMPLETE", "PRUNED", "FAIL", "RUNNING"))
    return max(0, total(options, space) - there)


def enqueue(
    study: Any, options: OptunaAsyncConf, space: Space, first: list[dict[str, Any]]
) -> None:
    """Put the points that are tried first into the queue, each once also when this is killed.

    They are the first trials of a study, so their number says how many of them are there.
    """
    trials = study.get_trials(deepcopy=False)
    points: list[dict[str, Any]]
    if is_grid(options):
        points = list(islice(space.points(), options.n_trials))
    else:
        if not trials:
            study.set_user_attr(FIRST, first)
        points = study.user_attrs.get(FIRST, [])
    for point in points[len(trials) :]:
        study.enqueue_trial(point)


def trial_of(study: Any, frozen: Any) -> Any:
    """A trial that runs, as its first process had it: what it has is given again."""
    return optuna().trial.Trial(study, frozen._trial_id)


def tell(study: Any, trial: Any, state: str, values: Sequence[float] | None = None) -> None:
    """End a trial: COMPLETE with values, PRUNED or FAIL."""
    states = optuna().trial.TrialState
    study.tell(trial, values, state=states[state])


def is_better(direction: str, value: float, than: float) -> bool:
    """In the sense of a direction."""
    return value < than if direction == "minimize" else value > than


def best(study: Any) -> list[Any]:
    """The best trial, or the Pareto front; [] when none completed."""
    if not in_state(study.get_trials(deepcopy=False), "COMPLETE"):
        return []
    return [study.best_trial] if len(study.directions) == 1 else list(study.best_trials)


def write_results(study: Any, sweep_dir: Path) -> None:
    """optimization_results.yaml as hydra-optuna-sweeper has it, with number and folder."""
    found = best(study)
    more = [
        {"trial": trial.number, "directory": str(sweep_dir / trial.user_attrs.get(RUN, ""))}
        for trial in found
    ]
    content: dict[str, Any] = {"name": "optuna"}
    if len(study.directions) == 1:
        for trial, where in zip(found, more, strict=True):
            content |= {"best_params": trial.params, "best_value": trial.value}
            content |= {f"best_{key}": value for key, value in where.items()}
    else:
        content["solutions"] = [
            {"params": trial.params, "values": list(trial.values), **where}
            for trial, where in zip(found, more, strict=True)
        ]
    partial = sweep_dir / "optimization_results.yaml.partial"
    OmegaConf.save(OmegaConf.create(content), partial)
    partial.replace(sweep_dir / "optimization_results.yaml")


def intermediate(
    lines: Sequence[Mapping[str, Any]], options: OptunaAsyncConf
) -> Iterator[tuple[int, float]]:
    """Step and value of the lines that have both, finite."""
    for line in lines:
        step, value = line.get(options.progress_step), line.get(options.progress_metric or "")
        if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value):
            yield step, float(value)


def plan(
    options: OptunaAsyncConf,
    space: Space,
    first: Sequence[dict[str, Any]],
    trials: Sequence[Any],
    where: str,
) -> list[str]:
    """What a dry run prints; the last line is the number of runs."""
    lines = [f"{param.key}: {param.described()}" for param in space.params]
    lines += [f"all jobs: {' '.join(space.overrides) or 'no overrides'}"]
    lines += [f"first: {' '.join(text(point))}" for point in first]
    lines += [f"study: {where}"]
    objectives = zip(options.names, directions(options), strict=True)
    lines += [f"objectives: {', '.join(f'{way} {name}' for name, way in objectives)}"]
    sampler, pruner = class_name(options.sampler), class_name(options.pruner)
    lines += [f"sampler: {sampler}, pruner: {pruner}, in flight: {options.n_jobs}"]
    counts = {word: len(in_state(trials, state)) for state, word in STATUS.items()}
    counts["to be continued"] = counts.pop("planned")
    lines += [f"trials: {', '.join(f'{number} {word}' for word, number in counts.items())}"]
    return [*lines, f"{missing(options, space, trials) + counts['to be continued']} runs"]


def outcome(returned: JobReturn, count: int) -> tuple[str, record.Value, str | None]:
    """Status, value and reason: a trial has to return `count` finite numbers."""
    status, value, error = record.outcome(returned)
    if status == "failed":
        return status, value, error
    found = returned._return_value
    if count == 1 and not isinstance(value, float):
        return "failed", None, f"returned {found!r}, not a number"[:500]
    has = len(value) if isinstance(value, list) else 1
    if count > 1 and (not isinstance(value, list) or has != count):
        return "failed", None, f"returned {found!r}, not {count} numbers"[:500]
    return status, value, None
