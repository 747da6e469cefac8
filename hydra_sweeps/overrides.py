"""Overrides as text: reading them, their keys, what is safe in a name."""

import re
import shlex
from collections.abc import Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from hydra_sweeps.errors import SweepError


def parse(loader: ConfigLoader, overrides: Sequence[str]) -> list[Override]:
    """Read overrides; Hydra's own error where one cannot be read."""
    return list(OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)))


def parse_words(loader: ConfigLoader, where: str, text: str) -> list[Override]:
    """Read overrides that are written as for a shell; SweepError names `where` they stand."""
    try:
        return parse(loader, shlex.split(text))
    except (ValueError, HydraException) as error:
        raise SweepError(f"{where} cannot be read: {error}") from None


def key_of(override: str | Override) -> str:
    """`+loss=x`, `++loss` -> `loss`."""
    text = override if isinstance(override, str) else override.get_key_element()
    return text.partition("=")[0].lstrip("+~")


def without(overrides: Sequence[str], key: str | None) -> list[str]:
    """All but those of a key."""
    return [override for override in overrides if key_of(override) != key]


def safe(text: str) -> str:
    """Only what every file system takes in a name."""
    bare = re.sub(r"^[^A-Za-z0-9.+-]+|[^A-Za-z0-9.+-]+$", "", text)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", bare)


def nothing(loader: ConfigLoader, override: Override) -> str:
    """Why a sweep has no values, and what it could have been."""
    reason = f"nothing to run: {override.input_line} matches nothing"
    if override.value_type != ValueType.GLOB_CHOICE_SWEEP:
        return reason
    group = override.key_or_group
    options = ", ".join(loader.get_group_options(group))
    reason += f"; the options of {group} are: {options or 'none'}"
    folders = loader.list_groups(group)
    if folders:
        example = f"'+{group}/{folders[0]}=glob(*)'"
        reason += f". A pattern does not reach into {', '.join(folders)}; {example} does"
    return reason
