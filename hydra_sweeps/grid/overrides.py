"""From options to lists of overrides: the product of what is swept, and the cases."""

import shlex
from collections.abc import Mapping, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from hydra_sweeps.errors import SweepError


def grid(
    loader: ConfigLoader,
    arguments: Sequence[str],
    params: Mapping[str, str],
    cases: Sequence[str],
) -> list[list[str]]:
    """The overrides of every run: each case with each combination of what is swept.

    Args:
        loader: knows the options of groups.
        arguments: the command line's own, sweeps and others.
        params: sweeps by key, for keys that neither `arguments` nor a case has.
        cases: several overrides each, as a shell would take them.

    Raises:
        SweepError: nothing to run, a case that cannot be read, a key in two places.
    """
    typed = parse(loader, arguments)
    taken = [expand(loader, index, case) for index, case in enumerate(cases)]
    of_cases = {key_of(each): case for case, runs in zip(cases, taken, strict=True)
                for run in runs for each in run}  # fmt: skip
    for override in typed:
        key = key_of(override.get_key_element())
        if key in of_cases:
            raise SweepError(
                f"{key} stands on the command line ({override.input_line}) and in "
                f"hydra.sweeper.cases ({of_cases[key]!r}); leave it in one place"
            )
    more = [f"{key}={value}" for key, value in params.items() if key_of(key) not in of_cases]
    swept = product(loader, [*parse(loader, more), *typed])
    if not taken:
        return swept
    return [[*run, *case] for runs in taken for case in runs for run in swept]


def parse(loader: ConfigLoader, overrides: Sequence[str]) -> list[Override]:
    """Read overrides; Hydra's own error where one cannot be read."""
    return list(OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)))


def key_of(override: str) -> str:
    """`+loss=x`, `++loss` -> `loss`."""
    return override.partition("=")[0].lstrip("+~")


def product(loader: ConfigLoader, overrides: list[Override]) -> list[list[str]]:
    """Every combination, the last key first to change."""
    for override in overrides:
        if not override.is_sweep_override():
            continue
        if not override.is_discrete_sweep():
            raise SweepError(
                f"{override.input_line} has no end: a grid takes lists, range() and glob(); "
                "hydra/sweeper=optuna_async searches intervals"
            )
        if not list(override.sweep_string_iterator()):
            raise SweepError(nothing(loader, override))
    return BasicSweeper.split_arguments(overrides, None)[0]


def nothing(loader: ConfigLoader, override: Override) -> str:
    """Why a sweep has no values, and what it could have been."""
    said = f"nothing to run: {override.input_line} matches nothing"
    if override.value_type != ValueType.GLOB_CHOICE_SWEEP:
        return said
    group = override.key_or_group
    options = ", ".join(loader.get_group_options(group))
    said += f"; the options of {group} are: {options or 'none'}"
    below = loader.list_groups(group)
    if below:
        example = f"'+{group}/{below[0]}=glob(*)'"
        said += f". A pattern does not reach into {', '.join(below)}; {example} does"
    return said


def expand(loader: ConfigLoader, index: int, case: str) -> list[list[str]]:
    """The runs of one case: one, or several where it has sweeps of its own."""
    where = f"hydra.sweeper.cases[{index}]={case!r}"
    try:
        words = shlex.split(case)
        overrides = parse(loader, words)
    except (ValueError, HydraException) as error:
        raise SweepError(f"{where} cannot be read: {error}") from None
    if not words:
        raise SweepError(f"{where} is empty; a case is e.g. 'loss=baseline lr=1e-4'")
    for override in overrides:
        if override.key_or_group.split("/")[0].split(".")[0] == "hydra":
            raise SweepError(
                f"{where}: {override.input_line} concerns all runs; give it on the command line"
            )
    try:
        return product(loader, overrides)
    except SweepError as error:
        raise SweepError(f"{where}: {error}") from None
