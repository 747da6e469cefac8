"""Unknown keys on the command line, answered with the valid ones before anything is composed."""

from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

GROUPS_ONLY = ("hydra", "experiment", "hparams_search", "local")


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
        if override[:1] in "-+~" or "=" not in override or parts[0] in GROUPS_ONLY:
            continue
        if not {"/", "@"} & set(key):
            problem = missing_part(parts, schema)
            if problem:
                return problem
    return None


def missing_part(parts: list[str], schema: Any) -> str | None:
    """The message for the first part that its node does not have."""
    for depth, part in enumerate(parts):
        if not is_dataclass(schema):
            return None
        types = {field.name: field.type for field in fields(schema)}
        if part not in types:
            where = ".".join(parts[:depth])
            close = get_close_matches(part, types, 1)
            hint = f" (did you mean {'.'.join([*parts[:depth], *close])}?)" if close else ""
            valid = ", ".join(name for name in types if not name.startswith("_"))
            return (
                f"{'.'.join(parts)} is not an option{hint}. Valid in {where or 'Config'}: {valid}"
            )
        schema = types[part]
    return None
