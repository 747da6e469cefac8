"""What a study searches: from Hydra's overrides to suggestions, conditions and first points."""

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from hydra_sweeps.errors import SweepError
from hydra_sweeps.grid.overrides import key_of, nothing, parse

PLAIN = re.compile(r"[\w.+/$%*@?|-]+")
CONDITIONAL = "hydra.sweeper.conditional"


@dataclass(frozen=True)
class Condition:
    """An earlier key has one of these values."""

    key: str
    values: tuple[Any, ...]
    said: str


@dataclass(frozen=True)
class Param:
    """One key that is searched."""

    key: str
    """As in an override: may begin with +."""
    said: str
    kind: str
    """choice, int or float."""
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    """Included."""
    step: float | None = None
    log: bool = False
    when: Condition | None = None

    @property
    def name(self) -> str:
        """The key alone."""
        return key_of(self.key)

    def suggest(self, trial: Any) -> Any:
        """Ask an Optuna trial for a value."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, self.choices)
        if self.kind == "int":
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return trial.suggest_int(self.key, low, high, step=step, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    def values(self) -> list[Any]:
        """All values; SweepError where they have no end."""
        if self.kind == "choice":
            return list(self.choices)
        if self.step is None or self.log:
            raise SweepError(
                f"hydra/sweeper/sampler=grid needs lists or ranges, but {self.said} has no end; "
                "take another sampler or write its values"
            )
        count = round((self.high - self.low) / self.step) + 1
        values = [self.low + index * self.step for index in range(count)]
        return [int(value) for value in values] if self.kind == "int" else values

    def holds(self, value: Any) -> bool:
        """Whether it can have this value."""
        if self.kind == "choice":
            return value in self.choices
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = self.kind == "float" or (number and value == int(value))
        return number and whole and self.low <= value <= self.high

    def typed(self, value: Any) -> Any:
        """A value that it holds, as Optuna would give it."""
        if self.kind == "choice":
            return self.choices[self.choices.index(value)]
        return int(value) if self.kind == "int" else float(value)

    def described(self) -> str:
        """For people."""
        if self.kind == "choice":
            text = ", ".join(map(str, self.choices))
        else:
            text = f"{self.kind} {self.low} to {self.high}"
            text += f" by {self.step}" if self.step not in (None, 1) else ""
            text += ", log" if self.log else ""
        return text + (f" (when {self.when.said})" if self.when else "")


@dataclass
class Space:
    """What is searched, in this order, and what all jobs have."""

    params: list[Param]
    fixed: dict[str, Override]
    """By key."""
    known: dict[str, Any] = field(default_factory=dict)
    """Values that conditions may name, of keys that are not searched."""
    typed: set[str] = field(default_factory=set)
    """Keys of the command line."""

    @property
    def overrides(self) -> list[str]:
        """What all jobs have."""
        return [str(override.input_line) for override in self.fixed.values()]

    def fill(self, choose: Callable[[Param], Any]) -> dict[str, Any]:
        """The values of one job by Param.key; `choose` is asked for those that exist in it."""
        values, chosen = dict(self.known), dict[str, Any]()
        for param in self.params:
            if param.key not in chosen and active(param, values):
                values[param.name] = chosen[param.key] = choose(param)
        return chosen

    def examples(self) -> list[dict[str, Any]]:
        """Points that together have every key once."""

        def like(when: Condition | None) -> Callable[[Param], Any]:
            def choose(param: Param) -> Any:
                if when is not None and param.name == when.key:
                    return when.values[0]
                return param.choices[0] if param.kind == "choice" else param.typed(param.low)

            return choose

        conditions = dict.fromkeys([None, *(param.when for param in self.params)])
        return [self.fill(like(when)) for when in conditions]

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination; SweepError where there is no end of them."""
        for param in self.params:
            param.values()

        def below(index: int, values: dict[str, Any], chosen: dict[str, Any]) -> Iterator[Any]:
            if index == len(self.params):
                yield chosen
                return
            param = self.params[index]
            if param.key in chosen or not active(param, values):
                yield from below(index + 1, values, chosen)
                return
            for value in param.values():
                more = {**values, param.name: value}
                yield from below(index + 1, more, {**chosen, param.key: value})

        yield from below(0, self.known, {})


def active(param: Param, values: Mapping[str, Any]) -> bool:
    """Whether a key exists beside these values."""
    when = param.when
    return when is None or (when.key in values and values[when.key] in when.values)


def text(values: Mapping[str, Any]) -> list[str]:
    """Values as overrides; what Hydra would read otherwise is quoted."""

    def quoted(value: Any) -> str:
        said = str(value)
        if not isinstance(value, str) or value[:1] in ("[", "{") or PLAIN.fullmatch(value):
            return said
        said = re.sub(r"(\\*)(?='|$)", r"\1\1", said).replace("'", "\\'")
        return f"'{said}'"

    return [f"{key}={quoted(value)}" for key, value in values.items()]


def read(
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
    given = {key_of(each.get_key_element()): each
             for each in [*parse(loader, [f"{key}={value}" for key, value in params.items()]),
                          *typed]}  # fmt: skip
    fixed = {key: each for key, each in given.items() if not each.is_sweep_override()}
    searched = [param_of(loader, each) for each in given.values() if each.is_sweep_override()]
    space = Space(searched, fixed, typed={key_of(each.get_key_element()) for each in typed})
    space.known = {key: encoded(override) for key, override in fixed.items()}
    for said, keys in conditional.items():
        when = condition(loader, master, space, said)
        if not isinstance(keys, Mapping | DictConfig):
            raise SweepError(f"{CONDITIONAL}: {said!r} needs keys and what is searched, not {keys}")
        for key, value in keys.items():
            add(loader, space, given, f"{key}={value}", when)
    return space


def encoded(override: Override) -> Any:
    """An override's value as sweeps give theirs: numbers and booleans, else text."""
    value = override.value()
    plain = isinstance(value, bool | int | float | str)
    return value if plain else override.get_value_element_as_str()


def param_of(loader: ConfigLoader, override: Override, when: Condition | None = None) -> Param:
    """What a sweep searches; a single value is a choice of one."""
    key, said, value = override.get_key_element(), str(override.input_line), override.value()
    if not override.is_sweep_override():
        return Param(key, said, "choice", (encoded(override),), when=when)
    shuffled = bool(getattr(value, "shuffle", False))
    if override.is_discrete_sweep() and (shuffled or not isinstance(value, RangeSweep)):
        choices = list(override.sweep_iterator(transformer=Transformer.encode))
        if not choices:
            raise SweepError(nothing(loader, override))
        if shuffled:  # the order is part of what a study stores
            choices.sort(key=str)
        return Param(key, said, "choice", tuple(choices), when=when)
    if isinstance(value, RangeSweep):
        low, high, step = value.start, value.stop, value.step
    else:
        assert isinstance(value, IntervalSweep)
        low, high, step = value.start, value.end, None
    assert low is not None and high is not None
    kind = "int" if all(isinstance(each, int) for each in (low, high, step or 0)) else "float"
    log = isinstance(value, IntervalSweep) and "log" in value.tags
    if low > high or (log and low <= 0) or (step is not None and step <= 0):
        raise SweepError(f"{said}: the bounds must grow" + (" and be positive" if log else ""))
    step = step or (1 if kind == "int" and not log else None)
    if step is not None:  # as Optuna would, with a warning
        high = low + math.floor((high - low) / step + 1e-9) * step
    return Param(key, said, kind, (), low, high, step, log, when)


def condition(loader: ConfigLoader, master: DictConfig, space: Space, said: str) -> Condition:
    """Read `loss=full-opd,mixed`; a key that is not searched has the value it has in `master`."""
    try:
        [override] = parse(loader, shlex.split(said))
        values = tuple(
            override.sweep_iterator(transformer=Transformer.encode)
            if override.is_discrete_sweep()
            else [encoded(override)]
        )
    except (ValueError, TypeError, HydraException) as error:
        raise SweepError(
            f"{CONDITIONAL}: {said!r} cannot be read ({error}); a condition is e.g. loss=full-opd"
        ) from None
    key = key_of(override.get_key_element())
    params = [param for param in space.params if param.name == key]
    if not params and key not in space.known:
        choices = OmegaConf.select(master, "hydra.runtime.choices") or {}
        found = choices[key] if key in choices else OmegaConf.select(master, key)
        if found is None:
            raise SweepError(
                f"{CONDITIONAL}: {said!r}: the configuration has no {key}; a condition names a key "
                f"that is searched before ({listed(space)}), or one of the configuration"
            )
        space.known[key] = found
    for value in values:
        narrowed = not params or key in space.typed  # then it may never hold
        if not narrowed and not any(param.holds(value) for param in params):
            raise SweepError(
                f"{CONDITIONAL}: {said!r}: {key} is never {value}; it is searched in "
                + " or ".join(param.described() for param in params)
            )
    return Condition(key, values, said)


def listed(space: Space) -> str:
    """The keys that are searched, for messages."""
    return ", ".join(dict.fromkeys(param.name for param in space.params)) or "nothing"


def add(
    loader: ConfigLoader, space: Space, given: Mapping[str, Any], said: str, when: Condition
) -> None:
    """Add a key that is searched under a condition, unless the command line has it."""
    [override] = parse(loader, [said])
    param = param_of(loader, override, when)
    if param.name in space.typed:
        return
    if param.name in given:
        raise SweepError(
            f"{param.name} stands in hydra.sweeper.params and under {when.said!r} in "
            f"{CONDITIONAL}; leave it in one place"
        )
    for other in space.params:
        alike = (other.kind, other.log, other.choices) == (param.kind, param.log, param.choices)
        if other.name == param.name and not alike:
            raise SweepError(
                f"{CONDITIONAL}: {other.said!r} and {param.said!r} must be of one kind, choices "
                "the same: to Optuna they are one parameter"
            )
    space.params.append(param)


def first_point(
    loader: ConfigLoader, space: Space, where: str, said: str, strict: bool
) -> dict[str, Any]:
    """One of hydra.sweeper.warm_start as values by Param.key.

    Args:
        loader: reads overrides.
        space: what the point has to lie in.
        where: names the point in messages.
        said: e.g. "loss=full-opd lr=5e-5".
        strict: refuse also what does not fit to the command line, instead of leaving it out.

    Raises:
        SweepError: it does not lie in the space.
    """
    try:
        overrides = parse(loader, shlex.split(said))
    except (ValueError, HydraException) as error:
        raise SweepError(f"{where} cannot be read: {error}") from None
    if any(override.is_sweep_override() for override in overrides):
        raise SweepError(f"{where}: a point has one value for each key")
    values = {key_of(each.get_key_element()): encoded(each) for each in overrides}
    beside, point = {**space.known, **values}, dict[str, Any]()
    for key, value in values.items():
        found = [param for param in space.params if param.name == key]
        fits = [param for param in found if active(param, beside)]
        reason = ""
        if not found and space.known.get(key) != value:
            has = f"is {space.known[key]} in all jobs" if key in space.known else "is not searched"
            reason = f"{key} {has}; searched: {listed(space)}"
        elif found and not fits:
            needs = " or ".join(param.when.said for param in found if param.when)
            reason = f"{key} exists only with {needs}"
        elif fits and not fits[0].holds(value):
            reason = f"{key}={value} lies outside {fits[0].described()}"
        if reason and (strict or key not in space.typed):
            raise SweepError(f"{where}: {reason}")
        if fits and not reason:
            point[fits[0].key] = fits[0].typed(value)
    return point
