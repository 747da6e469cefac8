"""DFlash."""

from specforge_exp.drafts.dflash.model import DFlash

__all__ = ["DFlash"]
