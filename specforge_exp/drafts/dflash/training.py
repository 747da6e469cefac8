"""The parts of the DFlash objective: its rows, their weights, and what they cost.

The loss is the weighted mean over the labels of the optimiser window: the label k places after its
anchor weighs exp(-(k - 1) / loss_gamma), for an early mistake makes the later tokens worthless.
D-PACE weighs by how likely the draft is to get so far.
Terms are those of `losses.opd`; `lambda_hard`, the cross-entropy against the text itself, is what
DFlash was published with.

Shape suffixes: T tokens, R blocks, S slots, H hidden, K labels of a block, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor

from specforge_exp.drafts.dflash.blocks import Blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.model import DFlashModel
from specforge_exp.drafts.rows import Chains
from specforge_exp.drafts.weighting import Weighting, weighted
from specforge_exp.losses import Loss
from specforge_exp.training.batches import moved


def as_chains(blocks: Blocks, lengths: list[int]) -> Chains:
    """Blocks as the rows of `head_and_loss`: the label k + 1 places after the anchor is step k's.

    A row's slot is the position before its anchor, as the teacher of step k stands at the anchor's
    position + k.
    """
    counted = list(blocks.counts_RK.T)
    rows = [len(blocks.anchor_R)] * len(counted)
    return Chains(blocks.start_T, blocks.end_T, lengths, blocks.anchor_R - 1, rows, counted)


def decays(cfg: DFlashConfig) -> Tensor:
    """Weight of each label of a block by its place alone; [K] fp32."""
    return torch.exp(-torch.arange(cfg.steps) / cfg.loss_gamma)


def scales(cfg: DFlashConfig, decay_K: Tensor, window_K: Tensor) -> Tensor:
    """What a label's value is multiplied with at every place: its decay over the window's sum of
    decays, or over its number of labels; [K] fp32."""
    counted = window_K if cfg.divisor == "labels" else decay_K * window_K
    return (decay_K / counted.sum().clamp(min=1e-9)).float()


def weighting(
    loss: Loss, cfg: DFlashConfig, window_K: Tensor, text_KR: Tensor | None = None
) -> Weighting:
    """The weights of the terms at every place, and with dpace of every label.

    Args:
        loss: the terms.
        cfg: the draft's options.
        window_K: labels of the optimiser window at each place.
        text_KR: with dpace: -log q of the text at every label that counts, -1 elsewhere.
    """
    decay_K = moved(decays(cfg), window_K.device)
    if text_KR is None:
        return weighted(loss, scales(cfg, decay_K, window_K), decay_K)
    even_K = torch.ones_like(decay_K)
    made = weighted(loss, scales(cfg, even_K, window_K), even_K)
    return replace(made, rows_KR=dpace(text_KR, cfg.dpace_alpha))


def dpace(text_KR: Tensor, alpha: float) -> Tensor:
    """Sum over i >= k of prod over j <= i of (1 - alpha) q_j + alpha, over the labels of a block
    that count: how much of its expected length hangs on label k (D-PACE, arXiv 2605.18810).

    Args:
        text_KR: -log q of the text at every label that counts, negative elsewhere.
        alpha: from 0 (the length itself) to 1 (places count alone).

    Returns:
        [K, R] fp32, held constant; 0 where a label does not count.
    """
    counts_KR = text_KR >= 0
    smooth_KR = torch.where(counts_KR, (1 - alpha) * (-text_KR).exp() + alpha, 1.0)
    prefix_KR = smooth_KR.cumprod(0) * counts_KR
    return prefix_KR.flip(0).cumsum(0).flip(0) * counts_KR


def needed_flops(draft: DFlashModel, blocks: Blocks, tokens: int) -> float:
    """FLOP that forward and backward need below the head: 6 per weight and use; see EAGLE-3's."""
    H: int = draft.config.hidden_size
    rows = len(blocks.anchor_R) * (blocks.counts_RK.shape[1] + draft.first_slot)
    layers = sum(weight.numel() for weight in draft.layers.parameters() if weight.dim() > 1)
    keys = sum(
        len(proj.weight) * H
        for layer in draft.layers
        for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    attn = draft.layers[0].self_attn
    first = sum(proj.weight.numel() for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    repeated = max(0, rows - len(blocks.anchor_R) - 1)  # all masked slots enter as one row
    per_token, per_row = draft.fc.weight.numel() + keys, rows * layers - repeated * first
    needed: float = 6.0 * tokens * per_token + 6.0 * per_row
    return needed
