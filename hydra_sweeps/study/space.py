"""What a study searches: from Hydra's overrides to suggestions, conditions and first points."""

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import (
    Override,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from hydra_sweeps.errors import SweepError
from hydra_sweeps.overrides import key_of, nothing, parse, parse_words

PLAIN = re.compile(r"[\w.+/$%*@?|-]+")
CONDITIONAL = "hydra.sweeper.conditional"


@dataclass(frozen=True)
class Condition:
    """An earlier key has one of these values."""

    key: str
    values: tuple[Any, ...]
    text: str
    """As it was written."""


@dataclass(frozen=True)
class Param:
    """One key that is searched."""

    key: str
    """As in an override: may begin with +."""
    text: str
    """As it was written."""
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
                f"hydra/sweeper/sampler=grid needs lists or ranges, but {self.text} has no end; "
                "take another sampler or write its values"
            )
        count = round((self.high - self.low) / self.step) + 1
        return [self.typed(self.low + index * self.step) for index in range(count)]

    def holds(self, value: Any) -> bool:
        """Whether it can have this value."""
        if self.kind == "choice":
            return value in self.choices
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and self.typed(value) == value

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
        return text + (f" (when {self.when.text})" if self.when else "")


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

    def fill(self, choose: Callable[[Param], Any]) -> dict[str, Any]:
        """The values of one job by Param.key; `choose` is asked for those that exist in it."""
        [values] = self.combinations(lambda param: [choose(param)])
        return values

    def examples(self) -> list[dict[str, Any]]:
        """Points that together have every key once."""

        def example(param: Param, when: Condition | None) -> Any:
            if when is not None and param.name == when.key:
                return when.values[0]
            return param.choices[0] if param.kind == "choice" else param.typed(param.low)

        conditions = dict.fromkeys([None, *(param.when for param in self.params)])
        return [self.fill(partial(example, when=when)) for when in conditions]

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination; SweepError where there is no end of them."""
        for param in self.params:
            param.values()
        return self.combinations(Param.values)

    def combinations(self, values_of: Callable[[Param], list[Any]]) -> Iterator[dict[str, Any]]:
        """Every combination of the values of the keys that exist beside the earlier ones."""

        def below(index: int, values: dict[str, Any], point: dict[str, Any]) -> Iterator[Any]:
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


def active(param: Param, values: Mapping[str, Any]) -> bool:
    """Whether a key exists beside these values."""
    when = param.when
    return when is None or (when.key in values and values[when.key] in when.values)


def override_texts(values: Mapping[str, Any]) -> list[str]:
    """Values as overrides; what Hydra would read otherwise is quoted."""

    def quoted(value: Any) -> str:
        text = str(value)
        if not isinstance(value, str) or text[:1] in ("[", "{") or PLAIN.fullmatch(text):
            return text
        escaped = re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", "\\'")
        return f"'{escaped}'"

    return [f"{key}={quoted(value)}" for key, value in values.items()]


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
    given = {key_of(override): override for override in [*of_params, *typed]}
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


def encoded(override: Override) -> Any:
    """An override's value as sweeps give theirs: numbers and booleans, else text."""
    value = override.value()
    plain = isinstance(value, bool | int | float | str)
    return value if plain else override.get_value_element_as_str()


def param_of(loader: ConfigLoader, override: Override, when: Condition | None = None) -> Param:
    """What a sweep searches; a single value is a choice of one."""
    key, text = override.get_key_element(), str(override.input_line)
    value: Any = override.value()
    if not override.is_sweep_override():
        return Param(key, text, "choice", (encoded(override),), when=when)
    shuffled = bool(getattr(value, "shuffle", False))
    if override.is_discrete_sweep() and (shuffled or not isinstance(value, RangeSweep)):
        choices = encoded_values(override)
        if not choices:
            raise SweepError(nothing(loader, override))
        if shuffled:  # the order is part of what a study stores
            choices.sort(key=str)
        return Param(key, text, "choice", tuple(choices), when=when)
    if isinstance(value, RangeSweep):
        low, high, step, log = value.start, value.stop, value.step, False
    else:
        low, high, step, log = value.start, value.end, None, "log" in value.tags
    assert low is not None and high is not None
    kind = "int" if all(isinstance(n, int) for n in (low, high, step or 0)) else "float"
    if low > high or (log and low <= 0) or (step is not None and step <= 0):
        raise SweepError(f"{text}: the bounds must grow" + (" and be positive" if log else ""))
    step = step or (1 if kind == "int" and not log else None)
    if step is not None:  # as Optuna would, with a warning
        high = low + math.floor((high - low) / step + 1e-9) * step
    return Param(key, text, kind, (), low, high, step, log, when)


def encoded_values(override: Override) -> list[Any]:
    """The values of a list, as Optuna stores them; a single value alone."""
    if not override.is_discrete_sweep():
        return [encoded(override)]
    return list(override.sweep_iterator(transformer=Transformer.encode))


def condition(loader: ConfigLoader, master: DictConfig, space: Space, text: str) -> Condition:
    """Read `loss=full-opd,mixed`; a key that is not searched has the value it has in `master`."""
    try:
        [override] = parse(loader, shlex.split(text))
        values = tuple(encoded_values(override))
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
        if (other.kind, other.log, other.choices) != (param.kind, param.log, param.choices):
            raise SweepError(
                f"{CONDITIONAL}: {other.text!r} and {param.text!r} must be of one kind, choices "
                "the same: to Optuna they are one parameter"
            )
    space.params.append(param)


def first_point(
    loader: ConfigLoader, space: Space, where: str, text: str, strict: bool
) -> dict[str, Any]:
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
    values = {key_of(override): encoded(override) for override in overrides}
    beside, point = {**space.constants, **values}, dict[str, Any]()
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
