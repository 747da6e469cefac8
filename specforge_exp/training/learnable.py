"""Sequences from which a draft learns nothing: counted, and refused where there are no others."""

from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from specforge_exp.config import DraftConfig, locate
from specforge_exp.errors import InputError


def nothing_to_learn(cfg: DraftConfig, parts: Iterable[tuple[Tensor, Tensor]]) -> Counter[str]:
    """How many sequences train nothing in this draft, by reason.

    Args:
        cfg: the draft's configuration.
        parts: sequences one after the other: the turn of each token, and the length of each.
    """
    counts: Counter[str] = Counter()
    for turns_T, lengths in parts:
        counts.update(locate(cfg._target_).nothing_to_learn(cfg, turns_T, lengths))
    return +counts


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
