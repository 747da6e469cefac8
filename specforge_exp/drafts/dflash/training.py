"""The DFlash objective: fill masked blocks, then compare every slot with the target.

The loss is the weighted mean over the labels of the optimiser window: the label k places after its
anchor weighs exp(-(k - 1) / loss_gamma), for an early mistake makes the later tokens worthless.
Terms are those of `losses.opd`; `lambda_hard`, the cross-entropy against the text itself, is what
DFlash was published with.

Shape suffixes: T tokens, R blocks, S slots, H hidden, K labels of a block, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specforge_exp.config import DraftConfig, LossConfig
from specforge_exp.drafts.dflash.blocks import Blocks, make_blocks
from specforge_exp.drafts.head_loss import Heads, Tally, Weighting, attach, tally
from specforge_exp.drafts.outcome import by_conversation, reported, step_values
from specforge_exp.drafts.rows import Chains
from specforge_exp.losses import TERMS, LossFunction, opd
from specforge_exp.training.objective import Outcome, Sample

if TYPE_CHECKING:
    from specforge_exp.drafts.dflash.model import DFlash


def objective(
    draft: "DFlash",
    sample: Sample,
    target_head_VH: Tensor,
    loss: tuple[LossFunction, LossConfig],
    cfg: DraftConfig,
    window_K: Tensor,
) -> Outcome:
    """Fill the blocks of packed conversations and compare them with the target.

    Args:
        draft: gradients go to it; those of its last norm as soon as this returns.
        sample: tokens and the target's states.
        target_head_VH: the target's output embeddings, which are the draft's too.
        loss: the function and its configuration.
        cfg: block size, anchors and decay.
        window_K: sum of `denominators` over the optimiser window.
    """
    blocks = make_blocks(cfg, sample)
    gradient = torch.is_grad_enabled()
    state_QH = draft.states(sample.ids_T, sample.aux_TA, blocks, cfg.steps + 1)
    state_RSH = state_QH.unflatten(0, (-1, cfg.steps + 1))
    states = [state_RSH[:, place] for place in range(1, cfg.steps + 1)]
    carried = as_chains(blocks, max(sample.lengths))
    next_T = torch.cat([sample.ids_T[1:], sample.ids_T[:1]])
    heads = Heads(
        draft.norm, target_head_VH, draft.draft_ids_D, target_head_VH, sample.last_TH, next_T
    )
    measured = weighting(loss, cfg, window_K.to(sample.ids_T.device))
    found = tally(carried, states, heads, measured, gradient)
    decay_K = decays(cfg).to(window_K.device)
    value_K = step_values(found, measured) / decay_K
    total = (value_K * decay_K).sum()
    if found.gradient_QH is not None:
        total = attach(total, found.gradient_QH, states)
    lengths_B2 = None if gradient else by_conversation(found, carried, sample.lengths)
    flops = needed_flops(draft, blocks, found, len(sample.ids_T))
    return Outcome(total, value_K, reported(found), lengths_B2, flops)


def as_chains(blocks: Blocks, longest: int) -> Chains:
    """Blocks as the rows of `head_loss.tally`: the label k + 1 places after the anchor is step k's.

    A row's slot is the position before its anchor, as the teacher of step k stands at the anchor's
    position + k.
    """
    counted = list(blocks.counts_RK.T)
    rows = [len(blocks.anchor_R)] * len(counted)
    return Chains(blocks.start_T, blocks.end_T, longest, blocks.anchor_R - 1, rows, counted, [])


def decays(cfg: DraftConfig) -> Tensor:
    """Weight of each label of a block by its place; [K] fp32."""
    return torch.exp(-torch.arange(cfg.steps) / cfg.loss_gamma)


def weighting(
    loss: tuple[LossFunction, LossConfig], cfg: DraftConfig, window_K: Tensor
) -> Weighting:
    """The weights of the terms at every place: decay over the window's sum of decays."""
    function, loss_cfg = loss
    decay_K = decays(cfg).to(window_K.device)
    scale_K = (decay_K / (decay_K * window_K).sum().clamp(min=1e-9)).float()
    if function is not opd:
        return Weighting({}, scale_K, lambda z, rows: function(z, rows, loss_cfg),
                         loss_cfg.temperature)  # fmt: skip
    terms = {
        TERMS[key][0]: weight * scale_K for key, weight in loss_cfg.weights().items() if weight > 0
    }
    return Weighting(terms, scale_K, None, loss_cfg.temperature)


def needed_flops(draft: "DFlash", blocks: Blocks, found: Tally, tokens: int) -> float:
    """FLOP that forward and backward need: 6 per weight and use; see `eagle3_training`."""
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
    supervised = int(blocks.counts_RK.sum())
    needed: float = (
        6.0 * tokens * (draft.fc.weight.numel() + keys)
        + 6.0 * (rows * layers - repeated * first)
        + 4.0 * supervised * H * len(draft.head_VH)
        + 2.0 * found.positions * H * len(draft.head_VH)
    )
    return needed
