"""P-EAGLE. Its class loads when it is asked for: `config` is read where torch is not wanted."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`PEagle`."""
    if name != "PEagle":
        raise AttributeError(name)
    from specforge_exp.drafts.peagle.draft import PEagle

    return PEagle
