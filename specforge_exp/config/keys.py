"""Unknown keys on the command line, answered with the valid ones before anything is composed."""

import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_origin

NOT_OURS = ("hydra", "experiment", "hparams_search", "naming", "local", "draft")
"""Groups without a node in the schema, and the draft, whose options are its own."""

NEW = re.compile("is not a subclass of|is not in struct")
"""Words of OmegaConf about an entry that is not there."""


def unknown_key(overrides: list[str], schema: type) -> str | None:
    """What is wrong with the first key that `schema` does not have; None when all are known.

    Args:
        overrides: command-line arguments; flags, `+key`, `~key` and groups with a `/` or `@` in
            their name are left to Hydra.
        schema: a dataclass of dataclasses.
    """
    for override in overrides:
        key = override.partition("=")[0]
        parts = key.split(".")
        if override[:1] in "-+~" or "=" not in override or parts[0] in NOT_OURS:
            continue
        if {"/", "@"} & set(key):
            continue
        node: Any = schema
        for depth, part in enumerate(parts, 1):
            if not is_dataclass(node):
                break
            if problem := not_an_option(parts[:depth], node):
                return problem
            node = next(field.type for field in fields(node) if field.name == part)
    return None


def begun_entry(overrides: list[str], schema: type, complaint: str) -> str | None:
    """The remedy for an entry of a mapping that one of its options begins, as
    `bench.datasets.mine.path=x`; None where Hydra complains of something else.

    Args:
        overrides: command-line arguments.
        schema: a dataclass of dataclasses.
        complaint: Hydra's.
    """
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        parts, node = key.split("."), schema
        for depth, part in enumerate(parts[:-1], 1):
            types = {each.name: each.type for each in fields(node)} if is_dataclass(node) else {}
            node = types.get(part)  # type: ignore[assignment]
            within, (entry, *option) = ".".join(parts[:depth]), parts[depth:]
            inside = get_origin(node) is dict and is_dataclass(get_args(node)[1])
            if inside and key in complaint and NEW.search(complaint):
                whole = f"{{{'.'.join(option)}: {value}}}" if option else value
                return (
                    f"{within}.{entry} is not there yet, and a new one is given as a whole: "
                    f"'+{within}={{{entry}: {whole}}}'"
                )
    return None


def not_an_option(parts: list[str], schema: Any) -> str | None:
    """The message for a key whose node, of this schema, does not have its last part; else None."""
    *above, last = parts
    names = [field.name for field in fields(schema)]
    if last in names:
        return None
    close = get_close_matches(last, names, 1)
    hint = f" (did you mean {'.'.join([*above, *close])}?)" if close else ""
    valid = ", ".join(name for name in names if not name.startswith("_"))
    where = ".".join(above) or "Config"
    return f"{'.'.join(parts)} is not an option{hint}. Valid in {where}: {valid}"
