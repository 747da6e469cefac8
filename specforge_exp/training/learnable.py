"""Sequences from which a draft learns nothing: counted, and refused where there are no others."""

from collections import Counter
from collections.abc import Callable, Iterable

from torch import Tensor

from specforge_exp.config import DraftConfig, locate
from specforge_exp.errors import InputError


def nothing_to_learn(cfg: DraftConfig, turns: Iterable[Tensor]) -> Counter[str]:
    """How many sequences train nothing in this draft, by reason.

    Args:
        cfg: the draft's configuration.
        turns: of every sequence the turn of each token.
    """
    reason_of: Callable[..., str] = locate(cfg._target_).nothing_to_learn
    return Counter(filter(None, (reason_of(cfg, turns_T) for turns_T in turns)))


def refuse_nothing(cfg: DraftConfig, split: str, reasons: Counter[str], sequences: int) -> None:
    """Raise InputError when none of a split's sequences trains anything."""
    if sequences and reasons.total() == sequences:
        raise InputError(
            f"{split}: the draft {cfg.name} has nothing to learn from its {sequences} "
            f"conversations: {listed(reasons)}. It needs longer answers, or another draft"
        )


def listed(reasons: dict[str, int]) -> str:
    """Counts by reason, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())
