"""EAGLE-3."""

from specforge_exp.drafts.eagle3.model import Eagle3

__all__ = ["Eagle3"]
