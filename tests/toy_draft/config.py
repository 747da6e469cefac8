"""The toy draft's options."""

from dataclasses import dataclass
from typing import ClassVar

from specforge_exp.config import DraftConfig


@dataclass
class ToyConfig(DraftConfig):
    """How many heads it has."""

    steps_option: ClassVar[str] = "heads"
    heads: int = 2
    """One for each token it guesses."""

    @property
    def steps(self) -> int:
        return self.heads

    @property
    def features(self) -> int:
        return 1

    def chain_length(self, length: int | None) -> int:
        return min(length or self.heads, self.heads)
