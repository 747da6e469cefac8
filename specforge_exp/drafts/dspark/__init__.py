"""DSpark. Its class loads when it is asked for: `config` is read where torch is not wanted."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`DSpark`."""
    if name != "DSpark":
        raise AttributeError(name)
    from specforge_exp.drafts.dspark.draft import DSpark

    return DSpark
