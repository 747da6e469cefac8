"""The law of comparison: the trials of a study differ in what is searched, and in nothing else.

Their values are ranked beside each other and the sampler learns from all of them, so what was
measured with other options, of other inputs or under another name is refused before a job starts.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any

from hydra_sweeps.errors import SweepError
from hydra_sweeps.jobs import Job, compose, leaves
from hydra_sweeps.overrides import key_of, value_text
from hydra_sweeps.study.config import OptunaAsyncConf
from hydra_sweeps.study.space import Search, Space
from hydra_sweeps.study.state import point_of
from hydra_sweeps.study.trials import (
    MEASURED,
    OVERRIDES,
    POINT,
    Place,
    in_state,
    refuse_other_directions,
)

SHOWN = 4
"""Keys that a refusal names."""
REMEDY = "give another hydra.sweeper.study_name and hydra.sweep.dir"


def refuse_others(search: Search, place: Place, study: Any) -> None:
    """Refuse a command whose trials would be no comparison for those that a study has.

    Args:
        study: Optuna's; None where there is none yet.

    Raises:
        SweepError: says what differs.
    """
    if study is None:
        return
    options = search.options
    refuse_other_directions(options, place, study)
    for name, before in study.user_attrs.get(MEASURED, options.measured).items():
        if before != (now := options.measured[name]):
            raise SweepError(
                f"the study {place} has hydra.sweeper.{name}={before}, this command {now}: their "
                f"values are of two things; {REMEDY}"
            )
    trials = study.get_trials(deepcopy=False)
    if options.is_grid:
        refuse_other_grid(search.space, place, trials)
    measured = in_state(trials, "COMPLETE", "PRUNED", "RUNNING") if options.alike else []
    for trial in one_of_each(options, measured):
        refuse_other_options(search, place, trial)


def refuse_other_grid(space: Space, place: Place, trials: Sequence[Any]) -> None:
    """The trials of a grid are its points in their order; SweepError for those of another one."""
    points = islice(space.points(), len(trials))
    for trial, point in zip_longest(trials, points):
        if point is None and not place.alone:  # another process may have asked for one too many
            return
        known = trial.params or trial.system_attrs.get("fixed_params", {})
        lost = point is None or any(not same(known[key], point.get(key)) for key in known)
        if lost:
            raise SweepError(
                f"the study {place} has the points of another grid (#{trial.number}: {known}), and "
                f"some of this one would be left out; {REMEDY}, or another hydra/sweeper/sampler"
            )


def same(one: Any, other: Any) -> bool:
    """Whether two values of a key are one; steps of a float are, to rounding."""
    both = isinstance(one, float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=1e-9) if both else bool(one == other)


def one_of_each(options: OptunaAsyncConf, trials: Sequence[Any]) -> Iterator[Any]:
    """Trials that differ in more than their names and sampled numbers: one of each kind."""
    kinds = set[Any]()
    for trial in trials:
        if POINT in trial.user_attrs and OVERRIDES in trial.user_attrs:
            numbers = {key_of(key) for key, value in trial.params.items()
                       if isinstance(value, int | float)}  # fmt: skip
            left_out = {*numbers, options.name_key}
            kind = frozenset(text for key, text in by_key(trial).items() if key not in left_out)
            if kind not in kinds:
                kinds.add(kind)
                yield trial


def by_key(trial: Any) -> dict[str, str]:
    """A trial's overrides by key."""
    return {key_of(text): text for text in trial.user_attrs[OVERRIDES]}


def refuse_other_options(search: Search, place: Place, trial: Any) -> None:
    """SweepError where this command would give a trial's point another configuration.

    What is searched, then or now, is the trial's own.
    """
    options, source, space = search.options, search.source, search.space
    own, number = by_key(trial), trial.number
    searched = {key_of(key) for key in trial.params} | {param.name for param in space.params}
    texts = [text for text in space.overrides if text[0] == "~" or key_of(text) not in searched]
    texts += [text for key, text in own.items() if key in searched]
    try:
        now = compose(source, texts, number)
    except SweepError:
        if place.alone:
            raise
        return  # of a process with other files; it is left out of the record too
    if point_of(options, now) == trial.user_attrs[POINT]:
        return
    before = compose(source, list(own.values()), number)
    if point_of(options, before) == trial.user_attrs[POINT]:
        changes = different(options, before, now)
        what = f"other options (#{number} has {', '.join(changes[:SHOWN])})"
    else:
        what = (
            f"another configuration: since #{number} a file of it, one of hydra.sweeper.inputs or "
            "the environment has changed"
        )
    raise SweepError(
        f"the study {place} has trials of {what}, and beside their values this command's are no "
        f"comparison; {REMEDY}. Where that changes no number: hydra.sweeper.alike=false"
    )


def different(options: OptunaAsyncConf, before: Job, now: Job) -> list[str]:
    """Keys in which two configurations differ, with both values."""
    old, new = (dict(leaves(job.written(options.left_out))) for job in (before, now))
    return [
        f"{'.'.join(map(str, path))}={value_text(old.get(path))}, not {value_text(new.get(path))}"
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path)
    ]
