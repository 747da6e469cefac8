"""Checks that configuration fields share; every message names the field and what is valid."""

import json
import math
import re
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from specforge_exp.errors import InputError

RESERVED = (".partial", ".old", ".tokens", ".features")
"""Ends of working folders' names, and of those that are made of two names (see paths.py)."""
SWITCHED = {"False": "off", "True": "on"}
"""YAML reads off and on as truth values."""
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse `value` unless it is one of `allowed`, naming the key and what is valid."""
    if value not in allowed:
        raise InputError(f"{key}={value} is not valid; choose one of: {', '.join(allowed)}")


def at_least(key: str, value: float | None, minimum: float) -> None:
    """Refuse a number below `minimum`; null passes."""
    if value is not None and value < minimum:
        raise InputError(f"{key}={value} must be at least {minimum}")


def above_zero(options: Any, prefix: str, names: str) -> None:
    """Refuse 0 and negative numbers in fields of `options`, whose keys begin with `prefix`; null
    passes."""
    for name in names.split():
        value = vars(options)[name]
        if value is not None and value <= 0:
            raise InputError(f"{prefix}{name}={value} must be above 0")


def up_to_one(options: Any, prefix: str, **ranges: str) -> None:
    """Refuse numbers that are not from 0 to 1 in fields of `options`, whose keys begin with
    `prefix`; a round bracket leaves an end out, as in "(0, 1]". Null passes."""
    for name, ends in ranges.items():
        value = vars(options)[name]
        left_out = {"(": 0, ")": 1}
        if value is not None and (
            not 0 <= value <= 1 or value in (left_out.get(ends[0]), left_out.get(ends[-1]))
        ):
            raise InputError(f"{prefix}{name}={value} must be in {ends}")


def allow(options: Any, prefix: str, **allowed: str) -> None:
    """`one_of` for fields of `options`, whose keys begin with `prefix`: the words of `allowed`."""
    for name, words in allowed.items():
        one_of(prefix + name, vars(options)[name], tuple(words.split()))


def minimums(options: Any, prefix: str, **least: float) -> None:
    """`at_least` for fields of `options`, whose keys begin with `prefix`."""
    for name, minimum in least.items():
        at_least(prefix + name, vars(options)[name], minimum)


def usual(options: Any, name: str) -> Any:
    """What a field of `options` is by default."""
    made = next(field.default_factory for field in fields(options) if field.name == name)
    return made() if callable(made) else getattr(type(options), name)


def changed(options: Any, names: str) -> list[str]:
    """Those of these fields that are not as by default."""
    return [name for name in names.split() if vars(options)[name] != usual(options, name)]


def refuse_others(what: str, cfg: Any, keys: str, why: str) -> None:
    """Refuse options of `cfg`, by their keys, that are not as by default, as another, `what`, needs
    them."""
    for key in keys.split():
        group, name = key.split(".")
        options = vars(cfg)[group]
        if changed(options, name):
            needed, given = (str(v).lower() for v in (usual(options, name), vars(options)[name]))
            raise InputError(
                f"{what} needs {key.removesuffix('.name')}={needed}, not {given}: {why}"
            )


def only_with(options: Any, prefix: str, there: bool, what: str, names: str) -> None:
    """Refuse fields of `options` that would change nothing: they are not as by default, and what
    they are part of, `what`, is not `there`.

    A run that is given one is not what its command says, and a grid over one repeats a run.
    """
    for name in changed(options, names):
        if not there:
            raise InputError(
                f"{prefix}{name}={typed(vars(options)[name])} needs {what}, without which it "
                f"changes nothing; give that, or {prefix}{name}={typed(usual(options, name))}"
            )


def some_of_all(key: str, named: list[int], layers: int) -> None:
    """Refuse layers that see everything where they are all layers, and none has a window."""
    if len({*named}) == layers:
        raise InputError(
            f"{key}={typed(named)} names all layers, so draft.sliding_window changes nothing: "
            "leave both out"
        )


def shared_evenly(batch_size: int, processes: int, name: str) -> None:
    """Refuse a batch that would leave processes without a conversation, naming the sizes that fit.

    Args:
        batch_size: trainer.batch_size.
        processes: how many share it.
        name: of what says how many.
    """
    if batch_size % processes:
        short = name.rsplit(".", maxsplit=1)[-1]
        fit = ", ".join(str(n) for n in range(1, batch_size) if batch_size % n == 0)
        sizes = ", ".join(str(processes * n) for n in (1, 2, 3))
        raise InputError(
            f"trainer.batch_size={batch_size} conversations cannot be shared evenly by "
            f"{name}={processes}; make batch_size a multiple of {short} ({sizes}, ...), or {short} "
            f"one of: {', '.join(filter(None, [fit, str(batch_size)]))}"
        )


def check_objectives(names: list[str], steps: int) -> None:
    """Refuse objectives that no evaluation has, before anything is trained."""
    by_step = [f"{name}/{k}" for name in ("alpha", "top1") for k in range(steps)]
    allowed = ("simulated_length", "loss", "alpha", "top1", "gpu_hours", *by_step)
    for name in names:
        one_of("objectives", name, allowed)
    if not names:
        raise InputError("objectives is empty; name at least one, e.g. [simulated_length]")


def safe_name(key: str, value: str, joint: str = "/") -> None:
    """Refuse a name that cannot be a folder's on every file system, or is a working folder's, or
    holds `joint`, which stands between it and another in a folder's name."""
    if value == MISSING:
        return
    if not SAFE_NAME.fullmatch(value):
        raise InputError(f"{key}={value!r} may only hold letters, digits and . _ + -")
    if value.lower().endswith(RESERVED) or joint in value:
        raise InputError(
            f"{key}={value!r} would be another name's folder: it may not hold {joint} nor end in "
            f"{', '.join(RESERVED)}"
        )


def typed(value: Any) -> str:
    """A value as the command line has it."""
    return json.dumps(value, separators=(",", ":")).replace('"', "")


def finite(key: str, value: Any) -> None:
    """Refuse a number that is not finite, in any field of `value` and in what those hold."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}={value} must be a finite number")
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    parts = vars(value) if is_dataclass(value) else value if isinstance(value, dict) else {}
    for name, part in parts.items():
        finite(f"{key}.{name}" if key else str(name), part)
