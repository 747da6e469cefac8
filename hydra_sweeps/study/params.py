"""One key that is searched: its values as Optuna stores them and as overrides give them."""

import decimal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import FloatRange, Override, QuotedString, RangeSweep

from hydra_sweeps.errors import SweepError
from hydra_sweeps.overrides import key_of, nothing, value_text


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
    """As Optuna stores them."""
    texts: tuple[str, ...] = ()
    """As overrides have them, one for each of `choices`."""
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
        value = trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)
        if self.step is None:
            return value
        return min(self.values(), key=lambda stepped: abs(stepped - value))  # as Hydra writes it

    def values(self) -> list[Any]:
        """All values; SweepError where they have no end."""
        if self.kind == "choice":
            return list(self.choices)
        if self.step is None:
            raise SweepError(
                f"hydra/sweeper/sampler=grid needs lists or ranges, but {self.text} has no end; "
                "take another sampler or write its values"
            )
        if self.kind == "int":
            return [*range(int(self.low), int(self.high) + 1, int(self.step))]
        # the numbers of Hydra's own range(), and its end
        return [*FloatRange(self.low, self.high + self.step / 2, self.step)]

    def holds(self, value: Any) -> bool:
        """Whether it can have this value."""
        if self.kind == "choice":
            return value in self.choices
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high:
            return False
        if self.kind == "int":
            return bool((value - self.low) % (self.step or 1) == 0)
        return self.step is None or value in self.values()

    def typed(self, value: Any) -> Any:
        """A value that it holds, as Optuna would give it."""
        if self.kind == "choice":
            return self.choices[self.choices.index(value)]
        return int(value) if self.kind == "int" else float(value)

    def override(self, value: Any) -> str:
        """The override that gives a job one of its values."""
        choice = self.kind == "choice"
        text = self.texts[self.choices.index(value)] if choice else str(value)
        return f"{self.key}={text}"

    def described(self) -> str:
        """For people."""
        if self.kind == "choice":
            text = ", ".join(map(str, self.choices))
        else:
            text = f"{self.kind} {self.low} to {self.high}"
            text += f" by {self.step}" if self.step not in (None, 1) else ""
            text += ", log" if self.log else ""
        return text + (f" (when {self.when.text})" if self.when else "")


def encoded(override: Override) -> Any:
    """An override's value as Optuna stores it: numbers, booleans and texts, else Hydra's text."""
    value = override.value()
    plain = isinstance(value, bool | int | float | str)
    return value if plain else override.get_value_element_as_str()


def labelled(items: Sequence[Any]) -> dict[str, Any]:
    """Values of a list by their text in an override, as Optuna stores and people read them.

    Without quotes, unless they tell two values apart: 'null' beside null, and 1 from true by its
    text. What stands twice counts once.
    """
    labels, strings = dict[str, Any](), set[str]()
    for item in sorted(items, key=lambda item: isinstance(item, QuotedString)):
        text, label = value_text(item), item.text if isinstance(item, QuotedString) else item
        if text in labels or (isinstance(item, QuotedString) and label in strings):
            continue
        if isinstance(label, str):
            strings.add(label)
        elif not isinstance(label, bool | int | float):
            label = text
        unclear = text == "nan" or label in labels.values()
        labels[text] = text if unclear else label
    return {text: labels[text] for text in map(value_text, items) if text in labels}


def param_of(loader: ConfigLoader, override: Override, when: Condition | None = None) -> Param:
    """What a sweep searches; a single value is a choice of one."""
    key, text = override.get_key_element(), str(override.input_line)
    value: Any = override.value()
    sweep = override.is_sweep_override()
    shuffled = bool(getattr(value, "shuffle", False))
    if not sweep or (
        override.is_discrete_sweep() and (shuffled or not isinstance(value, RangeSweep))
    ):
        labels = labelled(list(override.sweep_iterator()) if sweep else [override._value])
        if not labels:
            raise SweepError(nothing(loader, override))
        if shuffled:  # the order is part of what a study stores
            labels = dict(sorted(labels.items(), key=lambda pair: str(pair[1])))
        return Param(key, text, "choice", tuple(labels.values()), tuple(labels), when=when)
    if isinstance(value, RangeSweep):
        low, high, step, log = value.start, value.stop, value.step, False
    else:
        low, high, step, log = value.start, value.end, None, "log" in value.tags
    assert low is not None and high is not None
    kind = "int" if all(isinstance(n, int) for n in (low, high, step or 0)) else "float"
    if low > high or (log and low <= 0) or (step is not None and step <= 0):
        raise SweepError(f"{text}: the bounds must grow" + (" and be positive" if log else ""))
    step = step or (1 if kind == "int" and not log else None)
    if step is not None:  # as Optuna would, with a warning; in decimals, so that 0.9 is 3 * 0.3
        start, end, by = (decimal.Decimal(str(number)) for number in (low, high, step))
        high = (int if kind == "int" else float)(start + (end - start) // by * by)
    return Param(key, text, kind, (), (), low, high, step, log, when)
