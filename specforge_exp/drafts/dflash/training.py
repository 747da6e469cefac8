"""The parts of the DFlash objective: its rows, their weights, and what they cost.

The loss is the weighted mean over the labels of the optimiser window: the label k places after its
anchor weighs exp(-(k - 1) / loss_gamma), for an early mistake makes the later tokens worthless.
Terms are those of `losses.opd`; `lambda_hard`, the cross-entropy against the text itself, is what
DFlash was published with.

Shape suffixes: T tokens, R blocks, S slots, H hidden, K labels of a block, V vocabulary.
"""

import torch
from torch import Tensor

from specforge_exp.drafts.dflash.blocks import Blocks
from specforge_exp.drafts.dflash.config import DFlashConfig
from specforge_exp.drafts.dflash.model import DFlashModel
from specforge_exp.drafts.rows import Chains
from specforge_exp.drafts.weighting import Weighting, weighted
from specforge_exp.losses import Loss


def as_chains(blocks: Blocks, lengths: list[int]) -> Chains:
    """Blocks as the rows of `head_and_loss`: the label k + 1 places after the anchor is step k's.

    A row's slot is the position before its anchor, as the teacher of step k stands at the anchor's
    position + k.
    """
    counted = list(blocks.counts_RK.T)
    rows = [len(blocks.anchor_R)] * len(counted)
    return Chains(blocks.start_T, blocks.end_T, lengths, blocks.anchor_R - 1, rows, counted)


def decays(cfg: DFlashConfig) -> Tensor:
    """Weight of each label of a block by its place; [K] fp32."""
    return torch.exp(-torch.arange(cfg.steps) / cfg.loss_gamma)


def weighting(loss: Loss, cfg: DFlashConfig, window_K: Tensor) -> Weighting:
    """The weights of the terms at every place: decay over the window's sum of decays."""
    decay_K = decays(cfg).to(window_K.device)
    scale_K = (decay_K / (decay_K * window_K).sum().clamp(min=1e-9)).float()
    return weighted(loss, scale_K, decay_K)


def needed_flops(draft: DFlashModel, blocks: Blocks, tokens: int) -> float:
    """FLOP that forward and backward need below the head: 6 per weight and use; see EAGLE-3's."""
    H: int = draft.config.hidden_size
    rows = blocks.counts_RK.shape[0] * (blocks.counts_RK.shape[1] + 1)
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
