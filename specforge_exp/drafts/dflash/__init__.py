"""DFlash. Its class loads when it is asked for: `config` is read where torch is not wanted."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`DFlash`."""
    if name != "DFlash":
        raise AttributeError(name)
    from specforge_exp.drafts.dflash.draft import DFlash

    return DFlash
