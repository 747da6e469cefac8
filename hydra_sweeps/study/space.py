"""What a study searches: from Hydra's overrides to suggestions, conditions and first points."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from hydra_sweeps.errors import SweepError
from hydra_sweeps.jobs import Source
from hydra_sweeps.overrides import key_of, parse, parse_words, quoted, refuse_twice, value_text
from hydra_sweeps.study.config import OptunaAsyncConf
from hydra_sweeps.study.params import Condition, Param, encoded, labelled, param_of

CONDITIONAL = "hydra.sweeper.conditional"
Point = dict[str, Any]
"""Values of the keys that a job has, by Param.key."""


@dataclass
class Space:
    """What is searched, in this order, and what all jobs have."""

    params: list[Param]
    fixed: dict[str, Override]
    """By key."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Values that conditions may name, of keys that are not searched."""
    typed: set[str] = field(default_factory=set)
    """Keys of the command line."""

    @property
    def overrides(self) -> list[str]:
        """What all jobs have."""
        return [str(override.input_line) for override in self.fixed.values()]

    def named(self, key: str) -> list[Param]:
        """What is searched at a key, each under another condition."""
        return [param for param in self.params if param.name == key]

    def fill(self, choose: Callable[[Param], Any]) -> Point:
        """The values of one job by Param.key; `choose` is asked for those that exist in it."""
        [values] = self.combinations(lambda param: [choose(param)])
        return values

    def examples(self) -> list[Point]:
        """Points that together have every key once."""
        conditions = dict.fromkeys([None, *(param.when for param in self.params)])
        return [self.example(*((when.key, when.values[0]) if when else ())) for when in conditions]

    def choices(self) -> list[Point]:
        """Points that together have every choice of the keys without a dot: of config groups."""
        return [
            self.example(param.name, value)
            for param in self.params
            if param.kind == "choice" and "." not in param.name
            for value in param.choices
        ]

    def example(self, key: str = "", value: Any = None) -> Point:
        """A point, with this value where there is such a key in it."""

        def choose(param: Param) -> Any:
            if param.name == key and param.holds(value):
                return value
            return param.choices[0] if param.kind == "choice" else param.typed(param.low)

        return self.fill(choose)

    def points(self) -> Iterator[Point]:
        """Every combination; SweepError where there is no end of them."""
        for param in self.params:
            param.values()
        return self.combinations(Param.values)

    def combinations(self, values_of: Callable[[Param], list[Any]]) -> Iterator[Point]:
        """Every combination of the values of the keys that exist beside the earlier ones."""

        def below(index: int, values: dict[str, Any], point: Point) -> Iterator[Point]:
            if index == len(self.params):
                yield point
                return
            param = self.params[index]
            if param.key in point or not active(param, values):
                yield from below(index + 1, values, point)
                return
            for value in values_of(param):
                more = {**values, param.name: value}
                yield from below(index + 1, more, {**point, param.key: value})

        return below(0, self.constants, {})

    def job(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of a job with these values, by Param.key."""
        return [*self.overrides, *self.texts_of(values)]

    def texts_of(self, values: Mapping[str, Any]) -> list[str]:
        """Values by Param.key as overrides; what custom_search_space added is quoted."""
        params = {param.key: param for param in self.params}
        return [
            params[key].override(value)
            if key in params
            else f"{key}={quoted(value) if isinstance(value, str) else value_text(value)}"
            for key, value in values.items()
        ]

    def read(self, override: Override) -> Any:
        """An override's value, as the key that has it stores it."""
        text = value_text(override._value)
        for param in self.named(key_of(override)):
            if text in param.texts:
                return param.choices[param.texts.index(text)]
        return encoded(override)

    def few(self, most: int) -> list[Point] | None:
        """All points, where there are `most` of them at most."""
        try:
            points = list(islice(self.points(), most + 1))
        except SweepError:
            return None
        return points if len(points) <= most else None


@dataclass
class Search:
    """A command that searches."""

    options: OptunaAsyncConf
    source: Source
    space: Space


def active(param: Param, values: Mapping[str, Any]) -> bool:
    """Whether a key exists beside these values."""
    when = param.when
    return when is None or (when.key in values and values[when.key] in when.values)


def read_space(
    loader: ConfigLoader,
    master: DictConfig,
    params: Mapping[str, str],
    conditional: Mapping[str, Any],
    arguments: Sequence[str],
) -> Space:
    """The space of a command.

    Args:
        loader: knows the options of groups.
        master: the configuration that jobs are made of.
        params: by key, for keys that `arguments` does not have.
        conditional: by condition.
        arguments: the command line's own, sweeps and others.

    Raises:
        SweepError: something that cannot be searched, a condition that names nothing.
    """
    typed = parse(loader, arguments)
    of_params = parse(loader, [f"{key}={value}" for key, value in params.items()])
    for together in (typed, of_params):
        refuse_twice(together)
    given = by_place([*of_params, *typed])
    fixed = {key: override for key, override in given.items() if not override.is_sweep_override()}
    searched = [param_of(loader, given[key]) for key in given if key not in fixed]
    space = Space(searched, fixed, typed={key_of(override) for override in typed})
    space.constants = {key: encoded(override) for key, override in fixed.items()}
    for text, keys in conditional.items():
        when = condition(loader, master, space, text)
        if not isinstance(keys, Mapping | DictConfig):
            raise SweepError(f"{CONDITIONAL}: {text!r} needs keys and what is searched, not {keys}")
        for key, value in keys.items():
            [override] = parse(loader, [f"{key}={value}"])
            add(space, given, param_of(loader, override, when))
    return space


def by_place(overrides: Sequence[Override]) -> dict[str, Override]:
    """The last override of each key, where its first stands; of `~x +x=1` both count."""
    given = dict[str, Override]()
    for override in overrides:
        key = key_of(override)
        if override.is_delete():
            given.pop(key, None)
            key = f"~{key}"
        given[key] = override
    return given


def condition(loader: ConfigLoader, master: DictConfig, space: Space, text: str) -> Condition:
    """Read `loss=full-opd,mixed`; a key that is not searched has the value it has in `master`."""
    try:
        [override] = parse(loader, shlex.split(text))
        discrete = override.is_discrete_sweep()
        labels = labelled(list(override.sweep_iterator()) if discrete else [override._value])
    except (ValueError, TypeError, HydraException) as error:
        raise SweepError(
            f"{CONDITIONAL}: {text!r} cannot be read ({error}); a condition is e.g. loss=full-opd"
        ) from None
    key = key_of(override)
    params = space.named(key)
    if not params and key not in space.constants:
        choices = OmegaConf.select(master, "hydra.runtime.choices") or {}
        value = choices[key] if key in choices else OmegaConf.select(master, key)
        if value is None:
            raise SweepError(
                f"{CONDITIONAL}: {text!r}: the configuration has no {key}; a condition names a key "
                f"that is searched before ({listed(space)}), or one of the configuration"
            )
        space.constants[key] = value
    stored = {text: label for param in params
              for text, label in zip(param.texts, param.choices, strict=True)}  # fmt: skip
    values = tuple(stored.get(text, label) for text, label in labels.items())
    for value in values:
        narrowed = not params or key in space.typed  # then it may never hold
        if not narrowed and not any(param.holds(value) for param in params):
            raise SweepError(
                f"{CONDITIONAL}: {text!r}: {key} is never {value}; it is searched in "
                + " or ".join(param.described() for param in params)
            )
    return Condition(key, values, text)


def listed(space: Space) -> str:
    """The keys that are searched, for messages."""
    return ", ".join(dict.fromkeys(param.name for param in space.params)) or "nothing"


def add(space: Space, given: Mapping[str, Any], param: Param) -> None:
    """Add a key that is searched under a condition, unless the command line has it."""
    if param.name in space.typed:
        return
    if param.name in given:
        when = param.when.text if param.when else ""
        raise SweepError(
            f"{param.name} stands in hydra.sweeper.params and under {when!r} in {CONDITIONAL}; "
            "leave it in one place"
        )
    for other in space.named(param.name):
        kinds = [(p.kind, p.log, p.choices, p.texts) for p in (other, param)]
        if kinds[0] != kinds[1]:
            raise SweepError(
                f"{CONDITIONAL}: {other.text!r} and {param.text!r} must be of one kind, choices "
                "the same: to Optuna they are one parameter"
            )
    space.params.append(param)


def first_point(loader: ConfigLoader, space: Space, where: str, text: str, strict: bool) -> Point:
    """One of hydra.sweeper.warm_start as values by Param.key.

    Args:
        loader: reads overrides.
        space: what the point has to lie in.
        where: names the point in messages.
        text: e.g. "loss=full-opd lr=5e-5".
        strict: refuse also what does not fit to the command line, instead of leaving it out.

    Raises:
        SweepError: it does not lie in the space.
    """
    overrides = parse_words(loader, where, text)
    if any(override.is_sweep_override() for override in overrides):
        raise SweepError(f"{where}: a point has one value for each key")
    values = {key_of(override): space.read(override) for override in overrides}
    beside, point = {**space.constants, **values}, Point()
    for key, value in values.items():
        param = next((param for param in space.named(key) if active(param, beside)), None)
        misfit = reason_against(space, key, value, param)
        if misfit and (strict or key not in space.typed):
            raise SweepError(f"{where}: {misfit}")
        if param is not None and not misfit:
            point[param.key] = param.typed(value)
    return point


def reason_against(space: Space, key: str, value: Any, param: Param | None) -> str:
    """Why a point cannot have a value; "" when it can.

    Args:
        space: what the point has to lie in.
        key: the key alone.
        value: its value in the point.
        param: what is searched there beside the point's other values.
    """
    if param is not None:
        return "" if param.holds(value) else f"{key}={value} lies outside {param.described()}"
    if params := space.named(key):
        conditions = " or ".join(param.when.text for param in params if param.when)
        return f"{key} exists only with {conditions}"
    constant = space.constants.get(key)
    if constant == value:
        return ""
    state = "is not searched" if constant is None else f"is {constant} in all jobs"
    return f"{key} {state}; searched: {listed(space)}"
