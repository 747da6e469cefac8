"""The options of an EAGLE-3 draft."""

from dataclasses import dataclass
from typing import ClassVar

from specforge_exp.config.checks import at_least, one_of
from specforge_exp.config.choices import DraftConfig
from specforge_exp.errors import InputError


@dataclass
class Eagle3Config(DraftConfig):
    """The steps of its training, and which of them count."""

    steps_option: ClassVar[str] = "ttt_length"
    replayed: ClassVar[bool] = True

    _target_: str = "specforge_exp.drafts.eagle3.Eagle3"
    """Dotted path of the draft's class."""
    ttt_length: int = 7
    """Unrolled steps of training-time test."""
    ttt_decay: float = 0.8
    """Step k weighs ttt_decay**k in the loss."""
    start: str = "target"
    """target: a copy of the target's last norm and head and of the projections and norms of its
    last layer, as far as they mean the same there; random: nothing but noise."""
    supervision: str = "inference"
    """Which (slot, step) pairs train and how they are averaged: inference (the states that exist
    when serving; the mean per step), or a peer's way: specforge, speculators."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("draft.ttt_length", self.ttt_length, 1)
        if not 0 < self.ttt_decay <= 1:
            raise InputError(f"draft.ttt_decay={self.ttt_decay} must be in (0, 1]")
        one_of("draft.start", self.start, ("target", "random"))
        allowed = ("inference", "specforge", "speculators")
        one_of("draft.supervision", self.supervision, allowed)

    def check_replay(self) -> None:
        """The peers' supervision trains states that no proposal has."""
        super().check_replay()
        if self.supervision != "inference":
            raise InputError(
                f"onpolicy=replay needs draft.supervision=inference, not {self.supervision}"
            )

    @property
    def steps(self) -> int:
        """Unrolled steps."""
        return self.ttt_length

    @property
    def features(self) -> int:
        """Three, whatever the target."""
        return 3
