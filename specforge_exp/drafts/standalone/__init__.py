"""A stand-alone draft. Its class loads when it is asked for: `config` is read without torch."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`Standalone`."""
    if name != "Standalone":
        raise AttributeError(name)
    from specforge_exp.drafts.standalone.draft import Standalone

    return Standalone
