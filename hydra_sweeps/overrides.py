"""Overrides as text: reading them, their keys and values, what is safe in a name.

The law of values: what is typed is what the job gets. A job is given Hydra's own text of a value,
so it has the value and the type that it would have with Hydra's basic sweeper, in grids, studies,
cases and in the command behind a row.
"""

import hashlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    Override,
    Quote,
    QuotedString,
    Transformer,
    ValueType,
)
from hydra.errors import HydraException

from hydra_sweeps.errors import SweepError

READABLE = re.compile(r"(\\[\\()\[\]{}:=, \t]|[\w/+.$%*@?|-])*", re.ASCII)
"""What Hydra reads without quotes."""
LONGEST = 200
"""Bytes of a name: file systems take 255, and what is written beside a run has its name too."""


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


def refuse_twice(overrides: Sequence[Override]) -> None:
    """SweepError for a key that is swept, or gets a dictionary, twice.

    One of the two would be lost without a word. Beside a plain value the last one counts, as in a
    run without -m.
    """
    places: dict[str, Override] = {}
    for override in overrides:
        if override.is_delete():
            continue
        other = places.setdefault(key_of(override), override)
        kinds = [o.is_sweep_override() or isinstance(o.value(), dict) for o in (other, override)]
        if other is not override and all(kinds):
            raise SweepError(
                f"{key_of(override)} is given twice, as {other.input_line} and as "
                f"{override.input_line}; leave it in one place"
            )
        places[key_of(override)] = override


def value_text(value: Any) -> str:
    """A parsed value as the text of an override: Hydra's own; quoted where Hydra could not read it
    again."""
    text: str = Transformer.str(value)
    if isinstance(value, str) and not READABLE.fullmatch(text):
        return quoted(value)
    return text


def quoted(text: str) -> str:
    """A text as the value of an override."""
    return QuotedString(text, Quote.single).with_quotes()


def texts(override: Override) -> list[str]:
    """An override, or each override of a sweep, as `key=value`."""
    single = not override.is_sweep_override()
    values = [override._value] if single else override.sweep_iterator()
    return [f"{override.get_key_element()}={value_text(value)}" for value in values]


def bounded(name: str, longest: int = LONGEST) -> str:
    """A name of so many bytes at most; a longer one is cut and gets a digest of the whole."""
    raw = name.encode()
    if len(raw) <= longest:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:8]
    return f"{raw[: longest - 9].decode(errors='ignore')}_{digest}"


def safe(text: str) -> str:
    """Only what every file system takes in a name; its length is for `bounded`."""
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
