"""From options to lists of overrides: the product of what is swept, and the cases."""

from collections.abc import Mapping, Sequence
from itertools import product as every

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override

from hydra_sweeps.errors import SweepError
from hydra_sweeps.overrides import key_of, nothing, parse, parse_words, refuse_twice, texts


def points(
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
    runs_of_cases = [expand(loader, index, case) for index, case in enumerate(cases)]
    case_of_key = {key_of(override): case for case, runs in zip(cases, runs_of_cases, strict=True)
                   for run in runs for override in run}  # fmt: skip
    for override in typed:
        if (key := key_of(override)) in case_of_key:
            raise SweepError(
                f"{key} stands on the command line ({override.input_line}) and in "
                f"hydra.sweeper.cases ({case_of_key[key]!r}); leave it in one place"
            )
    swept = [f"{key}={value}" for key, value in params.items() if key_of(key) not in case_of_key]
    combinations = product(loader, laid_over(parse(loader, swept), typed))
    if not cases:
        return combinations
    return [[*run, *case] for runs in runs_of_cases for case in runs for run in combinations]


def laid_over(params: Sequence[Override], typed: Sequence[Override]) -> list[Override]:
    """What is typed in the place of a param of its key, as Hydra has it, else behind the params."""
    merged = list[Override]()
    for param in params:
        merged += [override for override in typed if key_of(override) == key_of(param)] or [param]
    keys = {*map(key_of, params)}
    return [*merged, *(override for override in typed if key_of(override) not in keys)]


def product(loader: ConfigLoader, overrides: list[Override]) -> list[list[str]]:
    """Every combination, the last key first to change."""
    refuse_twice(overrides)
    values = dict[str, list[str]]()
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise SweepError(
                f"{override.input_line} has no end: a grid takes lists, range() and glob(); "
                "hydra/sweeper=optuna_async searches intervals"
            )
        values[override.get_key_element()] = texts(override)
        if not values[override.get_key_element()]:
            raise SweepError(nothing(loader, override))
    return [list(combination) for combination in every(*values.values())]


def expand(loader: ConfigLoader, index: int, case: str) -> list[list[str]]:
    """The runs of one case: one, or several where it has sweeps of its own."""
    where = f"hydra.sweeper.cases[{index}]={case!r}"
    overrides = parse_words(loader, where, case)
    if not overrides:
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
