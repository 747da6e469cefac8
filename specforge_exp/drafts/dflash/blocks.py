"""Which blocks of a conversation a DFlash draft is trained on.

A block starts at an anchor, a token of an assistant turn that the draft is given; the slots after
it are masked, and slot k is to say the token k places after the anchor (with `sample_from_anchor`
slot k - 1, so that the anchor's own slot says the first). Anchors are drawn anew in every epoch. A
label counts when it belongs to the anchor's own turn: the tokens that exist when
serving. The first token of a conversation is no anchor: nothing stands before it.

Shape suffixes: T packed tokens, B conversations, R blocks, K labels of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.rows import document_bounds, number_in_each, possible_anchors
from specforge_exp.training.batches import Batch, drawing


@dataclass(frozen=True)
class Blocks:
    """The blocks of packed conversations, in the order of their anchors; on the CPU."""

    anchor_R: Tensor
    """Position of each block's anchor."""
    start_T: Tensor
    """Where each token's conversation starts."""
    end_T: Tensor
    """Where it ends."""
    counts_RK: Tensor
    """Whether a label counts, bool."""


def make_blocks(cfg: DFlashConfig, batch: Batch) -> Blocks:
    """Draw at most `num_anchors` anchors in each conversation, the same for equal `batch.draw`.

    Conversations with fewer supervised tokens than `min_loss_tokens` have none.
    """
    start_T, end_T = document_bounds(batch.lengths, batch.turns_T.device)
    turns, first, anchors = batch.turns_T, 0, []
    possible_T = possible_anchors(turns, start_T, end_T)
    for number, length in zip(batch.numbers, batch.lengths, strict=True):
        turn_T = turns[first : first + length]
        where = possible_T[first : first + length].nonzero()[:, 0]
        if int((turn_T > 0).sum()) >= least_tokens(cfg):
            order = torch.randperm(len(where), generator=drawing(batch, number))[: cfg.num_anchors]
            anchors.append(first + where[order].sort().values)
        first += length
    empty = torch.zeros(0, dtype=torch.long)
    anchor_R = torch.cat([empty, *anchors])
    return Blocks(anchor_R, start_T, end_T, labels(batch, end_T, anchor_R, cfg.steps))


def least_tokens(cfg: DFlashConfig) -> int:
    """The fewest supervised tokens of a conversation that is trained on."""
    return cfg.min_loss_tokens or 2 * cfg.block_size


def nothing_to_learn(cfg: DFlashConfig, turns_T: Tensor, lengths_B: Tensor) -> dict[str, int]:
    """How many of packed conversations with these turns train nothing, by reason."""
    least = least_tokens(cfg)
    short_B = number_in_each(turns_T > 0, lengths_B) < least
    anchors_T = possible_anchors(turns_T, *document_bounds(lengths_B, turns_T.device))
    without_B = (number_in_each(anchors_T, lengths_B) == 0) & ~short_B
    return {
        f"with fewer than {least} supervised tokens (draft.min_loss_tokens)": int(short_B.sum()),
        "without two supervised tokens in a row": int(without_B.sum()),
    }


def labels(batch: Batch, end_T: Tensor, anchor_R: Tensor, steps: int) -> Tensor:
    """Which of the next `steps` tokens belong to the anchor's turn; [R, K]."""
    at_RK = anchor_R[:, None] + torch.arange(1, steps + 1, device=anchor_R.device)
    inside_RK = at_RK < end_T[anchor_R][:, None]
    turn_RK = batch.turns_T[at_RK.clamp(max=len(batch.turns_T) - 1)]
    return inside_RK & (turn_RK == batch.turns_T[anchor_R][:, None])


def denominators(cfg: DFlashConfig, batch: Batch) -> Tensor:
    """How many labels count at each place after the anchor; [K] float64."""
    return make_blocks(cfg, batch).counts_RK.sum(0).double()
