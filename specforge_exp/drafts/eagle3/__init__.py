"""EAGLE-3. Its class loads when it is asked for: `config` is read where torch is not wanted."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`Eagle3`."""
    if name != "Eagle3":
        raise AttributeError(name)
    from specforge_exp.drafts.eagle3.draft import Eagle3

    return Eagle3
