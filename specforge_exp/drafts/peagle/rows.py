"""Which slots of P-EAGLE train at which depths, drawn anew for every conversation and epoch.

Slot i at depth d predicts token i+2+d like EAGLE-3's at step d, but reads nothing of the depths
before: depth 0 reads token i+1 and the target's state, all others the mask token and one learnt
state. Depth 0 trains wherever it can; depth d, of the n slots where depth 0 does, a sample of
(n - d) * max(ratio**d, least) of those that train at depth d-1, so that chains stay whole and
memory does not grow with the depths. (Conditional drop, P-EAGLE, arXiv 2602.01469)

Shape suffixes: T packed tokens, N candidates.
"""

import torch
from torch import Tensor

from specforge_exp.drafts.eagle3.chains import chains_of, turn_masks
from specforge_exp.drafts.peagle.config import PEagleConfig
from specforge_exp.drafts.rows import Chains, document_bounds
from specforge_exp.training.batches import Batch, drawing


def make_chains(cfg: PEagleConfig, batch: Batch) -> Chains:
    """The rows of packed conversations, the same for equal `batch.draw`."""
    return chains_of(make_masks(cfg, batch), batch.lengths)


def make_masks(cfg: PEagleConfig, batch: Batch) -> list[Tensor]:
    """Per depth the slots [T] that train."""
    _, end_T = document_bounds(batch.lengths, batch.turns_T.device)
    possible = turn_masks(cfg.supervision, batch.turns_T, end_T, cfg.num_depths)
    masks = [possible[0], *(torch.zeros_like(mask_T) for mask_T in possible[1:])]
    first = 0
    for number, length in zip(batch.numbers, batch.lengths, strict=True):
        span, generator = slice(first, first + length), drawing(batch, number)
        drawn = draw(cfg, [mask_T[span] for mask_T in possible], generator)
        for mask_T, slot_N in zip(masks[1:], drawn, strict=True):
            mask_T[first + slot_N] = True
        first += length
    return masks


def draw(cfg: PEagleConfig, possible: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Slots of a conversation at the depths from 1 on.

    Args:
        cfg: the ratios.
        possible: per depth the slots that could train.
        generator: of the sample.
    """
    seeds = int(possible[0].sum())
    if cfg.max_anchors is not None:
        seeds = min(seeds, cfg.max_anchors)
    drawn: list[Tensor] = []
    for depth in range(1, cfg.num_depths):
        share = max(cfg.down_sample_ratio**depth, cfg.down_sample_ratio_min)
        size = int(max(0, seeds - depth) * share)
        slot_N = possible[depth].nonzero()[:, 0]
        if drawn:
            slot_N = drawn[-1][possible[depth][drawn[-1]]]
        chosen_N = torch.randperm(len(slot_N), generator=generator)[:size]
        drawn.append(slot_N[chosen_N].sort().values)
    return drawn
